// Draws the tree of one round: the root, its drafts, the kept path and the model's own token behind it.

import { box, curve, shown, svg } from "./svg.js";

const WIDTH = 92, HEIGHT = 24, GAP = 34, STEP = 9; // of a node, and between columns and lines

/** An SVG of a round: {tokens, tree}. */
export function drawTree(round) {
  const nodes = layout(round);
  const columns = Math.max(...nodes.map((node) => node.depth)) + 1;
  const lines = Math.max(...nodes.map((node) => node.line)) + 1;
  const size = { width: columns * (WIDTH + GAP) - GAP + 4, height: lines * (HEIGHT + STEP) + 8 };
  const x = (node) => 2 + node.depth * (WIDTH + GAP), y = (node) => 4 + node.line * (HEIGHT + STEP);
  const picture = svg("svg", { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": inWords(round) });
  for (const node of nodes.filter((one) => one.parent)) {
    const from = node.parent;
    picture.append(curve(`edge ${node.kind}`, x(from) + WIDTH, y(from) + HEIGHT / 2, x(node), y(node) + HEIGHT / 2));
  }
  for (const node of nodes) {
    picture.append(box(`node ${node.kind}`, x(node), y(node), WIDTH, HEIGHT, shown(node.text, 11), node.title));
    if (node.chance !== undefined) {
      picture.append(svg("text", { class: "chance", x: x(node) + WIDTH + 3, y: y(node) + 10 }, percent(node.chance)));
    }
  }
  return picture;
}

/** The nodes with their depth and line; leaves take a line each, and a parent that of its best child. */
function layout(round) {
  const tree = round.tree ?? { root: "", nodes: [] };
  const root = { text: tree.root, kind: "root", depth: 0, children: [], title: `${JSON.stringify(tree.root)}: the last known token` };
  const drafts = tree.nodes.map((node) => ({
    text: node.text, chance: node.chance, kind: node.kept ? "kept" : "rejected", children: [],
    title: `${JSON.stringify(node.text)}: expected to be right with ${percent(node.chance)}, ${node.kept ? "kept" : "rejected"}`,
  }));
  let end = root;
  tree.nodes.forEach((node, index) => {
    const draft = drafts[index];
    draft.parent = node.parent < 0 ? root : drafts[node.parent];
    draft.depth = draft.parent.depth + 1;
    draft.parent.children.push(draft);
    if (node.kept) end = draft;
  });
  const last = round.tokens.at(-1);
  const own = last && !last.drafted
    ? [{ text: last.text, kind: "own", parent: end, depth: end.depth + 1, children: [], title: "decided by the model itself" }] : [];
  own.forEach((node) => end.children.push(node));
  let line = 0;
  const place = (node) => {
    const order = { kept: 0, own: 1, rejected: 2 };
    node.children.sort((a, b) => order[a.kind] - order[b.kind] || (b.chance ?? 0) - (a.chance ?? 0));
    node.line = line;
    node.children.forEach(place);
    if (!node.children.length) line += 1;
  };
  place(root);
  return [root, ...drafts, ...own];
}

const percent = (chance) => `${Math.round(100 * chance)}%`;

function inWords(round) {
  const drafted = round.tree?.nodes.length ?? 0, kept = round.tokens.filter((token) => token.drafted).length;
  return `${drafted} drafts, of which ${kept} were kept: ${round.tokens.map((token) => token.text).join("")}`;
}

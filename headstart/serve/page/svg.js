// Small helpers that make elements.

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children; a string becomes text. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** An HTML element, likewise. */
export function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** How a token is shown: spaces and line ends are visible, and long ones are cut. */
export function shown(text, longest = 14) {
  const visible = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "·");
  return visible.length > longest ? `${visible.slice(0, longest - 1)}…` : visible || "∅";
}

/** A box with a text in its middle. */
export function box(kind, x, y, width, height, text, title) {
  const label = svg("text", { x: x + width / 2, y: y + height / 2 + 4, "text-anchor": "middle" }, text);
  const group = svg("g", { class: kind }, svg("rect", { x, y, width, height, rx: 7 }), label);
  if (title) group.append(svg("title", {}, title));
  return group;
}

/** A curve between two points, horizontal at both. */
export function curve(kind, x1, y1, x2, y2) {
  const middle = (x1 + x2) / 2;
  return svg("path", { class: kind, d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}` });
}

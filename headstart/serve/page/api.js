// The server: what it has loaded, and answers as streams of rounds.

/** What the server has loaded. */
export async function info() {
  const answer = await fetch("/playground/info");
  if (!answer.ok) throw new Error(await sentence(answer));
  return answer.json();
}

/**
 * The rounds of an answer, as they happen: {text, tokens: [{text, drafted}], tree: {root, nodes: [{text, parent, chance, kept}]},
 * seconds}. Throws an error with one sentence.
 */
export async function* rounds(request, signal) {
  const path = request.messages ? "/v1/chat/completions" : "/v1/completions";
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = JSON.stringify({ ...request, stream: true, include_trees: true });
  const answer = await fetch(path, { method: "POST", headers, body, signal });
  if (!answer.ok) throw new Error(await sentence(answer));
  let before = performance.now();
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (!choice?.tree) continue;
    const now = performance.now();
    yield { ...round(choice), seconds: (now - before) / 1000 };
    before = now;
  }
}

function round({ tree, text, delta }) {
  const tokens = tree.emitted.map((token, index) => ({ text: token, drafted: tree.drafted[index] }));
  const nodes = tree.tokens.map((token, index) => (
    { text: token, parent: tree.parents[index], chance: tree.chances[index], kept: tree.kept[index] }
  ));
  return { text: text ?? delta.content ?? "", tokens, tree: { root: tree.root, nodes } };
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/** The server's own sentence about an error. */
async function sentence(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

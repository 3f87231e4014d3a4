// The page "Try it": a conversation whose answers show their rounds.

import { rounds } from "./api.js";
import { html } from "./svg.js";
import { drawTree } from "./tree.js";

const EXAMPLES = ["Once upon a time there was a fox who", "Explain why the sky is blue.", "Write three sentences about the sea."];
const part = (name) => document.getElementById(name);

/** Fills the page. server: what `info` returned. */
export function startChat(server) {
  new Chat(server);
}

class Chat {
  constructor(server) {
    this.server = server;
    this.history = [];
    this.rounds = []; // of the answer that is shown beside the conversation
    this.chosen = -1;
    for (const lane of server.lanes) part("drafter").append(html("option", { value: lane.name }, lane.name));
    part("drafter").append(html("option", { value: "none" }, "none (plain decoding)"));
    for (const text of EXAMPLES) {
      part("examples").append(html("button", { type: "button", onclick: () => this.send(text) }, text));
    }
    part("ask").addEventListener("submit", (event) => { event.preventDefault(); this.send(part("prompt").value); });
    part("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); part("ask").requestSubmit(); }
    });
    part("stop").addEventListener("click", () => this.abort?.abort());
    part("clear").addEventListener("click", () => this.clear());
    part("rounds").addEventListener("keydown", (event) => this.onKey(event));
    part("tree").addEventListener("keydown", (event) => this.onKey(event));
  }

  async send(text) {
    if (!text.trim() || this.abort) return;
    this.abort = new AbortController();
    this.show({ problem: "" });
    part("prompt").value = "";
    document.querySelector(".welcome")?.remove();
    this.message("user", "You", text);
    this.history.push({ role: "user", content: text });
    const drafter = part("drafter").value;
    const request = {
      ...(this.server.has_chat ? { messages: [...this.history] } : { prompt: text }),
      model: this.server.model, max_tokens: Number(part("tokens").value), temperature: Number(part("temperature").value),
      seed: Math.floor(2 ** 31 * Math.random()),
    };
    this.busy(true);
    try {
      const answer = await this.answer(drafter, request);
      this.history.push({ role: "assistant", content: answer.text });
      if (part("compare").checked && drafter !== "none") await this.compare(request, answer);
    } catch (error) {
      if (error.name !== "AbortError") this.show({ problem: error.message });
    } finally {
      this.abort = undefined;
      this.busy(false);
    }
  }

  /** Streams an answer into a new message. Returns its text, its rounds and its speed. */
  async answer(drafter, request) {
    const area = this.message("assistant", drafter === "none" ? "Plain decoding" : `With ${drafter}`, "");
    const answer = { text: "", rounds: [], tokens: 0, seconds: 0 };
    if (drafter !== "none") { this.rounds = answer.rounds; this.chosen = -1; part("rounds").replaceChildren(); }
    for await (const round of rounds({ ...request, drafter }, this.abort.signal)) {
      const index = answer.rounds.push(round) - 1;
      answer.text += round.text;
      answer.tokens += round.tokens.length;
      answer.seconds += round.seconds;
      area.append(...round.tokens.map((token) => this.token(token, answer.rounds, index)));
      if (drafter !== "none") {
        this.bar(index);
        this.choose(index);
        this.numbers(answer);
      } else part("plain").textContent = speed(answer);
      this.follow();
    }
    return answer;
  }

  /** Decodes the same request without drafts, and compares text and speed. */
  async compare(request, drafted) {
    const plain = await this.answer("none", request);
    part("plain").textContent = speed(plain);
    const ratio = (drafted.tokens / drafted.seconds) / (plain.tokens / plain.seconds);
    part("speedup").textContent = `${ratio.toFixed(2)}×`;
    const words = plain.text === drafted.text ? "The same text, token by token." : "The texts differ: at a near tie, rounding decided.";
    part("messages").lastElementChild.append(html("p", { class: "note" }, words));
    this.follow();
  }

  token(token, of, index) {
    const select = () => { this.rounds = of; this.bars(); this.choose(index); };
    const title = token.drafted ? "guessed by the drafter, and right" : "decided by the model";
    return html("span", { class: token.drafted ? "token drafted" : "token", title, onclick: select }, token.text);
  }

  message(role, name, text) {
    const area = html("div", { class: "text" }, text);
    part("messages").append(html("div", { class: `message ${role}` }, html("h3", {}, name), area));
    this.follow();
    return area;
  }

  numbers(answer) {
    part("tau").textContent = (answer.tokens / answer.rounds.length).toFixed(2);
    part("rate").textContent = speed(answer);
  }

  bars() {
    part("rounds").replaceChildren();
    this.rounds.forEach((_, index) => this.bar(index));
  }

  bar(index) {
    const round = this.rounds[index], number = round.tokens.length;
    const bar = html("div", {
      role: "option", class: round.tree?.nodes.length ? "drafting" : "", title: `round ${index + 1}: ${number} tokens`,
      onclick: () => this.choose(index),
    });
    bar.style.height = `${Math.min(100, 14 * number)}%`;
    part("rounds").append(bar);
    bar.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  choose(index) {
    if (index < 0 || index >= this.rounds.length) return;
    this.chosen = index;
    const round = this.rounds[index], drafts = round.tree?.nodes.length ?? 0;
    const kept = round.tokens.filter((token) => token.drafted).length;
    part("round-title").textContent = `Round ${index + 1}: ${drafts} drafts, ${kept} kept, ${Math.round(1000 * round.seconds)} ms`;
    part("tree").replaceChildren(drawTree(round));
    [...part("rounds").children].forEach((bar, number) => bar.setAttribute("aria-selected", number === index));
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && !this.abort) { event.preventDefault(); this.choose(this.chosen + step); }
  }

  follow() {
    part("messages").scrollTop = part("messages").scrollHeight;
  }

  busy(is) {
    part("send").hidden = is;
    part("stop").hidden = !is;
    part("clear").disabled = is;
    if (!is) part("prompt").focus({ preventScroll: true });
  }

  show({ problem }) {
    part("problem").textContent = problem;
    part("problem").hidden = !problem;
  }

  clear() {
    this.history = [];
    this.rounds = [];
    for (const name of ["messages", "rounds", "tree"]) part(name).replaceChildren();
    for (const name of ["tau", "rate", "plain", "speedup"]) part(name).textContent = "–";
    part("round-title").textContent = "The tree of a round";
    this.show({ problem: "" });
  }
}

const speed = (answer) => (answer.seconds ? (answer.tokens / answer.seconds).toFixed(0) : "–");

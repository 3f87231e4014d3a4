// The page "How it works": a variant's picture, its steps, and what was measured of it on this server.

import { box, html, svg } from "./svg.js";
import { VARIANTS } from "./variants.js";

const DOWN = 50, ACROSS = 124, WIDTH = 112, HEIGHT = 30; // steps between boxes, and the size of a box
const part = (name) => document.getElementById(name);

/** Fills the page. server: what `info` returned, or a promise of newer figures through `refresh`. */
export function startVariants(server, refresh) {
  new Explanation(server, refresh);
}

class Explanation {
  constructor(server, refresh) {
    this.server = server;
    this.refresh = refresh;
    for (const variant of VARIANTS) {
      const is_missing = variant.name !== "plain" && !this.lane(variant);
      part("choices").append(html("button", {
        role: "radio", class: is_missing ? "missing" : "", "data-name": variant.name, onclick: () => this.choose(variant),
        title: is_missing ? "not loaded on this server" : "",
      }, variant.title));
    }
    part("choices").addEventListener("keydown", (event) => this.onKey(event));
    part("back").addEventListener("click", () => this.show(this.step - 1));
    part("next").addEventListener("click", () => this.show(this.step + 1));
    part("play").addEventListener("click", () => this.play());
    part("tab-variants").addEventListener("click", () => this.update());
    this.choose(VARIANTS.find((variant) => this.lane(variant)) ?? VARIANTS[0]);
  }

  lane(variant) {
    return this.server.lanes.find((lane) => lane.methods.includes(variant.name));
  }

  choose(variant) {
    this.variant = variant;
    this.stop();
    for (const button of part("choices").children) {
      const is_chosen = button.dataset.name === variant.name;
      button.setAttribute("aria-checked", is_chosen);
      button.tabIndex = is_chosen ? 0 : -1;
    }
    part("variant-title").textContent = variant.title;
    part("summary").textContent = variant.summary;
    part("source").textContent = variant.paper ? `Described in: ${variant.paper}.` : "";
    const pairs = Object.entries(variant.properties).flatMap(([key, value]) => [html("dt", {}, key), html("dd", {}, value)]);
    part("properties").replaceChildren(...pairs);
    part("diagram").replaceChildren(this.draw());
    this.measure();
    this.show(1);
  }

  draw() {
    const { boxes, flows } = this.variant, places = Object.values(boxes).map(place);
    const left = Math.min(...places.map((box) => box.x)) - 4;
    const width = Math.max(...places.map((box) => box.x + box.width)) + 4 - left;
    const height = Math.max(...places.map((box) => box.y)) + HEIGHT + 8;
    this.parts = [];
    const attributes = { viewBox: `${left} -4 ${width} ${height}`, role: "img", "aria-label": `How ${this.variant.title} works` };
    const picture = svg("svg", attributes);
    picture.style.width = `${width}px`; // as an attribute, the page's security policy would refuse it
    for (const [from, to, step] of flows) {
      const flow = link(place(boxes[from]), place(boxes[to]));
      this.parts.push([flow, step]);
      picture.append(flow);
    }
    for (const [name, description] of Object.entries(boxes)) {
      const { x, y, width } = place(description), into = flows.filter((flow) => flow[1] === name).map((flow) => flow[2]);
      const element = box(`box ${description[0]}`, x, y, width, HEIGHT, description[3]);
      this.parts.push([element, into.length ? Math.min(...into) : 1]);
      picture.append(element);
    }
    return picture;
  }

  show(step) {
    const last = this.variant.steps.length;
    this.step = Math.min(last, Math.max(1, step));
    for (const [element, first] of this.parts) {
      element.classList.toggle("later", first > this.step);
      element.classList.toggle("now", first === this.step);
    }
    part("step").textContent = `${this.step} of ${last}. ${this.variant.steps[this.step - 1]}`;
    part("back").disabled = this.step === 1;
    part("next").disabled = this.step === last;
  }

  play() {
    if (this.timer) return this.stop();
    part("play").textContent = "Pause";
    this.show(this.step === this.variant.steps.length ? 1 : this.step);
    this.timer = setInterval(() => {
      if (this.step === this.variant.steps.length) this.stop();
      else this.show(this.step + 1);
    }, 2600);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = undefined;
    part("play").textContent = "Play";
  }

  async update() {
    this.server = await this.refresh().catch(() => this.server);
    this.measure();
  }

  /** What this server measured, or how to load the variant. */
  measure() {
    const lane = this.lane(this.variant), area = part("measured");
    if (this.variant.name === "plain") {
      area.replaceChildren("One token per pass, always.");
    } else if (!lane) {
      const command = this.server.commands[this.variant.name];
      area.replaceChildren(html("p", {}, "Not loaded on this server. To load it:"), ...command.map((line) => html("p", {}, html("code", {}, line))));
    } else if (!lane.rounds) {
      area.replaceChildren("Nothing yet. Send something on the first page.");
    } else {
      area.replaceChildren(bars(lane), html("p", { class: "quiet" },
        `${lane.tau.toFixed(2)} tokens per pass over ${lane.rounds.toLocaleString()} rounds since this server started, whatever was asked.`));
    }
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = (VARIANTS.indexOf(this.variant) + step + VARIANTS.length) % VARIANTS.length;
    this.choose(VARIANTS[index]);
    part("choices").children[index].focus();
  }
}

/** Where a box is drawn. Columns of a description run down the page, and lines across, so that it fits a phone. */
function place([, column, line, , size = 1]) {
  const width = WIDTH * (0.4 + 0.6 * size);
  return { x: line * ACROSS - width / 2, y: column * DOWN, width };
}

/** A curve from one box down to another, or across where they are side by side. */
function link(from, to) {
  const x1 = from.x + from.width / 2, x2 = to.x + to.width / 2;
  if (to.y > from.y + HEIGHT) {
    const y1 = from.y + HEIGHT, middle = (y1 + to.y) / 2;
    return svg("path", { class: "flow", d: `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${to.y}` });
  }
  const is_right = x2 > x1, y = from.y + HEIGHT / 2;
  return svg("path", { class: "flow", d: `M${is_right ? from.x + from.width : from.x} ${y}L${is_right ? to.x : to.x + to.width} ${to.y + HEIGHT / 2}` });
}

/** A bar per depth: how often a draft at that depth was right, where one was checked. */
function bars(lane) {
  const width = 300, height = 120, count = Math.max(1, lane.acceptance.length), step = width / count;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img", "aria-label": "Acceptance rate by depth" });
  lane.acceptance.forEach((rate, index) => {
    const size = rate * (height - 16), x = index * step + step * 0.15;
    picture.append(svg("rect", { class: "bar", x, y: height - size, width: step * 0.7, height: size, rx: 3 }));
    picture.append(svg("text", { x: x + step * 0.35, y: height - size - 4, "text-anchor": "middle", class: "label" }, `${Math.round(100 * rate)}%`));
    picture.append(svg("text", { x: x + step * 0.35, y: height + 15, "text-anchor": "middle", class: "label" }, `depth ${index + 1}`));
  });
  picture.append(svg("line", { class: "axis", x1: 0, y1: height, x2: width, y2: height }));
  return picture;
}

// 续写: a prompt, several continuations side by side, every character shaded by its probability.
import { aborted, events, fetchJson } from "./api.js";
import { hide, isOpen, isPinned, setControl, show } from "./alternatives.js";
import { decode, Joiner, surprise } from "./cells.js";
import { button, composing, copy, el, failure, growing, percent } from "./dom.js";
import { sampling } from "./settings.js";
import { say, visible } from "./words.js";

const CONSIDERED = 8; // alternatives asked for at each place
const panel = document.getElementById("continue");
const form = panel.querySelector("form"), area = panel.querySelector("#prompt"), shelf = panel.querySelector(".columns");
const write = panel.querySelector("[data-do=write]"), stop = panel.querySelector("[data-do=stop]");
const fit = growing(area);

let model = null, block = Infinity, columns = [];

const busy = () => {
  const is = columns.some((column) => column.running);
  write.hidden = is;
  stop.hidden = !is;
};

/** One continuation: its cells, how it came about, and what can be done with it. */
class Column {
  constructor(number, prompt) {
    Object.assign(this, { prompt, cells: [], before: [], running: null, reason: null, joiner: new Joiner(), at: 0 });
    this.text = el("div", { class: "text", role: "group", label: ["continue.column", { n: number }] });
    this.note = el("span", { class: "soft", "data-note": true });
    this.undo = button("continue.undo", () => this.back(), { disabled: true });
    this.more = button("continue.more", () => this.goOn(), { disabled: true });
    this.wrong = el("div");
    this.node = el("article", { class: "column sheet" }, el("header", { class: "bar" },
      el("h2", { t: ["continue.column", { n: number }] }), el("span", { class: "space" }), this.note), this.text, this.wrong,
    el("div", { class: "bar" }, button("copy", () => copy(this.whole())), this.undo, el("span", { class: "space" }), this.more));
    this.text.append(el("span", { class: "prompt", text: prompt }));
    for (const event of ["click", "keydown", "focusin", "focusout", "pointerover", "pointerleave"]) this.text.addEventListener(event, this);
  }

  whole() { return this.prompt + this.cells.map((cell) => cell.text).join(""); }

  nodeAt(at) { return this.text.children[at + 1]; }

  /** A cell more, at the end. */
  push(cell) {
    const at = this.cells.push(cell) - 1;
    const p = percent(Math.exp(cell.logprob));
    const node = el("span", { class: "cell", role: "button", tabindex: at === this.at ? 0 : -1 });
    node.textContent = cell.text === "\n" ? "↵\n" : visible(cell.text);
    node.classList.toggle("chosen", Boolean(cell.chosen));
    if (cell.text === "\n") node.classList.add("newline");
    node.setAttribute("aria-label", `${cell.text === "\n" ? "↵" : visible(cell.text)} ${p}`);
    node.style.setProperty("--s", surprise(cell.logprob).toFixed(3));
    this.text.append(node);
  }

  /** Take a token of the stream. */
  take({ token, bytes, logprob, top }) {
    const cell = this.joiner.add(token, bytes, logprob, top);
    if (cell) this.push(cell);
  }

  begin(controller) {
    this.running = controller;
    this.reason = null;
    this.note.textContent = "";
    this.wrong.replaceChildren();
    this.node.classList.add("writing");
    this.more.disabled = true;
    busy();
  }

  end(error) {
    this.joiner = new Joiner(); // half a character at the very end is written again
    this.running = null;
    this.node.classList.remove("writing");
    this.more.disabled = false;
    if (error && !aborted(error)) this.wrong.replaceChildren(failure(error, () => this.goOn()));
    else if (error) say(this.note, "chat.stopped");
    else if (this.reason === "stop") say(this.note, "continue.ended");
    else say(this.note, "chat.length");
    busy();
  }

  /** Take nothing more from the stream at hand, which ends once no column needs it. */
  leave() {
    const controller = this.running;
    this.running = null;
    if (controller && !columns.some((column) => column.running === controller)) controller.abort();
  }

  /** Write on behind what is there. */
  async goOn() {
    const controller = new AbortController();
    this.leave();
    this.begin(controller);
    let wrong = null;
    try {
      await stream(this.whole(), 1, controller.signal, [this]);
    } catch (error) {
      wrong = error;
    }
    if (this.running === controller) this.end(wrong);
  }

  /** Put another token in place of the cell at `at`, and go on from there. */
  choose(at, { bytes, logprob }) {
    this.leave();
    this.before.push(this.cells);
    this.undo.disabled = false;
    const { alternatives } = this.cells[at].pieces[0];
    this.draw([...this.cells.slice(0, at), { text: decode(bytes), logprob, chosen: true, pieces: [{ logprob, alternatives }] }]);
    this.focus(at);
    hide();
    this.goOn();
  }

  back() {
    this.leave();
    this.node.classList.remove("writing");
    this.draw(this.before.pop());
    this.undo.disabled = !this.before.length;
    this.more.disabled = false;
    this.note.textContent = "";
    busy();
  }

  draw(cells) {
    hide();
    this.joiner = new Joiner();
    this.cells = [];
    this.at = 0;
    this.text.replaceChildren(this.text.firstChild);
    for (const cell of cells) this.push(cell);
  }

  focus(at) {
    this.nodeAt(this.at)?.setAttribute("tabindex", -1);
    this.at = Math.max(0, Math.min(at, this.cells.length - 1));
    const node = this.nodeAt(this.at);
    node?.setAttribute("tabindex", 0);
    node?.focus({ preventScroll: false });
  }

  open(at, pin) {
    show(this.nodeAt(at), this.cells[at], (other) => this.choose(at, other), pin);
  }

  handleEvent(event) {
    if (event.type === "pointerleave" || event.type === "focusout") return isPinned() || hide();
    const node = event.target.closest?.(".cell"), at = node ? [...this.text.children].indexOf(node) - 1 : -1;
    if (at < 0) return undefined;
    if (event.type === "pointerover") return event.pointerType === "mouse" && this.open(at, false);
    if (event.type === "focusin") return this.open(at, false);
    if (event.type === "click") {
      this.focus(at);
      return this.open(at, true);
    }
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: this.cells.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      this.focus(to);
    } else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
      event.preventDefault();
      this.open(at, true);
    } else if (event.key === "Escape" && isOpen()) {
      event.preventDefault();
      hide();
    }
    return undefined;
  }
}

/** The prompt as the model can see it: of a longer text, the last tokens. Says so in the columns. */
async function seen(text, signal, targets) {
  if (text.length * 4 < block) return text; // a character is four bytes at most, and a byte one token
  const { tokens } = await fetchJson("tokenize", { body: { model, prompt: text }, signal });
  if (tokens.length <= block) return text;
  for (const column of targets) say(column.note, "continue.cut", { n: block });
  return tokens.slice(-block);
}

/** Ask for `n` continuations of a text; each token goes to the column of its choice. */
async function stream(text, n, signal, targets) {
  const prompt = await seen(text, signal, targets);
  const { max_tokens: _, ...drawn } = sampling();
  const body = { model, prompt, n, stream: true, logprobs: CONSIDERED, ...drawn, max_tokens: Number(form.elements.tokens.value) };
  for await (const chunk of events("v1/completions", { body, signal })) {
    for (const choice of chunk.choices ?? []) {
      const column = targets[choice.index];
      if (column?.running?.signal !== signal) continue; // it goes on from elsewhere
      const { tokens = [], token_logprobs: logprobs, top_logprobs: top, token_bytes: bytes } = choice.logprobs ?? {};
      tokens.forEach((token, i) => column.take({ token, bytes: bytes?.[i], logprob: logprobs[i], top: top?.[i] }));
      column.reason = choice.finish_reason;
      if (column.reason) column.end();
    }
  }
}

/** Begin anew: all columns in one request, which share the prompt's computation. */
async function writeAll() {
  for (const column of columns) column.leave();
  const n = Number(form.elements.n.value), prompt = area.value, controller = new AbortController();
  columns = Array.from({ length: n }, (_, i) => new Column(i + 1, prompt));
  shelf.replaceChildren(...columns.map((column) => column.node));
  panel.querySelector(".legend").hidden = false;
  for (const column of columns) column.begin(controller);
  let wrong = null;
  try {
    await stream(prompt, n, controller.signal, columns);
  } catch (error) {
    wrong = error;
  }
  for (const column of columns.filter((one) => one.running === controller)) column.end(wrong);
}

export function startContinue(info) {
  model = info.name;
  block = info.block_size ?? block;
  setControl(info.control_tokens ?? []);
  fit();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value) writeAll();
    else area.focus();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !composing(event)) form.requestSubmit();
  });
  stop.addEventListener("click", () => {
    for (const column of columns) column.running?.abort();
    area.focus();
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !stop.hidden) stop.click();
  });
}

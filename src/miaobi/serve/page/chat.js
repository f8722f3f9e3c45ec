// 对话: turns that stream, stop, are tried again, and are edited to go on from there.
import { aborted, events } from "./api.js";
import { button, composing, copy, download, el, failure, growing, toast } from "./dom.js";
import { sampling, systemPrompt } from "./settings.js";
import { say, visible } from "./words.js";

const STORE = "miaobi.chat";
const panel = document.getElementById("chat");
const log = panel.querySelector(".turns"), form = panel.querySelector(".composer"), area = form.querySelector("textarea");
const send = panel.querySelector("[data-do=send]"), stop = panel.querySelector("[data-do=stop]");

let turns = []; // {role, content}, as the API has them
let running = null; // the AbortController of the reply that streams
let model = null;
const fit = growing(area);

function keep() {
  try { sessionStorage.setItem(STORE, JSON.stringify(turns)); } catch { /* until the page is left */ }
}

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

function busy(is) {
  send.hidden = is;
  stop.hidden = !is;
  log.setAttribute("aria-busy", is);
}

/** One turn as the log shows it: who, the words, and what can be done with them. */
function turn(at) {
  const { role, content } = turns[at], mine = role === "user";
  const words = el("div", { class: "words", text: content });
  const actions = el("div", { class: "actions" }, button("copy", () => copy(turns[at].content)),
    mine ? button("chat.edit", () => edit(at), { label: "chat.edit.label" }) : button("chat.retry", () => retry(at)),
    el("span", { class: "soft", "data-note": true }));
  return el("article", { class: `turn ${role}` }, el("h2", { class: "unseen", t: mine ? "chat.you" : "chat.model" }), words, actions);
}

function draw() {
  log.replaceChildren(...turns.map((_, at) => turn(at)));
  if (!turns.length) log.append(el("p", { class: "soft hello", t: "chat.hello" }));
  toEnd();
}

/** Forget what comes after the first `count` turns. */
function cut(count) {
  running?.abort();
  turns = turns.slice(0, count);
  keep();
  draw();
}

function retry(at) {
  cut(at);
  reply();
}

/** The user's turn becomes a text to edit; what followed it is forgotten once it is said again. */
function edit(at) {
  const node = log.children[at];
  const text = el("textarea", { rows: 2, maxlength: 200000, label: "chat.edited" });
  text.value = turns[at].content;
  const resize = growing(text);
  const goOn = () => {
    if (!text.value.trim()) return;
    cut(at);
    speak(text.value);
  };
  const back = () => { node.replaceWith(turn(at)); log.children[at].querySelectorAll("button")[1].focus(); };
  text.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); goOn(); }
    if (event.key === "Escape") back();
  });
  node.replaceChildren(text, el("div", { class: "actions open" }, button("cancel", back),
    button("chat.goon", goOn, { class: "main small" })));
  resize();
  text.focus();
}

function speak(content) {
  turns.push({ role: "user", content });
  keep();
  draw();
  return reply();
}

/** Ask for the next turn and write it down as it comes. */
async function reply() {
  const mine = new AbortController(), before = [...turns], started = performance.now();
  running?.abort();
  running = mine;
  busy(true);
  const answer = { role: "assistant", content: "" };
  turns.push(answer);
  const node = turn(turns.length - 1), words = node.querySelector(".words"), note = node.querySelector("[data-note]");
  node.classList.add("writing");
  log.append(node);
  toEnd();
  const system = systemPrompt();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...before];
  let reason = null, usage = null, left = null, first = null, wrong = null;
  try {
    const body = { model, messages, truncation: "auto", stream: true, stream_options: { include_usage: true }, ...sampling() };
    const opened = (response) => { left = response.headers.get("x-miaobi-note"); };
    for await (const chunk of events("v1/chat/completions", { body, signal: mine.signal, opened })) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (!choice?.delta?.content) continue;
      first ??= performance.now();
      const stay = atEnd();
      answer.content += choice.delta.content;
      words.textContent = visible(answer.content);
      if (stay) toEnd();
    }
  } catch (error) {
    if (!aborted(error)) wrong = error;
    reason = "stopped";
  }
  node.classList.remove("writing");
  if (running === mine) {
    running = null;
    busy(false);
  }
  if (!turns.includes(answer)) return; // the conversation went on without it
  if (wrong) {
    if (!answer.content) { turns.pop(); node.remove(); }
    log.append(failure(wrong, () => { if (answer.content) cut(before.length); reply(); }));
    toEnd();
  } else if (!answer.content && reason === "stopped") {
    turns.pop();
    node.remove();
  } else if (!answer.content) say(words, "chat.nothing");
  else if (reason === "stopped") say(note, "chat.stopped");
  else if (reason === "length") say(note, "chat.length");
  else if (usage?.completion_tokens && first) {
    const speed = usage.completion_tokens / Math.max(0.001, (performance.now() - started) / 1000);
    say(note, "chat.figures", { tokens: usage.completion_tokens, speed: speed.toFixed(speed < 10 ? 1 : 0) });
  }
  if (left) note.append(el("span", { t: ["error.server", { what: left }] }));
  keep();
}

export function startChat(info) {
  model = info.name;
  try { turns = JSON.parse(sessionStorage.getItem(STORE)) ?? []; } catch { turns = []; }
  draw();
  fit();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = area.value;
    if (running || !text.trim()) return;
    area.value = "";
    fit();
    speak(text);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  const halt = () => { running?.abort(); area.focus(); };
  stop.addEventListener("click", halt);
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape" && running && !composing(event)) halt(); });
  panel.querySelector("[data-do=new]").addEventListener("click", () => {
    cut(0);
    area.focus();
  });
  panel.querySelector("[data-do=export]").addEventListener("click", () => { // a line that `miaobi prepare` reads
    if (!turns.length) return toast("chat.hello");
    const system = systemPrompt();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
    return download("miaobi-chat.jsonl", `${JSON.stringify({ messages })}\n`, "application/jsonl");
  });
}

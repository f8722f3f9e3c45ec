// What else the model considered at one place: a small window beside the character, by pointer, finger or keyboard.
import { el, percent } from "./dom.js";
import { decode, whole } from "./cells.js";
import { visible } from "./words.js";

const box = el("div", { class: "alternatives", role: "dialog", label: "continue.instead", hidden: true });
document.body.append(box);
let control = new Set(); // names of tokens that stand for no text, as of the end
let owner = null, pinned = false, choose = null;

/** Beside the cell, below where there is room, and always inside the window. */
function place(cell) {
  const spot = cell.getClientRects()[0] ?? cell.getBoundingClientRect(), gap = 6;
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = spot.bottom + gap + height < innerHeight;
  box.style.left = `${Math.max(8, Math.min(spot.left - 12, document.documentElement.clientWidth - width - 8))}px`;
  box.style.top = `${Math.max(8, below ? spot.bottom + gap : spot.top - gap - height)}px`;
}

const name = (text) => (text === "\n" ? "↵" : text === " " ? "␣" : visible(text).replaceAll("\n", "↵"));

function row(alternative, written) {
  const { bytes, logprob, name: token } = alternative, p = Math.exp(logprob), text = decode(bytes);
  const bar = el("span", { class: "bar-fill", "aria-hidden": "true" });
  bar.style.setProperty("--p", p);
  const parts = [bar, el("span", { class: "token", text: name(text) }), el("span", { class: "soft", text: percent(p) })];
  const isControl = control.has(token);
  if (isControl || !bytes.length || !whole(bytes)) { // no text to go on from
    parts[1] = el("span", { class: "token soft", ...(isControl ? { text: token } : { t: "continue.half" }) });
    return el("li", {}, el("button", { type: "button", disabled: true, title: token }, parts));
  }
  if (text === written) return el("li", {}, el("button", { type: "button", disabled: true, class: "now" }, parts));
  return el("li", {}, el("button", { type: "button", on: { click: () => { const done = choose; hide(); done(alternative); } } }, parts));
}

/** Show what could stand in place of `cell`; `chosen` is called with the one that is picked. pin: stay until closed. */
export function show(node, cell, chosen, pin) {
  if (pinned && !pin) return;
  owner?.classList.remove("open");
  owner = node;
  choose = chosen;
  pinned = pin;
  node.classList.add("open");
  const { pieces, text, logprob } = cell, first = pieces[0].alternatives;
  const rest = 1 - first.reduce((sum, one) => sum + Math.exp(one.logprob), 0);
  box.replaceChildren(
    el("p", { class: "head" }, el("strong", { text: name(text) }), " ",
      el("span", { class: "soft", t: ["continue.chance", { p: percent(Math.exp(logprob), 1) }] })),
    pieces.length > 1 ? el("p", { class: "soft", t: ["continue.pieces", { n: pieces.length }] }) : "",
    el("ul", {}, first.map((one) => row(one, pieces.length > 1 ? null : text))),
    first.length && rest > 0.005 ? el("p", { class: "soft rest" }, el("span", { t: "continue.other" }), ` ${percent(rest)}`) : "");
  box.hidden = false;
  box.classList.toggle("pinned", pin);
  place(node);
  if (pin) box.querySelector("button:not(:disabled)")?.focus({ preventScroll: true });
}

export function hide() {
  owner?.classList.remove("open");
  box.hidden = true;
  pinned = false;
  owner = null;
}

export const setControl = (names) => { control = new Set(names); };
export const isPinned = () => pinned;
export const isOpen = () => !box.hidden;

box.addEventListener("keydown", (event) => {
  const buttons = [...box.querySelectorAll("button:not(:disabled)")], at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to !== undefined && buttons.length) {
    event.preventDefault();
    buttons[(to + buttons.length) % buttons.length].focus();
  } else if (event.key === "Escape" || event.key === "Tab") {
    event.preventDefault();
    const back = owner;
    hide();
    back?.focus();
  }
});
document.addEventListener("pointerdown", (event) => {
  if (!box.hidden && !box.contains(event.target) && !event.target.closest?.(".cell")) hide();
});
addEventListener("scroll", (event) => { if (!box.hidden && !box.contains(event.target)) hide(); }, { capture: true, passive: true });
document.addEventListener("tab", hide);

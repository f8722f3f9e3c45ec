// Small helpers for the page's elements. Nothing here, or anywhere on the page, parses a text as HTML.
import { say, visible } from "./words.js";

/**
 * An element. `text` is shown as it is, controls made visible; `t` is a key of words.js, or [key, values];
 * `label` names the element for those who do not see it; `on` holds listeners; the rest are attributes.
 */
export function el(tag, { text, t: words, label, on = {}, ...attributes } = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  if (text != null) node.textContent = visible(text);
  if (words) say(node, ...[words].flat());
  if (label) {
    const [key, values] = [label].flat();
    say(node, key, values, "label");
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export const button = (words, click, attributes = {}) =>
  el("button", { type: "button", class: "quiet", t: words, on: { click }, ...attributes });

/** A short message at the foot of the page; it goes by itself. */
export function toast(key, values) {
  const note = el("p", { class: "toast", t: [key, values] });
  document.querySelector(".toasts").append(note);
  setTimeout(() => note.remove(), 4000);
}

/** What went wrong, in words, with a button that tries again where there is something to try. */
export function failure(error, again) {
  const node = el("div", { class: "error", role: "alert" }, el("span", { t: [error.key ?? "error.page", error.values ?? { what: error.message }] }));
  if (again) node.append(" ", button("again", () => { node.remove(); again(); }));
  return node;
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(visible(text));
  } catch { // not a secure context: plain http on another machine
    const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = visible(text);
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    const before = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    if (!done) return toast("copy.failed");
  }
  return toast("copied");
}

export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** A command to type, with a button that copies it. */
export const command = (line) => el("p", { class: "command" }, el("code", { text: line }),
  button("copy", () => copy(line), { label: ["copy.command", { line }] }));

/** A textarea as high as its text, up to what its CSS allows. */
export function growing(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  return fit;
}

/** Whether a key press belongs to an input method that is composing, as for pinyin. */
export const composing = (event) => event.isComposing || event.keyCode === 229;

export const percent = (p, digits = 0) => `${(100 * p).toFixed(p > 0 && p < 0.1 && !digits ? 1 : digits)}%`;

const short = (n, unit) => `${n >= 100 ? Math.round(n) : Number(n.toFixed(n >= 10 ? 1 : 2))}${unit}`;

/** 12,900,000 -> 12.9M */
export const compact = (n) => (n >= 1e9 ? short(n / 1e9, "B") : n >= 1e6 ? short(n / 1e6, "M") : n >= 1e4 ? short(n / 1e3, "k") : grouped(n));

export const grouped = (n) => Number(n).toLocaleString("en-US", { maximumFractionDigits: 2 });

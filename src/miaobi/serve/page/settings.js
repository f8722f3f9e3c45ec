// How text is sampled, for Chat and Continue, and what the model is.
import { button, compact, el, grouped } from "./dom.js";

const STORE = "miaobi.sampling";
const FIELDS = {
  max_tokens: { min: 1, max: 4096, step: 1 },
  temperature: { min: 0, max: 2, step: 0.05, slide: true },
  top_p: { min: 0.01, max: 1, step: 0.01, slide: true },
  top_k: { min: 0, max: 100000, step: 1 },
  min_p: { min: 0, max: 0.99, step: 0.01, slide: true },
  repetition_penalty: { min: 1, max: 2, step: 0.05, slide: true },
  seed: { min: 0, max: 2 ** 48, step: 1 },
};
const OURS = { max_tokens: 200, temperature: 0.8, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1.2, seed: null, system: "" };

let defaults = { ...OURS }, chosen = {};

/** The sampling fields of a request. */
export function sampling() {
  const { system: _, ...values } = { ...defaults, ...chosen };
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value != null));
}

export const systemPrompt = () => ({ ...defaults, ...chosen }).system.trim();

function keep() {
  try { sessionStorage.setItem(STORE, JSON.stringify(chosen)); } catch { /* until the page is left */ }
}

function field(name, { slide, ...range }) {
  const value = { ...defaults, ...chosen }[name];
  const number = el("input", { type: "number", id: `set-${name}`, "aria-describedby": `why-${name}`, ...range });
  const slider = slide && el("input", { type: "range", ...range, "aria-hidden": "true", tabindex: -1 });
  number.value = value ?? "";
  if (slider) slider.value = value;
  const take = (text) => {
    if (text === "") { // nothing chosen: the default, which for a seed is none
      delete chosen[name];
    } else if (number.checkValidity()) {
      chosen[name] = Number(text);
    }
    keep();
  };
  number.addEventListener("input", () => { take(number.value); if (slider && number.value !== "") slider.value = number.value; });
  number.addEventListener("blur", () => { number.value = { ...defaults, ...chosen }[name] ?? ""; });
  slider?.addEventListener("input", () => { number.value = slider.value; take(slider.value); });
  return el("div", { class: "setting" }, el("label", { for: `set-${name}`, t: `set.${name}` }), number, slider,
    el("p", { class: "soft", id: `why-${name}`, t: `set.${name}.why` }));
}

function fill(dialog) {
  const system = el("textarea", { id: "set-system", rows: 2, "aria-describedby": "why-system" });
  system.value = systemPrompt();
  system.addEventListener("input", () => { chosen.system = system.value; keep(); });
  const close = () => dialog.close();
  dialog.replaceChildren(
    el("div", { class: "bar" }, el("h2", { id: "settings-title", t: "settings" }), el("span", { class: "space" }),
      button("set.reset", () => { chosen = {}; keep(); fill(dialog); dialog.querySelector("button").focus(); }), button("close", close)),
    el("p", { class: "soft", t: "set.note" }),
    ...Object.entries(FIELDS).map(([name, range]) => field(name, range)),
    el("div", { class: "setting" }, el("label", { for: "set-system", t: "set.system" }), system,
      el("p", { class: "soft", id: "why-system", t: "set.system.why" })));
}

export function openSettings() {
  const dialog = document.getElementById("settings");
  fill(dialog);
  dialog.showModal();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); }; // beside it
}

function fillCard(model, version) {
  const { parameters, family, block_size: block, vocab_size: vocabulary, step, card } = model;
  const rows = {
    "card.parameters": parameters && { text: compact(parameters) },
    "card.family": family && { text: family },
    "card.block": block && { t: ["card.tokens", { n: grouped(block) }] },
    "card.vocabulary": vocabulary && { text: grouped(vocabulary) },
    "card.step": step != null && { text: grouped(step) },
    "card.version": version && { text: version },
  };
  const known = Object.entries(rows).filter(([, value]) => value);
  document.querySelector("[data-card]").replaceChildren(
    el("p", { class: "name", text: model.name }),
    el("dl", {}, ...known.map(([key, value]) => el("div", {}, el("dt", { t: key }), el("dd", value)))),
    ...(card ? [el("pre", { class: "text", tabindex: 0, role: "region", label: "card.text", text: card })] : []));
}

/** What the model's makers recommend stands for our defaults; the card beside the chat is filled. */
export function prepareSettings(model, version) {
  try { chosen = JSON.parse(sessionStorage.getItem(STORE)) ?? {}; } catch { chosen = {}; }
  if (!model) return;
  for (const name of Object.keys(FIELDS)) {
    const value = model.sampling?.[name] ?? (name === "max_tokens" ? model.sampling?.max_new_tokens : null);
    if (value != null) defaults[name] = value;
  }
  fillCard(model, version);
  const details = document.querySelector(".card details"), wide = matchMedia("(min-width: 64rem)");
  const fit = () => { details.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();
}

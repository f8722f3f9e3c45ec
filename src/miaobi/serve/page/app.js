// The page as a whole: tabs, language, theme, and what the server has.
import { fetchJson } from "./api.js";
import { command, button, el, failure } from "./dom.js";
import { say, translate } from "./words.js";
import { startChat } from "./chat.js";
import { startClassify } from "./classify.js";
import { startContinue } from "./continue.js";
import { startRuns } from "./runs.js";
import { openSettings, prepareSettings } from "./settings.js";

const TABS = ["chat", "continue", "classify", "runs"];
const root = document.documentElement;
const tab = (name) => document.getElementById(`tab-${name}`);
const remember = (name, value) => { try { localStorage.setItem(`miaobi.${name}`, value); } catch { /* for this visit only */ } };

/** Show one tab; the others stay as they are, streaming or not. */
function show(name, focus = false) {
  for (const other of TABS) {
    const chosen = other === name;
    tab(other).setAttribute("aria-selected", chosen);
    tab(other).tabIndex = chosen ? 0 : -1;
    document.getElementById(other).hidden = !chosen;
  }
  if (focus) tab(name).focus();
  root.dataset.tab = name;
  history.replaceState(null, "", `#/${name}`); // no element's id: Tab begins at the top
  document.dispatchEvent(new CustomEvent("tab", { detail: name }));
}

/** The tab that the address names, if it is one. */
const asked = () => TABS.find((name) => location.hash === `#/${name}`);

function wireTabs() {
  for (const name of TABS) tab(name).addEventListener("click", () => show(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = TABS.indexOf(root.dataset.tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(TABS[(to + TABS.length) % TABS.length], true);
  });
  addEventListener("hashchange", () => { if (asked()) show(asked()); });
  document.querySelector(".skip").addEventListener("click", (event) => { // the address keeps the tab's name
    event.preventDefault();
    document.getElementById("main").focus();
  });
}

function wireLooks() {
  document.getElementById("language").addEventListener("click", () => {
    root.lang = root.lang === "en" ? "zh-CN" : "en";
    remember("language", root.lang === "en" ? "en" : "zh");
    translate();
  });
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember("theme", root.dataset.theme);
  });
  for (const node of document.querySelectorAll("[data-settings]")) node.addEventListener("click", openSettings);
}

/** What a tab shows where the server lacks what it needs: what is missing, and the command that brings it. */
function empty(name, key, lines, more) {
  const panel = document.getElementById(name);
  panel.querySelector("[data-job]").hidden = true;
  panel.querySelector("[data-empty]").replaceChildren(
    el("h2", { t: key }), el("p", { class: "soft", t: more ?? `${key}.how` }), ...lines.map(command));
}

/** What the server has; waits while its model loads. */
async function info() {
  const notice = document.getElementById("server");
  for (;;) {
    try {
      const found = await fetchJson("api/info");
      notice.hidden = true;
      return found;
    } catch (error) {
      notice.hidden = false;
      if (error.key === "error.loading") {
        say(notice, "server.loading");
        await new Promise((resolve) => { setTimeout(resolve, 700); });
      } else {
        await new Promise((resolve) => { notice.replaceChildren(failure(error, resolve)); });
      }
    }
  }
}

async function start() {
  wireTabs();
  wireLooks();
  translate();
  const wanted = asked();
  show(wanted ?? "chat");
  document.getElementById("broken").remove();
  root.classList.remove("starting");
  const found = await info();
  const { model, classifier, runs } = found;
  prepareSettings(found.chat_model ?? model, found.version); // the card stands beside the chat
  if (model) startContinue(model);
  else empty("continue", "empty.model", ["miaobi serve MODEL"]);
  if (model?.chat) startChat(model);
  else if (model) {
    empty("chat", "empty.chat", ["miaobi serve CHAT_MODEL"]);
    document.querySelector("#chat [data-empty]").append(button("empty.continue", () => show("continue", true), { class: "main" }));
  } else empty("chat", "empty.model", ["miaobi serve MODEL"]);
  if (classifier) startClassify(classifier);
  else empty("classify", "empty.classify", ["miaobi classify train --base_model=MODEL --data=reviews.csv --out_dir=DIR", "miaobi serve MODEL --classifier=DIR"]);
  if (runs) startRuns(() => empty("runs", "empty.runs", ["miaobi train CONFIG --out_dir=FOLDER/NAME"], "empty.runs.none"));
  else empty("runs", "empty.runs", ["miaobi serve MODEL --runs=FOLDER"]);
  if (!wanted) {
    const best = model?.chat ? "chat" : model ? "continue" : classifier ? "classify" : runs ? "runs" : "chat";
    if (root.dataset.tab === "chat") show(best);
  }
  root.classList.add("ready");
  performance.mark("usable");
}

start();

// 训练: curves of several runs over each other, and their samples, live while they train.
import { aborted, events, fetchJson } from "./api.js";
import { Chart, figure } from "./chart.js";
import { el, failure, grouped } from "./dom.js";
import { say } from "./words.js";

const SLOTS = 8, LIST_EVERY = 4000; // colours; milliseconds
const STREAMS = 3; // a browser opens six connections to a server, and a chat needs one
const panel = document.getElementById("runs");
const list = panel.querySelector("[data-runs]"), none = panel.querySelector("[data-none]"), samples = panel.querySelector(".samples");
const picker = samples.querySelector("select"), told = samples.querySelector("ol");
const chosen = new Map(); // name -> {name, slot, rows, samples, live}
let whenNone = null, known = [], timer = null, began = false, drawing = false;

const column = (name) => (run) => run.rows.filter((row) => Number.isFinite(row[name])).map((row) => [row.step, row[name]]);

/** Training loss in the unit of the validation curve: their ratio is one of the text, the same at every step. */
function trainBits(run) {
  const both = run.rows.find((row) => row.val_loss && row.val_bits_per_char);
  return both ? column("train_loss")(run).map(([step, loss]) => [step, (loss * both.val_bits_per_char) / both.val_loss]) : [];
}

const charts = [
  new Chart("runs.bits", { why: "runs.bits.why", from: column("val_bits_per_char"), faint: trainBits }),
  new Chart("runs.loss", { from: (run) => (run.rows.some((row) => row.val_bits_per_char) ? [] : column("dev_loss")(run)) }),
  new Chart("runs.accuracy", { from: column("dev_accuracy") }),
  new Chart("runs.rate", { from: column("learning_rate") }),
  new Chart("runs.speed", { from: column("tokens_per_second") }),
];
panel.querySelector("[data-charts]").append(...charts.map((chart) => chart.node));

/** Draw soon, once for all that changes meanwhile. */
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    none.hidden = chosen.size > 0;
    for (const chart of charts) chart.show([...chosen.values()]);
    drawSamples();
  });
}

function drawSamples() {
  const runs = [...chosen.values()].filter((run) => run.samples.length);
  samples.hidden = !chosen.size;
  const before = picker.value, names = runs.map((run) => run.name);
  if (names.join("\0") !== [...picker.options].map((option) => option.value).join("\0")) {
    picker.replaceChildren(...names.map((name) => el("option", { value: name, text: name })));
    if (names.includes(before)) picker.value = before;
  }
  picker.parentElement.hidden = names.length < 2;
  const run = chosen.get(picker.value), count = run?.samples.length ?? 0;
  if (told.dataset.of === picker.value && Number(told.dataset.count) === count && count) return;
  told.dataset.of = picker.value;
  told.dataset.count = count;
  const rows = (run?.samples ?? []).map(({ step, text }) => el("li", {}, el("h3", { t: ["runs.step", { step: grouped(step) }] }), el("p", { class: "text", text })));
  told.replaceChildren(...(rows.length ? rows.reverse() : [el("li", { class: "soft", t: "runs.nosamples" })]));
}

const address = (name) => `api/runs/${encodeURIComponent(name)}`;

async function load(run) {
  const found = await fetchJson(address(run.name));
  run.rows = found.metrics;
  run.samples = found.samples;
}

/** Follow a run while it trains: all that there is once the stream stands, then what is new in it. */
async function follow(run) {
  const controller = new AbortController();
  run.live = controller;
  while (!controller.signal.aborted) {
    let seen = new Set();
    const opened = async () => {
      await load(run);
      seen = new Set(run.rows.slice(-200).map((row) => JSON.stringify(row)));
      draw();
    };
    try {
      for await (const row of events(`${address(run.name)}/stream`, { signal: controller.signal, opened })) {
        if (!seen.has(JSON.stringify(row))) run.rows.push(row);
        if ("val_loss" in row) setTimeout(() => news(run), 1500); // its sample is written a little later
        draw();
      }
    } catch (error) {
      if (aborted(error)) break;
    }
    await new Promise((resolve) => { setTimeout(resolve, 3000); });
  }
  if (run.live === controller) run.live = null;
}

/** The samples of a run anew. */
async function news(run) {
  try {
    run.samples = (await fetchJson(`${address(run.name)}?after=${run.rows.at(-1)?.step ?? -1}`)).samples;
    draw();
  } catch { /* the next evaluation brings them */ }
}

async function choose(name) {
  const used = new Set([...chosen.values()].map((run) => run.slot));
  const slot = Array.from({ length: SLOTS }, (_, i) => i).find((i) => !used.has(i)) ?? 0;
  const run = { name, slot, rows: [], samples: [], live: null };
  chosen.set(name, run);
  try {
    await load(run);
  } catch (error) {
    chosen.delete(name);
    none.after(failure(error, () => choose(name)));
  }
  if (chosen.has(name)) keepUp(run);
  drawList();
  draw();
}

function forget(name) {
  chosen.get(name)?.live?.abort();
  chosen.delete(name);
  drawList();
  draw();
}

const WORDS = { training: "runs.training", finished: "runs.finished", stopped: "runs.stopped" };

function item(name) {
  const box = el("input", { type: "checkbox" });
  box.addEventListener("change", () => (box.checked ? choose(name) : forget(name)));
  const node = el("li", {}, el("label", {}, box, el("span", { class: "swatch", "aria-hidden": "true" }),
    el("span", { class: "about" }, el("span", { class: "name", text: name }), el("span", { class: "soft" }, el("span", { class: "state" }), " ", el("span", { class: "steps" }), " ", el("span", { class: "best" })))));
  node.dataset.run = name;
  return node;
}

/** The list as it is now; a run keeps its element, so that focus and pointer stay where they are. */
function drawList() {
  const there = new Map([...list.children].map((node) => [node.dataset.run, node]));
  const nodes = known.map((run) => {
    const node = there.get(run.name) ?? item(run.name), mine = chosen.get(run.name);
    node.querySelector("input").checked = Boolean(mine);
    node.querySelector(".swatch").setAttribute("class", mine ? `swatch s${mine.slot}` : "swatch");
    const state = node.querySelector(".state");
    state.className = `state ${WORDS[run.state] ? run.state : ""}`;
    if (WORDS[run.state]) say(state, WORDS[run.state]);
    else state.textContent = run.state ?? "";
    if (run.step != null) say(node.querySelector(".steps"), "runs.steps", { step: grouped(run.step), max: run.max_iters ? grouped(run.max_iters) : "?" });
    if (run.best != null) say(node.querySelector(".best"), "runs.best", { best: figure(run.best) });
    return node;
  });
  if (nodes.some((node, i) => list.children[i] !== node) || nodes.length !== list.children.length) list.replaceChildren(...nodes);
}

/** Follow a run that trains, up to STREAMS at once; others are read anew. One that has ended is read once more. */
function keepUp(run) {
  const trains = known.find(({ name }) => name === run.name)?.state === "training";
  const followed = [...chosen.values()].filter((one) => one.live).length;
  if (run.live && trains) return;
  if (trains && followed < STREAMS) follow(run);
  else if (trains || run.live) {
    run.live?.abort();
    run.live = null;
    load(run).then(draw, () => {}); // the next look may succeed
  }
}

async function refresh() {
  clearTimeout(timer);
  try {
    known = await fetchJson("api/runs");
  } catch (error) {
    if (!began) return list.replaceChildren(failure(error, refresh));
    known = known.map((run) => run); // the next look may succeed
  }
  if (!known.length && !began) {
    whenNone();
  } else if (known.length) {
    panel.querySelector("[data-job]").hidden = false;
    panel.querySelector("[data-empty]").replaceChildren();
    drawList();
    if (!began) {
      began = true;
      const first = known.find((run) => run.state === "training") ?? known[0];
      choose(first.name);
    }
    for (const run of chosen.values()) keepUp(run);
  }
  timer = setTimeout(refresh, LIST_EVERY);
  return undefined;
}

export function startRuns(emptyNow) {
  whenNone = emptyNow;
  picker.addEventListener("change", drawSamples);
  const look = () => {
    if (!panel.hidden && !document.hidden) return refresh();
    clearTimeout(timer);
    for (const run of chosen.values()) run.live?.abort();
    return undefined;
  };
  document.addEventListener("tab", look);
  document.addEventListener("visibilitychange", look);
  look();
}

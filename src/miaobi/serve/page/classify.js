// 分类: one text with what mattered in it, and whole files.
import { aborted, fetchJson } from "./api.js";
import { button, composing, download, el, failure, growing, grouped, percent } from "./dom.js";
import { csv, read, textColumn } from "./table.js";
import { say, visible } from "./words.js";

const BATCH = 32, LETTERS = 200_000; // rows and characters of one request, at most
const panel = document.getElementById("classify");
const form = panel.querySelector("form"), area = panel.querySelector("#judged"), verdict = panel.querySelector(".verdict");
const fileBox = panel.querySelector("[data-file]"), drop = panel.querySelector(".drop"), chooser = panel.querySelector("#table");
const fit = growing(area);

const chances = (found) => Object.entries(found.probs).sort((a, b) => b[1] - a[1]);
const signed = (x) => `${x > 0 ? "−" : "+"}${percent(Math.abs(x), 1)}`; // without it, the probability falls by x

/** A bar for each label, the likeliest first. */
const bars = (found) => el("ul", { class: "chances" }, chances(found).map(([label, p]) => {
  const fill = el("span", { class: "bar-fill", "aria-hidden": "true" });
  fill.style.setProperty("--p", p);
  return el("li", {}, fill, el("span", { class: "name", text: label }), el("span", { class: "figure", text: percent(p, 1) }));
}));

/** The text, each piece as dark as it mattered. */
function marked({ contributions, label }) {
  const most = Math.max(...contributions.map((one) => Math.abs(one.score)), 1e-9);
  return el("p", { class: "text marks" }, contributions.map(({ text, score }) => {
    const strength = Math.abs(score) / most;
    if (strength < 0.04) return el("span", { text });
    const node = el("mark", { text, class: score > 0 ? "for" : "against", tabindex: -1 });
    node.style.setProperty("--s", strength.toFixed(3));
    node.title = `${visible(label)} ${signed(score)}`;
    return node;
  }));
}

async function judge() {
  const text = area.value;
  if (!text.trim()) return area.focus();
  verdict.hidden = false;
  verdict.setAttribute("aria-busy", "true");
  form.querySelector("[type=submit]").disabled = true;
  try {
    const [found] = (await fetchJson("classify", { body: { input: text, explain: true } })).data;
    const label = found.label;
    verdict.replaceChildren(
      el("p", { class: "label" }, el("strong", { text: label }), " ", el("span", { class: "soft", text: percent(found.probs[label] ?? found.score, 1) })),
      bars(found),
      ...(found.contributions?.length ? [el("h2", { t: "classify.marks" }), marked(found),
        el("p", { class: "soft key" }, el("mark", { class: "for", t: ["classify.for", { label }] }), " ", el("mark", { class: "against", t: "classify.against" })),
        el("p", { class: "soft", t: ["classify.how", { label }] })] : []));
  } catch (error) {
    verdict.replaceChildren(failure(error, judge));
  }
  verdict.removeAttribute("aria-busy");
  form.querySelector("[type=submit]").disabled = false;
  return undefined;
}

/** What a file holds, which column is judged, and the button that begins. */
async function open(file) {
  fileBox.replaceChildren();
  let table;
  try {
    table = await read(file);
  } catch (error) {
    return fileBox.replaceChildren(failure(error));
  }
  if (!table.rows.length) return fileBox.replaceChildren(failure({ key: "file.empty" }));
  const named = el("input", { type: "checkbox", id: "named" }), column = el("select", { id: "column" });
  named.checked = table.isTable && table.rows.length > 1;
  const columns = () => {
    const header = named.checked ? table.rows[0] : table.rows[0].map((_, i) => String(i + 1));
    column.replaceChildren(...header.map((name, i) => el("option", { value: i, text: name || String(i + 1) })));
    column.value = textColumn(header, named.checked ? table.rows.slice(1) : table.rows);
  };
  const described = el("p"), sample = el("blockquote", { class: "text" });
  const show = () => { // whether it was read rightly, and is the column that was meant
    const texts = named.checked ? table.rows.slice(1) : table.rows;
    sample.textContent = visible(texts.map((row) => row[column.value] ?? "").find((text) => text.trim()) ?? "").slice(0, 80);
  };
  const describe = () => say(described, "file.read", { name: file.name, rows: grouped(table.rows.length - named.checked), encoding: table.encoding });
  named.addEventListener("change", () => { columns(); describe(); show(); });
  column.addEventListener("change", show);
  columns();
  describe();
  show();
  const start = button("file.start", () => {
    const header = named.checked ? table.rows[0] : table.rows[0].map((_, i) => `column_${i + 1}`);
    judgeFile(file.name, header, named.checked ? table.rows.slice(1) : table.rows, Number(column.value));
  }, { class: "main" });
  const options = table.isTable ? [el("label", { class: "field" }, named, " ", el("span", { t: "file.named" })),
    el("label", { class: "field" }, el("span", { t: "file.column" }), " ", column)] : [];
  fileBox.replaceChildren(described, sample, el("div", { class: "bar" }, ...options, el("span", { class: "space" }), start));
  start.focus();
  return undefined;
}

/** The rows judged batch by batch, with progress; the file with two columns more in the end. */
async function judgeFile(name, header, rows, column) {
  const controller = new AbortController(), answers = new Map(), counts = new Map();
  const full = rows.map((_, i) => i).filter((i) => rows[i][column]?.trim());
  const bar = el("progress", { max: full.length, value: 0, label: "file.title" }), told = el("p", { role: "status" });
  const stop = button("stop", () => controller.abort(), { class: "main stop" });
  const foot = el("div", { class: "bar" }, el("span", { class: "space" }), stop);
  fileBox.replaceChildren(bar, told, foot);
  stop.focus();
  let done = 0;
  const advance = () => {
    bar.value = done;
    say(told, "file.progress", { done: grouped(done), all: grouped(full.length) });
  };
  const finish = (key) => {
    const shown = [...counts].sort((a, b) => b[1] - a[1]).map(([label, n]) => `${label} ${grouped(n)}`).join(" · ");
    say(told, key, { counts: shown, done: grouped(done) });
    const width = rows.reduce((most, row) => Math.max(most, row.length), header.length); // a row may have more fields
    const padded = (row) => Array.from({ length: width }, (_, c) => row[c] ?? "");
    const labelled = rows.map((row, i) => [...padded(row), ...(answers.get(i) ?? ["", ""])]);
    const out = `${name.replace(/\.[^.]*$/, "")}-labelled.csv`;
    const save = button(["file.save", { name: out }], () => download(out, csv([[...padded(header), "predicted_label", "probability"], ...labelled]), "text/csv"), { class: "main" });
    foot.replaceChildren(...(full.length < rows.length ? [el("span", { class: "soft", t: ["file.blank", { n: grouped(rows.length - full.length) }] })] : []), el("span", { class: "space" }), save);
    save.focus();
  };
  const run = async () => {
    advance();
    try {
      while (done < full.length) {
        const batch = full.slice(done, done + BATCH);
        for (let letters = 0, i = 0; i < batch.length; i += 1) {
          letters += rows[batch[i]][column].length;
          if (letters > LETTERS && i) batch.length = i;
        }
        const { data } = await fetchJson("classify", { body: { input: batch.map((i) => rows[i][column]) }, signal: controller.signal });
        for (const found of data) {
          answers.set(batch[found.index], [found.label, (found.probs[found.label] ?? found.score).toFixed(4)]);
          counts.set(found.label, (counts.get(found.label) ?? 0) + 1);
        }
        done += batch.length;
        advance();
      }
      finish("file.done");
    } catch (error) {
      if (aborted(error)) finish("file.stopped");
      else foot.before(failure(error, run));
    }
  };
  await run();
}

export function startClassify({ labels }) {
  const known = panel.querySelector("[data-labels]");
  known.replaceChildren(...labels.map((label) => el("span", { class: "chip", text: label })));
  fit();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    judge();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  chooser.addEventListener("change", () => {
    if (chooser.files[0]) open(chooser.files[0]);
    chooser.value = ""; // the same file may be chosen again
  });
  for (const type of ["dragenter", "dragover"]) {
    panel.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  panel.addEventListener("dragleave", (event) => { if (!panel.contains(event.relatedTarget)) drop.classList.remove("over"); });
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
}

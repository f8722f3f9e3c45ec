// Curves over steps as SVG: axes, one line a run, a crosshair that reads them by pointer or keyboard.
import { compact, el } from "./dom.js";
import { say, t, visible } from "./words.js";

const HEIGHT = 220, LEFT = 52, RIGHT = 14, TOP = 12, BOTTOM = 26;

/** Round numbers from low to high, about `count` of them. */
export function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * span; i += 1) found.push(i * step);
  return found;
}

export const figure = (y) => {
  const size = Math.abs(y);
  if (size >= 1e4) return compact(y);
  if (size >= 100) return y.toFixed(0);
  if (size && size < 0.001) return y.toExponential(1);
  return String(Number(y.toPrecision(size >= 1 ? 4 : 3)));
};

/** At most `most` points, each the mean of its neighbours: what a line of that many pixels can show. */
export function thinned(points, most) {
  if (points.length <= most) return points;
  const size = points.length / most;
  return Array.from({ length: most }, (_, i) => {
    const some = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
    return [some.at(-1)[0], some.reduce((sum, [, y]) => sum + y, 0) / some.length];
  });
}

/** The place in `points` whose step is nearest to `step`. */
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  return low && step - points[low - 1][0] < points[low][0] - step ? low - 1 : low;
}

/** The values that a chart must hold: all of its lines, and of paler ones what lies near: they may begin and end far off. */
function heights(lines) {
  const own = lines.flatMap(({ points }) => points.map(([, y]) => y)), paler = lines.flatMap(({ pale }) => pale.map(([, y]) => y));
  if (!own.length) return paler;
  const low = own.reduce((a, b) => Math.min(a, b)), high = own.reduce((a, b) => Math.max(a, b));
  const near = Math.max(high - low, 0.05 * Math.abs(high)) / 2;
  return [...own, ...paler.map((y) => Math.min(high + near, Math.max(low - near, y)))];
}

export class Chart {
  /** title, why: keys of words.js; from: what makes points [[step, y], ...] of a run, `faint` a second, paler line. */
  constructor(title, { why, from, faint }) {
    Object.assign(this, { title, from, faint, runs: [], lines: [], at: null });
    this.svg = el("svg:svg", { role: "img", tabindex: 0 });
    this.values = el("div", { class: "values" });
    this.node = el("figure", { class: "sheet chart", hidden: true }, el("figcaption", {}, el("h2", { t: title }), why ? el("span", { class: "soft", t: why }) : null),
      this.svg, this.values);
    this.svg.addEventListener("pointermove", (event) => this.read(this.stepAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.svg.addEventListener("blur", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.svg.clientWidth !== this.width && this.draw()).observe(this.svg);
  }

  stepAt(x) {
    return this.x0 + (Math.min(Math.max(x - LEFT, 0), this.inner) / this.inner) * (this.x1 - this.x0);
  }

  /** runs: [{name, slot, rows, ...}]; slot says the colour and dashes of a run. */
  show(runs) {
    this.runs = runs;
    this.draw();
  }

  draw() {
    this.lines = this.runs.map((run) => ({ run, points: this.from(run), pale: this.faint?.(run) ?? [] })).filter((line) => line.points.length || line.pale.length);
    this.node.hidden = !this.lines.length;
    this.width = this.svg.clientWidth;
    if (!this.lines.length || !this.width) return;
    const ys = heights(this.lines), xs = this.lines.flatMap(({ points, pale }) => [points, pale].flatMap((p) => (p.length ? [p[0][0], p.at(-1)[0]] : [])));
    const most = (list, pick) => list.reduce((a, b) => pick(a, b));
    this.x0 = most(xs, Math.min);
    this.x1 = Math.max(most(xs, Math.max), this.x0 + 1);
    const low = most(ys, Math.min), high = most(ys, Math.max), air = (high - low || Math.abs(high) || 1) * 0.06;
    [this.y0, this.y1] = [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
    this.inner = this.width - LEFT - RIGHT;
    const x = (step) => LEFT + ((step - this.x0) / (this.x1 - this.x0)) * this.inner;
    const y = (value) => TOP + (1 - (value - this.y0) / (this.y1 - this.y0)) * (HEIGHT - TOP - BOTTOM);
    this.x = x;
    this.y = y;
    const window = el("svg:clipPath", { id: `window-${this.title}` }, el("svg:rect", { x: LEFT, y: TOP - 2, width: this.inner + 2, height: HEIGHT - TOP - BOTTOM + 4 }));
    const parts = [window], curves = el("svg:g", { "clip-path": `url(#window-${this.title})` });
    for (const value of ticks(this.y0, this.y1, 4)) {
      parts.push(el("svg:line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) }),
        el("svg:text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end", text: figure(value) }));
    }
    for (const value of ticks(this.x0, this.x1, Math.max(2, Math.floor(this.inner / 75)))) {
      const anchor = x(value) > this.width - 30 ? "end" : x(value) < LEFT + 12 ? "start" : "middle";
      parts.push(el("svg:text", { x: x(value), y: HEIGHT - 6, "text-anchor": anchor, text: compact(value) }));
    }
    const path = (points, name) => el("svg:polyline", { class: name, points: thinned(points, this.inner / 3)
      .map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") });
    for (const { run, points, pale } of this.lines) {
      if (pale.length) curves.append(path(pale, `line pale s${run.slot}`));
      if (points.length === 1) curves.append(el("svg:circle", { class: `dot s${run.slot}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 }));
      else curves.append(path(points, `line s${run.slot}`));
    }
    this.cross = el("svg:g", { class: "cross" });
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren(...parts, curves, this.cross);
    this.read(this.at);
    const last = this.lines.map(({ run, points, pale }) => `${visible(run.name)} ${figure((points.at(-1) ?? pale.at(-1))[1])}`);
    say(this.svg, "runs.chart", { title: t(this.title), values: last.join(", ") }, "label");
  }

  /** The values at a step, or the last ones. */
  read(step) {
    this.at = step;
    if (!this.lines.length || !this.cross) return;
    this.cross.replaceChildren();
    const shown = this.lines.map(({ run, points, pale }) => {
      const line = points.length ? points : pale, at = step === null ? line.length - 1 : nearest(line, step);
      const [x, y] = line[at];
      if (step !== null) this.cross.append(el("svg:circle", { class: `dot s${run.slot}`, cx: this.x(x), cy: this.y(y), r: 3.5 }));
      return el("span", {}, el("span", { class: `swatch s${run.slot}`, "aria-hidden": "true" }), el("span", { text: run.name, class: "name" }), " ",
        el("b", { text: figure(y) }), " ", el("span", { class: "soft", t: ["runs.step", { step: compact(x) }] }));
    });
    if (step !== null) this.cross.prepend(el("svg:line", { x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    this.values.replaceChildren(...shown);
  }

  key(event) {
    const points = (this.lines[0]?.points.length ? this.lines[0].points : this.lines[0]?.pale) ?? [];
    if (!points.length) return;
    const at = this.at === null ? points.length - 1 : nearest(points, this.at);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: points.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.read(points[Math.max(0, Math.min(to, points.length - 1))][0]);
    this.values.setAttribute("aria-live", "polite");
  }
}

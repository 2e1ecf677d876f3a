// Charts: values under the pointer, another x axis (steps, tokens, time), another smoothing.
"use strict";
const clocks = JSON.parse(document.body.dataset.clocks || "{}");
const controls = document.querySelector(".controls");
const state = { axis: document.body.dataset.axis || "step", smoothing: 0 };
const compact = (value) => {
  const size = Math.abs(value);
  for (const [limit, unit, suffix] of [[1e12, 1e12, " T"], [1e9, 1e9, " B"], [1e6, 1e6, " M"], [1e4, 1e3, " k"]])
    if (size >= limit) return Number((value / unit).toPrecision(4)) + suffix;
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
};
const timeUnit = (seconds) => (seconds >= 14400 ? ["hours", 3600] : seconds >= 240 ? ["minutes", 60] : ["seconds", 1]);

// Where a step of a run lies on the axis: between the knots of the run's clock.
const along = (run, step) => {
  const knots = clocks[run];
  if (state.axis === "step" || !knots || !knots[0].length) return step;
  const steps = knots[0], totals = knots[state.axis === "tokens" ? 1 : 2];
  let low = 0, high = steps.length - 1;
  if (step <= steps[0]) return totals[0];
  if (step >= steps[high]) return totals[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return totals[low] + ((step - steps[low]) / (steps[high] - steps[low])) * (totals[high] - totals[low]);
};

// Exponential moving average over `steps` steps, whatever the distance of the points.
const averaged = (values, xs, steps) => {
  let mean = values[0];
  return values.map((value, index) => {
    const share = index ? Math.pow(1 - 1 / steps, Math.max(1, xs[index] - xs[index - 1])) : 0;
    return (mean = share * mean + (1 - share) * value);
  });
};

class Plot {
  constructor(svg) {
    this.svg = svg;
    [this.left, this.top, this.right, this.bottom] = svg.dataset.area.split(" ").map(Number);
    [this.low, this.high, this.log] = svg.dataset.scale.split(" ").map(Number);
    this.paths = [...svg.querySelectorAll("path[data-x]")].map((node) => {
      let step = 0;
      const steps = node.dataset.x.split(" ").map((delta) => (step += Number(delta)));
      const numbers = (text) => (text === undefined ? null : text.split(" "));
      return { node, steps, drawn: node.getAttribute("d"), shown: numbers(node.dataset.y), values: numbers(node.dataset.y), raw: numbers(node.dataset.raw) };
    });
    svg.addEventListener("pointermove", (event) => this.hover(event));
    svg.addEventListener("pointerleave", () => this.leave());
  }

  // Places of all points; also the ends of the axis.
  measure() {
    for (const path of this.paths) path.along = path.steps.map((step) => along(path.node.dataset.run, step));
    const all = this.paths.flatMap((path) => path.along);
    let low = Math.min(...all), high = Math.max(...all);
    if (low === high) [low, high] = [low - 1, high + 1];
    const place = (value) => this.left + 4 + ((value - low) / (high - low)) * (this.right - this.left - 4);
    for (const path of this.paths) path.places = path.along.map(place);
    return { low, high, place };
  }

  y(value) {
    const map = this.log ? Math.log : Number;
    return this.bottom + ((map(value) - map(this.low)) / (map(this.high) - map(this.low))) * (this.top - this.bottom);
  }

  draw() {
    const axis = this.measure();
    for (const path of this.paths) {
      let index = 0;
      path.shown = path.values;
      if (path.raw && state.smoothing) {
        path.shown = averaged(path.raw.map(Number), path.steps, state.smoothing);
        path.node.setAttribute("d", path.drawn.replace(/([ML])[\d.-]+ [\d.-]+/g, (_, command) => {
          const at = index++;
          return `${command}${path.places[at].toFixed(1)} ${this.y(path.shown[at]).toFixed(1)}`;
        }));
      } else path.node.setAttribute("d", path.drawn.replace(/([ML])[\d.-]+/g, (_, command) => command + path.places[index++].toFixed(1)));
    }
    this.ticks(axis);
  }

  ticks({ low, high, place }) {
    const group = this.svg.querySelector("g.x"), height = this.svg.viewBox.baseVal.height;
    const [unit, size] = state.axis === "time" ? timeUnit(high) : ["", 1];
    const title = { step: "step", tokens: "trained tokens", time: `training time, ${unit}` }[state.axis];
    const count = Math.max(2, Math.floor((this.right - this.left) / 62)), raw = (high - low) / size / count;
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw * (1 - 1e-9));
    const parts = [];
    const text = (x, y, words) => `<text class="mid" x="${x.toFixed(1)}" y="${y}">${words}</text>`;
    for (let index = Math.ceil(low / size / step - 1e-9); index * step * size <= high * (1 + 1e-9); index++) {
      const tick = Number((index * step).toPrecision(6)), x = place(tick * size);
      if (state.axis === "time" || Number.isInteger(tick))
        parts.push(`<path class="base" d="M${x.toFixed(1)} ${this.bottom}v4"/>${text(x, this.bottom + 16, compact(tick))}`);
    }
    group.innerHTML = parts.join("") + text((this.left + this.right) / 2, height - 4, title);
  }

  format(value) {
    const number = Number(value), size = Math.abs(number);
    if (this.svg.dataset.percent === "1") return (100 * number).toPrecision(3) + " %";
    return size > 0 && size < 1e-3 ? number.toExponential(2) : compact(number);
  }

  prepare() {
    if (this.box) return;
    this.rule = document.createElementNS(this.svg.namespaceURI, "path");
    this.rule.setAttribute("class", "rule");
    this.svg.append(this.rule);
    this.box = document.createElement("div");
    this.box.className = "tip";
    this.svg.parentElement.append(this.box);
  }

  hover(event) {
    this.prepare();
    if (!this.paths.length) return;
    if (!this.paths[0].places) this.measure();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    const hits = this.paths.filter((path) => path.shown).map((path) => {
      let best = 0;
      path.places.forEach((place, index) => { if (Math.abs(place - at.x) < Math.abs(path.places[best] - at.x)) best = index; });
      return { path, index: best, place: path.places[best] };
    });
    if (!hits.length) return;
    const close = hits.reduce((a, b) => (Math.abs(b.place - at.x) < Math.abs(a.place - at.x) ? b : a));
    this.rule.setAttribute("d", `M${close.place} ${this.top}V${this.bottom}`);
    this.box.replaceChildren(`step ${close.path.steps[close.index].toLocaleString("en")}`);
    for (const { path, index, place } of hits) {
      if (Math.abs(place - close.place) > 6) continue;
      const row = document.createElement("div"), dot = document.createElement("i");
      dot.style.background = getComputedStyle(path.node).stroke;
      row.append(dot, `${path.node.dataset.label} ${this.format(path.shown[index])}`);
      this.box.append(row);
    }
    this.svg.classList.add("hovered");
    this.box.hidden = false;
    this.move(close.place);
  }

  move(place) {
    const frame = this.svg.getBoundingClientRect(), parent = this.box.offsetParent.getBoundingClientRect();
    const scale = frame.width / this.svg.viewBox.baseVal.width, x = frame.left - parent.left + place * scale;
    const left = place > (this.left + this.right) / 2 ? x - this.box.offsetWidth - 10 : x + 10;
    this.box.style.left = Math.max(0, Math.min(left, parent.width - this.box.offsetWidth)) + "px";
    this.box.style.top = frame.top - parent.top + this.top * scale + "px";
  }

  leave() {
    this.svg.classList.remove("hovered");
    if (this.box) this.box.hidden = true;
  }
}

const plots = [...document.querySelectorAll("svg.chart")].map((svg) => new Plot(svg));
const redraw = () => { for (const plot of plots) plot.draw(); };
if (controls && plots.length) {
  const [axis, slider] = controls.querySelectorAll("select, input"), output = controls.querySelector("output");
  const last = Math.max(10, ...Object.values(clocks).map((knots) => knots[0].at(-1) - knots[0][0]));
  const change = () => {
    state.axis = axis.value;
    const steps = Math.round(Math.pow(last, slider.value / 100));
    state.smoothing = Number(slider.value) < 0 ? 0 : Math.max(1, steps);
    output.value = state.smoothing ? (steps > 1 ? `moving average over ${steps.toLocaleString("en")} steps` : "none") : "as drawn: a mean over a fortieth of the run";
    redraw();
  };
  controls.hidden = false;
  axis.value = state.axis;
  for (const input of [axis, slider]) input.addEventListener("input", change);
  controls.restore = () => { if (axis.value !== state.axis || slider.value !== "-5") change(); };
}

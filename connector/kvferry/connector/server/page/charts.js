// Small line charts over time, drawn as SVG. A Chart keeps its element between updates, so that whoever points at it
// goes on reading values while new samples come in.

const SVG = "http://www.w3.org/2000/svg";
const MOST_POINTS = 300;
const WIDTH = 1000;
const HEIGHT = 100;

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "text") made.textContent = value;
    else if (key === "colour") made.style.setProperty("--colour", value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

// Columns are averaged down to what a screen can show; a group without any value stays a gap.
function thinned(times, series) {
  const step = Math.ceil(times.length / MOST_POINTS);
  if (step <= 1) return { times, series };
  const groups = (values, pick) => {
    const out = [];
    for (let end = values.length; end > 0; end -= step) out.unshift(pick(values.slice(Math.max(0, end - step), end)));
    return out;
  };
  const mean = (group) => {
    const known = group.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  return {
    times: groups(times, (group) => group[group.length - 1]),
    series: series.map((one) => ({ ...one, values: groups(one.values, mean) })),
  };
}

function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * unit >= value) * unit;
}

export class Chart {
  // format: makes text of a value; top: upper end of the axis where it does not follow from the data.
  constructor(title, format, top = null, smallest = 0) {
    this.format = format;
    this.fixedTop = top;
    this.smallest = smallest;
    this.now = element("span", { class: "now" });
    this.title = title;
    this.svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.topLabel = element("span", { class: "top" });
    this.nothing = element("div", { class: "nothing", text: "nothing yet" });
    this.cursor = element("div", { class: "cursor", hidden: "" });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.plot = element("div", { class: "plot" }, this.svg, this.topLabel, this.nothing, this.cursor, this.tip);
    this.from = element("span");
    this.to = element("span");
    this.root = element(
      "div",
      { class: "chart" },
      element("div", { class: "title" }, element("h3", { text: title }), this.now),
      this.plot,
      element("div", { class: "ends" }, this.from, this.to),
    );
    this.pointed = null;
    this.plot.addEventListener("pointermove", (event) => {
      const box = this.plot.getBoundingClientRect();
      this.pointed = (event.clientX - box.left) / box.width;
      this.point();
    });
    this.plot.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.point();
    });
  }

  // series: {name, colour, values}, each of which ends with the newest of times. seconds: what the axis spans.
  update(times, series, seconds, interval) {
    const shown = Math.min(times.length, Math.ceil(seconds / interval) + 1);
    const padded = series.map((one) => {
      const values = one.values.slice(-shown);
      return { ...one, values: [...Array(shown - values.length).fill(null), ...values] };
    });
    const thin = thinned(times.slice(-shown), padded);
    this.times = thin.times;
    this.series = thin.series;
    this.end = times[times.length - 1] ?? 0;
    this.start = this.end - seconds;
    this.longestStep = 3 * interval * Math.max(1, Math.ceil(shown / MOST_POINTS));
    this.draw();
    this.from.textContent = times.length ? clock(this.start) : "";
    this.to.textContent = times.length ? clock(this.end) : "";
    const newest = series[0]?.values.findLast((value) => value !== null);
    this.now.textContent = newest === undefined ? "–" : this.format(newest);
    this.svg.setAttribute("aria-label", `${this.title}, now ${this.now.textContent}`);
    this.point();
  }

  x(time) {
    return ((time - this.start) / (this.end - this.start)) * WIDTH;
  }

  draw() {
    const known = this.series.flatMap((one) => one.values).filter((value) => value !== null);
    const top = this.fixedTop ?? roundUp(Math.max(this.smallest, ...known) || 1);
    this.nothing.hidden = known.length > 0;
    this.topLabel.textContent = known.length ? this.format(top) : "";
    const shapes = [drawn("line", { x1: 0, x2: WIDTH, y1: 0, y2: 0 }), drawn("line", { x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 })];
    for (const one of [...this.series].reverse()) {
      const { line, area } = this.path(one.values, top);
      if (this.series.length === 1) {
        const filled = drawn("path", { d: area, class: "area" });
        filled.style.fill = one.colour;
        shapes.push(filled);
      }
      const path = drawn("path", { d: line });
      path.style.stroke = one.colour;
      if (one.isDashed) path.style.strokeDasharray = "1 5";
      shapes.push(path);
    }
    this.svg.replaceChildren(...shapes);
  }

  path(values, top) {
    let line = "";
    let area = "";
    let last = null;
    values.forEach((value, index) => {
      if (value === null) {
        if (last) area += `L${last.x} ${HEIGHT}Z`;
        last = null;
        return;
      }
      const x = this.x(this.times[index]).toFixed(1);
      const y = (HEIGHT - (Math.min(value, top) / top) * HEIGHT).toFixed(1);
      const isJoined = last && this.times[index] - last.time <= this.longestStep;
      if (last && !isJoined) area += `L${last.x} ${HEIGHT}Z`;
      line += isJoined ? `L${x} ${y}` : `M${x} ${y}l0.1 0`;
      area += isJoined ? `L${x} ${y}` : `M${x} ${HEIGHT}L${x} ${y}`;
      last = { x, time: this.times[index] };
    });
    if (last) area += `L${last.x} ${HEIGHT}Z`;
    return { line, area };
  }

  point() {
    const isOff = this.pointed === null || !this.times?.length;
    this.cursor.hidden = this.tip.hidden = isOff;
    if (isOff) return;
    const wanted = this.start + this.pointed * (this.end - this.start);
    let index = 0;
    this.times.forEach((time, other) => {
      if (Math.abs(time - wanted) < Math.abs(this.times[index] - wanted)) index = other;
    });
    const at = Math.max(0, this.x(this.times[index]) / WIDTH);
    this.cursor.style.left = `${at * 100}%`;
    this.tip.style.left = at > 0.5 ? "auto" : `calc(${at * 100}% + 8px)`;
    this.tip.style.right = at > 0.5 ? `calc(${(1 - at) * 100}% + 8px)` : "auto";
    const rows = this.series.map((one) => {
      const value = one.values[index];
      return element("div", { class: "key", colour: one.colour, text: `${one.name}  ${value === null ? "–" : this.format(value)}` });
    });
    this.tip.replaceChildren(element("div", { class: "quiet", text: clock(this.times[index]) }), ...rows);
  }
}

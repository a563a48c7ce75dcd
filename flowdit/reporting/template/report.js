"use strict";
// Draws the charts again for the size of the screen, with values under the cursor, and moves through the samples.
// Without it the page shows the same charts and all samples.
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const view = { axis: "step", smoothing: 0, hiddenRuns: new Set() };
  const space = { left: 56, right: 14, top: 10, bottom: 34 };
  const charts = [];

  function element(name, attributes = {}, text = null) {
    const isDrawn = ["svg", "g", "path", "line", "circle", "rect", "text"].includes(name);
    const made = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  }

  // Numbers

  function amount(value) {
    const size = Math.abs(value);
    for (const [from, unit, letter] of [[1e12, 1e12, "T"], [1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]]) {
      if (size >= from) return `${Number((value / unit).toPrecision(4))}${letter}`;
    }
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return size < 1e-4 ? value.toExponential(1).replace("e-", "e−") : String(Number(value.toPrecision(3)));
  }

  function exact(value) {
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) < 1e-3 ? value.toExponential(3).replace("e-", "e−") : String(Number(value.toPrecision(5)));
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.7);
    const found = [];
    for (let i = Math.ceil(low / step); i <= Math.floor(high / step) && found.length < 20; i++) {
      found.push(Number((i * step).toPrecision(12)) + 0); // never -0
    }
    return found;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const factors = decades < 1.2 ? [1, 1.5, 2, 3, 4, 5, 7] : decades < 3 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / 6));
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every) {
      for (const factor of factors) {
        const value = Number((factor * 10 ** power).toPrecision(3));
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found;
  }

  // Points

  function atStep(run, step) {
    if (view.axis === "images") return step * run.batch;
    if (view.axis !== "hours") return step;
    const { steps, hours } = run;
    let low = 0;
    let high = steps.length - 1;
    if (step <= steps[0]) return hours[0];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    const share = high === low ? 0 : (step - steps[low]) / (steps[high] - steps[low]);
    return hours[low] + (hours[high] - hours[low]) * Math.min(1, share);
  }

  function smoothed(values, weight) {
    let mean = 0;
    let total = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + 1 - weight;
      return mean / total;
    });
  }

  class Chart {
    constructor(figure, spec) {
      this.spec = spec;
      this.hidden = new Set();
      this.isLog = spec.is_log;
      this.zoom = null;
      this.plot = figure.querySelector(".plot");
      this.tip = element("div", { class: "tip", hidden: "" });
      this.addButtons(figure.querySelector("figcaption"));
      this.addLegend(figure.querySelector(".legend"));
      this.svg = element("svg", { tabindex: "0", role: "img", "aria-label": `${spec.title}: arrow keys show values` });
      this.plot.replaceChildren(this.svg, this.tip);
      this.listen();
      new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); }).observe(this.plot);
    }

    addButtons(caption) {
      const buttons = element("div", { class: "buttons" });
      this.resetButton = element("button", { type: "button", hidden: "" }, "Whole range");
      this.resetButton.addEventListener("click", () => { this.zoom = null; this.draw(); });
      buttons.append(this.resetButton);
      const values = this.spec.series.flatMap((line) => line.y).filter((value) => value !== null);
      if (values.some((value) => value > 0)) {
        const log = element("button", { type: "button", class: "mode log", "aria-pressed": String(this.isLog) }, "log");
        log.addEventListener("click", () => {
          this.isLog = !this.isLog;
          log.setAttribute("aria-pressed", String(this.isLog));
          this.draw();
        });
        buttons.append(log);
      }
      caption.append(buttons);
    }

    addLegend(legend) {
      this.entries = [...legend.querySelectorAll(".entry")].map((entry, i) => {
        const button = element("button", { type: "button", "aria-pressed": "true", title: "show or hide" });
        button.append(...entry.childNodes);
        button.addEventListener("click", () => {
          if (!this.hidden.delete(i)) this.hidden.add(i);
          this.draw();
        });
        entry.replaceWith(button);
        return button;
      });
    }

    visible() {
      return this.lines.filter((line) => line.isShown);
    }

    prepare() {
      this.lines = this.spec.series.map((line, i) => {
        const run = data.runs[line.run];
        const x = this.spec.axis === "step" ? line.x.map((step) => atStep(run, step)) : line.x;
        const y = line.smooth && view.smoothing > 0 ? smoothed(line.y, view.smoothing) : line.y;
        const isShown = !this.hidden.has(i) && !(data.runs.length > 1 && view.hiddenRuns.has(line.run));
        return { ...line, x, y, raw: y === line.y ? null : line.y, isShown };
      });
      this.entries.forEach((button, i) => button.setAttribute("aria-pressed", String(this.lines[i].isShown)));
    }

    setScales() {
      const shown = this.visible();
      const usable = (value) => value !== null && (!this.isLog || value > 0);
      const xs = shown.flatMap((line) => line.x.flatMap((x) => [x - line.bars / 2, x + line.bars / 2]));
      let [x0, x1] = this.zoom ?? [Math.min(...xs), Math.max(...xs)];
      if (!xs.length) [x0, x1] = [0, 1];
      if (!(x1 > x0)) [x0, x1] = [x0 - (Math.abs(x0) * 0.1 || 0.5), x1 + (Math.abs(x1) * 0.1 || 0.5)];
      const inside = (line, values) => values.filter((value, i) => usable(value) && line.x[i] >= x0 && line.x[i] <= x1);
      let ys = shown.flatMap((line) => inside(line, line.raw ?? line.y)).concat(Object.values(this.spec.levels).filter(usable));
      if (!this.isLog && shown.some((line) => line.bars)) ys.push(0);
      if (!ys.length) ys = [this.isLog ? 1 : 0, this.isLog ? 10 : 1];
      let y0 = ys.reduce((a, b) => Math.min(a, b));
      let y1 = ys.reduce((a, b) => Math.max(a, b));
      if (!(y1 - y0 > Math.abs(y1) * 1e-9)) [y0, y1] = [y0 - (Math.abs(y0) * 0.1 || 0.5), y1 + (Math.abs(y1) * 0.1 || 0.5)];
      const margin = this.isLog ? (y1 / y0) ** 0.05 : (y1 - y0) * 0.05;
      const low = this.isLog ? y0 / margin : y0 >= 0 && y0 <= margin ? 0 : y0 - margin;
      const high = this.isLog ? y1 * margin : y1 + margin;
      const map = this.isLog ? Math.log : (value) => value;
      const [inner, tall] = [this.width - space.left - space.right, this.height - space.top - space.bottom];
      this.range = { x0, x1, low, high };
      this.across = (x) => space.left + ((x - x0) / (x1 - x0)) * inner;
      this.back = (place) => x0 + ((place - space.left) / inner) * (x1 - x0);
      this.up = (y) => space.top + tall * (1 - (map(y) - map(low)) / (map(high) - map(low)));
      this.usable = usable;
    }

    draw() {
      this.width = this.plot.clientWidth;
      if (!this.width) return;
      this.height = Math.round(Math.min(300, Math.max(210, this.width * 0.5)));
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
      this.prepare();
      this.setScales();
      this.resetButton.hidden = this.zoom === null;
      this.cursor = element("g");
      this.svg.replaceChildren(...this.frame(), ...this.visible().flatMap((line) => this.curve(line)), this.cursor);
      this.tip.hidden = true;
    }

    frame() {
      const { x0, x1, low, high } = this.range;
      const [end, floor] = [this.width - space.right, this.height - space.bottom];
      const parts = [];
      for (const y of this.isLog ? logTicks(low, high) : linearTicks(low, high, 5)) {
        parts.push(element("line", { class: "grid", x1: space.left, x2: end, y1: this.up(y), y2: this.up(y) }));
        parts.push(element("text", { class: "tick end", x: space.left - 8, y: this.up(y), dy: "0.32em" }, amount(y)));
      }
      for (const x of linearTicks(x0, x1, this.width < 420 ? 4 : 6)) {
        parts.push(element("text", { class: "tick middle", x: this.across(x), y: floor + 16 }, amount(x)));
      }
      const name = this.spec.axis === "step" ? { step: "step", images: "images", hours: "hours" }[view.axis] : this.spec.axis;
      parts.push(element("text", { class: "tick end", x: end, y: this.height - 3 }, name));
      for (const [title, y] of Object.entries(this.spec.levels)) {
        if (!this.usable(y)) continue;
        parts.push(element("line", { class: "level", x1: space.left, x2: end, y1: this.up(y), y2: this.up(y) }));
        parts.push(element("text", { class: "tick end", x: end, y: this.up(y) - 4 }, title));
      }
      return parts.concat(this.spec.axis === "step" ? this.resumes(floor) : []);
    }

    resumes(floor) {
      const runs = [...new Set(this.visible().map((line) => line.run))];
      return runs.flatMap((run) => data.runs[run].resumes.map((step) => atStep(data.runs[run], step)))
        .filter((x) => x >= this.range.x0 && x <= this.range.x1)
        .map((x) => {
          const mark = element("line", { class: "mark", x1: this.across(x), x2: this.across(x), y1: space.top, y2: floor });
          mark.append(element("title", {}, "resumed"));
          return mark;
        });
    }

    bars(line) {
      const [from, to] = [this.across(this.range.x0), this.across(this.range.x1)];
      const floor = this.up(this.isLog ? this.range.low : 0);
      return line.x.flatMap((x, i) => {
        const [left, right] = [x - line.bars / 2, x + line.bars / 2].map((side) => Math.min(to, Math.max(from, this.across(side))));
        if (!this.usable(line.y[i]) || right <= left) return [];
        const [top, bottom] = [this.up(line.y[i]), floor].sort((a, b) => a - b);
        const size = { width: Math.max(right - left - 1, 0.5), height: bottom - top };
        return [element("rect", { class: `bar c${line.colour}`, x: left, y: top, ...size })];
      });
    }

    curve(line) {
      if (line.bars) return this.bars(line);
      const style = `c${line.colour} d${line.dash} f${Math.round(line.fade * 10)}`;
      const parts = line.raw ? [this.path(line, line.raw, `line raw c${line.colour}`)] : [];
      parts.push(this.path(line, line.y, `line ${style}`));
      line.x.forEach((x, i) => {
        const y = line.y[i];
        if (!this.usable(y) || x < this.range.x0 || x > this.range.x1) return;
        const [at, error] = [this.across(x), line.error?.[i]];
        if (error && (!this.isLog || y > error)) {
          parts.push(element("line", { class: `line ${style}`, x1: at, x2: at, y1: this.up(y - error), y2: this.up(y + error) }));
        }
        if (line.dots || line.x.length === 1) {
          parts.push(element("circle", { class: `dot ${style}`, cx: at, cy: this.up(y), r: 3.2 }));
        }
        if (i === line.best) parts.push(element("circle", { class: "ring", cx: at, cy: this.up(y), r: 7 }));
      });
      return parts;
    }

    path(line, values, style) {
      let drawn = "";
      let pen = "M";
      values.forEach((y, i) => {
        const isInside = line.x[i] >= this.range.x0 && line.x[i] <= this.range.x1;
        if (!this.usable(y) || !isInside) {
          pen = "M";
          return;
        }
        drawn += `${pen}${this.across(line.x[i]).toFixed(1)} ${this.up(y).toFixed(1)}`;
        pen = "L";
      });
      return element("path", { class: style, d: drawn });
    }

    // Values under the cursor

    places() {
      const { x0, x1 } = this.range;
      return [...new Set(this.visible().flatMap((line) => line.x.filter((x, i) => line.y[i] !== null)))]
        .filter((x) => x >= x0 && x <= x1).sort((a, b) => a - b);
    }

    listen() {
      let begun = null;
      const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      this.svg.addEventListener("pointermove", (event) => {
        this.show(this.nearest(place(event)));
        if (begun !== null && Math.abs(place(event) - begun) > 8) this.brush(begun, place(event));
      });
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.pointerType !== "mouse") return this.show(this.nearest(place(event)));
        begun = place(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const [from, to] = [begun, place(event)].sort((a, b) => a - b);
        const isDragged = begun !== null && to - from > 8;
        begun = null;
        if (isDragged) {
          this.zoom = [Math.max(this.range.x0, this.back(from)), Math.min(this.range.x1, this.back(to))];
          this.draw();
        }
      });
      this.svg.addEventListener("pointercancel", () => { begun = null; });
      this.svg.addEventListener("pointerleave", () => this.hide());
      this.svg.addEventListener("blur", () => this.hide());
      this.svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
      this.svg.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (step) this.move(step);
        if (step) event.preventDefault();
        if (event.key === "Escape") this.hide();
      });
    }

    brush(from, to) {
      const [left, width] = [Math.min(from, to), Math.abs(to - from)];
      const tall = this.height - space.top - space.bottom;
      this.cursor.append(element("rect", { class: "brush", x: left, width, y: space.top, height: tall }));
    }

    nearest(place) {
      const found = this.places();
      const x = this.back(place);
      return found.length ? found.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a)) : null;
    }

    move(step) {
      const found = this.places();
      if (!found.length) return;
      const now = found.indexOf(this.at);
      this.show(found[now < 0 ? (step > 0 ? 0 : found.length - 1) : Math.min(found.length - 1, Math.max(0, now + step))]);
    }

    hide() {
      this.at = null;
      this.cursor?.replaceChildren();
      this.tip.hidden = true;
    }

    show(x) {
      if (x === null) return this.hide();
      this.at = x;
      const at = this.across(x);
      const end = this.height - space.bottom;
      this.cursor.replaceChildren(element("line", { class: "cursor", x1: at, x2: at, y1: space.top, y2: end }));
      const unit = this.spec.axis === "step" ? view.axis : this.spec.axis;
      this.tip.replaceChildren(element("b", {}, `${unit} ${exact(x)}`));
      for (const line of this.visible()) this.showLine(line, x, unit);
      this.tip.hidden = false;
      const isRight = at > this.width / 2;
      this.tip.style.left = isRight ? "auto" : `${at + 12}px`;
      this.tip.style.right = isRight ? `${this.width - at + 12}px` : "auto";
      this.tip.style.top = "8px";
    }

    showLine(line, x, unit) {
      let best = -1;
      line.x.forEach((other, i) => {
        if (line.y[i] !== null && (best < 0 || Math.abs(other - x) < Math.abs(line.x[best] - x))) best = i;
      });
      const { x0, x1 } = this.range;
      if (best < 0 || Math.abs(line.x[best] - x) > (x1 - x0) * 0.05) return;
      const y = line.y[best];
      const style = `c${line.colour} d${line.dash} f${Math.round(line.fade * 10)}`;
      if (this.usable(y)) {
        this.cursor.append(element("circle", { class: `dot ${style}`, cx: this.across(line.x[best]), cy: this.up(y), r: 4 }));
      }
      const row = element("div");
      const swatch = element("svg", { class: "swatch", viewBox: "0 0 14 8" });
      swatch.append(element("line", { class: `line ${style}`, x1: 0, x2: 14, y1: 4, y2: 4 }));
      const error = line.error?.[best];
      const elsewhere = line.x[best] === x ? "" : ` (${unit} ${exact(line.x[best])})`;
      row.append(swatch, element("span", {}, line.name + elsewhere));
      row.append(element("span", { class: "value" }, exact(y) + (error ? ` ± ${error.toPrecision(2)}` : "")));
      this.tip.append(row);
    }
  }

  // Controls of all charts

  function redraw() {
    for (const chart of charts) chart.draw();
  }

  function addTools(tools) {
    const axes = { step: "Steps" };
    if (data.runs.every((run) => run.batch)) axes.images = "Images";
    if (data.runs.every((run) => run.hours.length > 1)) axes.hours = "Hours";
    const group = tools.querySelector(".axes");
    for (const [axis, title] of Object.entries(axes)) {
      const button = element("button", { type: "button", class: "mode", "aria-pressed": String(axis === view.axis) }, title);
      button.addEventListener("click", () => {
        view.axis = axis;
        for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
        for (const chart of charts) if (chart.spec.axis === "step") chart.zoom = null;
        redraw();
      });
      group.append(button);
    }
    tools.querySelector("input").addEventListener("input", (event) => {
      const share = Number(event.target.value) / 100;
      view.smoothing = share && 1 - 10 ** (-2.5 * share);
      redraw();
    });
    const runs = tools.querySelector(".runs");
    data.runs.forEach((run, number) => {
      if (data.runs.length < 2) return;
      const button = element("button", { type: "button", "aria-pressed": "true", title: "show or hide" });
      const swatch = element("svg", { class: "swatch", viewBox: "0 0 22 8" });
      swatch.append(element("line", { class: `line c${number}`, x1: 1, x2: 21, y1: 4, y2: 4 }));
      button.append(swatch, element("span", {}, run.name));
      button.addEventListener("click", () => {
        if (!view.hiddenRuns.delete(number)) view.hiddenRuns.add(number);
        button.setAttribute("aria-pressed", String(!view.hiddenRuns.has(number)));
        redraw();
      });
      runs.append(button);
    });
    tools.hidden = false;
  }

  function addSlider(samples) {
    const shots = [...samples.querySelectorAll(".shot")].map((shot) => ({
      shot, run: shot.dataset.run, step: Number(shot.dataset.step),
    }));
    const steps = [...new Set(shots.map(({ step }) => step))].sort((a, b) => a - b);
    if (steps.length < 2) return;
    const slide = samples.querySelector(".slide");
    const [input, output, all] = ["input", "output", "button"].map((name) => slide.querySelector(name));
    const columns = samples.querySelector(".columns.several");
    if (columns) {
      const large = element("button", { type: "button", class: "mode large", "aria-pressed": "false" }, "Large");
      large.addEventListener("click", () => {
        large.setAttribute("aria-pressed", String(!columns.classList.toggle("several")));
      });
      all.after(large);
    }
    const update = () => {
      const step = steps[Number(input.value)];
      const isAll = all.getAttribute("aria-pressed") === "true";
      const newest = new Map();
      for (const each of shots) if (each.step <= step) newest.set(each.run, each);
      for (const each of shots) each.shot.hidden = !isAll && newest.get(each.run) !== each;
      input.disabled = isAll;
      output.textContent = isAll ? "all steps" : `step ${step.toLocaleString("en")}`;
    };
    input.max = String(steps.length - 1);
    input.value = input.max;
    input.addEventListener("input", update);
    all.addEventListener("click", () => {
      all.setAttribute("aria-pressed", String(all.getAttribute("aria-pressed") !== "true"));
      update();
    });
    slide.hidden = false;
    update();
  }

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    charts.push(new Chart(figure, data.charts[Number(figure.dataset.chart)]));
  }
  const tools = document.querySelector(".tools");
  if (tools) addTools(tools);
  for (const samples of document.querySelectorAll(".samples")) addSlider(samples);
  redraw();
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", redraw);
})();

"use strict";
// Line charts as SVG, drawn for the width that they have.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Round values in [low, high], about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const values = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-6; i++) values.push(i * step);
  return values;
}

function tickLabel(value) {
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(0)
    : String(Number(value.toPrecision(4)));
}

/**
 * A chart of series {name, color (a CSS variable), points: [[x, y], ...], faint}.
 * `mark` is the x of a vertical line; `pick` is called with the x that is clicked. The figure has the method setMark.
 */
function lineChart({ title, series, xLabel = "step", height = 190, mark = null, pick = null }) {
  const shown = series
    .map((one) => ({ ...one, points: one.points.filter(([x, y]) => isNumber(x) && isNumber(y)) }))
    .filter((one) => one.points.length);
  const drawing = svg("svg", { tabindex: 0, role: "img" });
  const readout = el("output", { className: "readout" });
  const legend = el("ul", { className: "legend" }, shown.map((one) => {
    const key = el("i", {});
    key.style.background = `var(${one.color})`;
    return el("li", {}, key, one.name);
  }));
  const figure = el("figure", { className: "chart" }, el("figcaption", {}, el("span", {}, title), readout), drawing, legend);
  const all = shown.flatMap((one) => one.points);
  if (!all.length) {
    figure.append(el("p", { className: "empty" }, "no values"));
    drawing.remove();
    figure.setMark = () => {};
    return figure;
  }
  const xs = [...new Set(all.map(([x]) => x))].sort((a, b) => a - b);
  const range = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
    const margin = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
    return [low, high, margin];
  };
  const [xLow, xHigh] = range(xs);
  const [yMin, yMax, yMargin] = range(all.map(([, y]) => y));
  const [yLow, yHigh] = [yMin - yMargin, yMax + yMargin];
  const last = shown.map((one) => `${one.name} from ${number(one.points[0][1])} to ${number(one.points.at(-1)[1])}`);
  drawing.setAttribute("aria-label", `${title}. ${last.join("; ")}. Arrow keys read the values.`);
  let cursor = null;
  let toX = (x) => x;
  const line = svg("line", { class: "mark", visibility: "hidden" });
  const hair = svg("line", { class: "hair", visibility: "hidden" });

  function place(node, x) {
    node.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) for (const name of ["x1", "x2"]) node.setAttribute(name, toX(x));
  }
  function read(x) {
    cursor = x;
    place(hair, x);
    const values = shown.flatMap((one) => one.points.filter((point) => point[0] === x).slice(-1).map(([, y]) => `${one.name} ${number(y)}`));
    readout.textContent = x === null ? "" : `${xLabel} ${number(x)}: ${values.join(", ")}`;
  }
  function nearest(event) {
    const box = drawing.getBoundingClientRect();
    const at = event.clientX - box.left;
    return xs.reduce((best, x) => (Math.abs(toX(x) - at) < Math.abs(toX(best) - at) ? x : best));
  }
  function draw(width) {
    const [left, right, top, bottom] = [46, 10, 8, 24];
    toX = (x) => left + (xHigh > xLow ? ((x - xLow) / (xHigh - xLow)) * (width - left - right) : (width - left - right) / 2);
    const toY = (y) => top + (1 - (y - yLow) / (yHigh - yLow)) * (height - top - bottom);
    drawing.replaceChildren();
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("height", height);
    for (const y of ticks(yLow, yHigh, 4)) {
      drawing.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: toY(y), y2: toY(y) }));
      drawing.append(svg("text", { x: left - 6, y: toY(y) + 4, "text-anchor": "end" }, tickLabel(y)));
    }
    for (const x of xHigh > xLow ? ticks(xLow, xHigh, Math.max(2, width / 110)) : [xLow]) {
      drawing.append(svg("text", { x: toX(x), y: height - 6, "text-anchor": "middle" }, tickLabel(x)));
    }
    for (const one of shown) {
      const path = one.points.map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
      const node = svg("path", { class: one.faint ? "line faint" : "line", d: path });
      node.style.stroke = `var(${one.color})`;
      drawing.append(node);
      if (one.points.length <= 30 && !one.faint) {
        for (const [x, y] of one.points) {
          const dot = svg("circle", { cx: toX(x), cy: toY(y), r: 2.5 });
          dot.style.fill = `var(${one.color})`;
          drawing.append(dot);
        }
      }
    }
    for (const node of [line, hair]) {
      node.setAttribute("y1", top);
      node.setAttribute("y2", height - bottom);
      drawing.append(node);
    }
    place(line, mark);
    place(hair, cursor);
  }
  drawing.addEventListener("pointermove", (event) => read(nearest(event)));
  drawing.addEventListener("pointerleave", () => read(null));
  drawing.addEventListener("blur", () => read(null));
  if (pick) drawing.addEventListener("click", (event) => pick(nearest(event)));
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      const start = cursor === null ? (move > 0 ? -1 : xs.length) : xs.indexOf(cursor);
      read(xs[Math.max(0, Math.min(xs.length - 1, start + move))]);
    } else if (pick && event.key === "Enter" && cursor !== null) pick(cursor);
  });
  figure.setMark = (x) => place(line, (mark = x));
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width) draw(Math.round(entry.contentRect.width));
  }).observe(drawing);
  return figure;
}

"use strict";
// Line charts by uPlot (vendor/), drawn for the width that they have, in the colours of the page.

const plots = new Set();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw()));

/** A colour of view.css, for a canvas. */
const canvasColor = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name);

function tickLabel(value) {
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

/**
 * A chart of series {name, color (a CSS variable), points: [[x, y], ...], faint}.
 * `pick` is called with the x that is clicked. The figure has the method setMark, which moves a vertical line to an x.
 */
function lineChart({ title, series, xLabel = "step", height = 200, pick = null }) {
  const shown = series
    .map((one) => ({ ...one, points: one.points.filter(([x, y]) => isNumber(x) && isNumber(y)) }))
    .filter((one) => one.points.length);
  const figure = el("figure", { className: "chart" }, el("figcaption", {}, title));
  if (!shown.length) {
    figure.append(el("p", { className: "empty" }, "no values"));
    figure.setMark = () => {};
    return figure;
  }
  const data = uPlot.join(shown.map(({ points }) => [points.map(([x]) => x), points.map(([, y]) => y)]));
  const spans = shown.map(({ name, points }) => `${name} from ${number(points[0][1])} to ${number(points.at(-1)[1])}`);
  const label = `${title}. ${spans.join("; ")}. Arrow keys read the values.`;
  const area = el("div", { className: "plot", tabIndex: 0, role: "img", "aria-label": label });
  const line = el("div", { className: "mark", hidden: true });
  let plot = null;
  let mark = null;
  const place = () => {
    line.hidden = mark === null;
    if (plot && mark !== null) line.style.left = `${plot.valToPos(mark, "x")}px`;
  };
  figure.setMark = (x) => { mark = x; place(); };
  figure.append(area);

  const axis = {
    stroke: canvasColor("--muted"), font: "11px system-ui", grid: { stroke: canvasColor("--border"), width: 1 }, ticks: { show: false },
    values: (_, splits) => splits.map(tickLabel),
  };
  const options = {
    height,
    scales: { x: { time: false } },
    axes: [{ ...axis, size: 26, gap: 4, grid: { show: false } }, { ...axis, size: 52 }],
    series: [{ label: xLabel, value: (_, x) => number(x) }, ...shown.map((one) => ({
      label: one.name, stroke: canvasColor(one.color), width: one.faint ? 1.2 : 2, alpha: one.faint ? 0.65 : 1, spanGaps: true,
      points: { show: !one.faint && one.points.length <= 30, size: 5, fill: canvasColor(one.color) }, value: (_, y) => number(y),
    }))],
    cursor: { y: false, drag: { x: false }, hover: { prox: 24 } }, // pixels to a value that is read
    legend: {
      markers: { width: 0, fill: (_, i) => i && `var(${shown[i - 1].color})` },
      mount: (_, table) => { table.setAttribute("aria-live", "polite"); figure.append(table); },
    },
    hooks: { draw: [place] },
  };
  const move = (index) => plot.setCursor({ left: plot.valToPos(data[0][index], "x"), top: 0 });
  const choose = () => { if (pick && plot.cursor.idx !== null) pick(data[0][plot.cursor.idx]); };
  area.addEventListener("click", choose);
  area.addEventListener("blur", () => plot && plot.setCursor({ left: -1, top: -1 }));
  area.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (plot && event.key === "Enter") choose();
    if (!plot || !step) return;
    event.preventDefault();
    const start = plot.cursor.idx ?? (step > 0 ? -1 : data[0].length);
    move(Math.max(0, Math.min(data[0].length - 1, start + step)));
  });
  new ResizeObserver(([entry], observer) => {
    const width = Math.floor(entry.contentRect.width);
    if (!area.isConnected) {
      observer.disconnect();
      plots.delete(plot);
      if (plot) plot.destroy();
    } else if (plot) {
      plot.setSize({ width, height });
    } else if (width) {
      plot = new uPlot({ ...options, width }, data, area);
      plot.over.append(line);
      plots.add(plot);
    }
  }).observe(area);
  return figure;
}

"use strict";
// Runs: curves of all runs together, the settings in which they differ, and their warnings.

const comparison = { x: "step", hidden: new Set() };

const clipped = (row) => (isNumber(row.clipped_above) ? row.clipped_above + (row.clipped_below || 0) : null);
// [section, [title, value of a row of metrics.jsonl], ...]; keys that no chart names get one under "Other".
const CHARTS = [
  ["Rewards", ["Reward, training batches", (row) => row.reward, "reward"], ["Reward, evaluation", (row) => row.eval && row.eval.scores.reward],
    ["Accuracy, evaluation", (row) => row.eval && row.eval.overall], ["Diversity, evaluation", (row) => row.eval && row.eval.diversity],
    ["Groups without spread", (row) => row.groups_without_spread, "groups_without_spread"], ["Missing scores", (row) => row.missing, "missing"]],
  ["Update", ["KL to the reference", (row) => row.kl, "kl"], ["KL to the old policy", (row) => row.approx_kl, "approx_kl"],
    ["Share of pairs clipped", clipped, "clipped_above", "clipped_below"], ["Ratio, largest", (row) => row.ratio_max, "ratio_max"],
    ["Ratio, smallest", (row) => row.ratio_min, "ratio_min"], ["Ratio, mean", (row) => row.ratio, "ratio"], ["Gradient norm", (row) => row.grad_norm, "grad_norm"],
    ["RMS of the clean latents", (row) => row.latent_rms, "latent_rms"]],
  ["Speed", ["Images per second", (row) => row.images_per_s, "images_per_s"]],
];
const X_AXES = { step: ["optimiser step", (row) => row.step], wall_s: ["seconds", (row) => row.wall_s], images: ["training images", null] };

function runsPage(runs) {
  const state = comparison;
  const shown = runs.map((run, i) => ({ run, color: COLORS[i % COLORS.length] })).filter(({ run }) => !state.hidden.has(run.name));
  const choose = runs.length < 2 ? [] : runs.map((run, i) => {
    const key = el("i", {});
    key.style.background = `var(${COLORS[i % COLORS.length]})`;
    return el("label", { className: "check key" }, el("input", { type: "checkbox", checked: !state.hidden.has(run.name), onchange: (event) => {
      state.hidden[event.target.checked ? "delete" : "add"](run.name);
      showPage();
    } }), key, run.name);
  });
  const axis = labelled("Against", select(Object.entries(X_AXES).map(([key, [text]]) => [key, text]), state.x, (x) => { state.x = x; showPage(); }));
  return el("div", {}, el("h2", {}, "Runs"), el("div", { className: "controls" }, choose, axis),
    warningsOf(runs), sectionsOf(shown, state.x), settingsOf(runs));
}

function sectionsOf(shown, axis) {
  const rows = shown.map(({ run }) => withImages(run.rows));
  const x = axis === "images" ? (row) => row.images_so_far : X_AXES[axis][1];
  const known = new Set(["epoch", "step", "images", "images_so_far", "wall_s", ...CHARTS.flatMap(([, ...charts]) => charts.flatMap(([, , ...keys]) => keys))]);
  const numeric = [...new Set(rows.flat().flatMap((row) => Object.keys(row).filter((key) => isNumber(row[key]))))].filter((key) => !known.has(key));
  const rewards = new Set(shown.flatMap(({ run }) => scoreNames(run)));
  const own = (key) => [key, (row) => row[key]];
  const phases = [...new Set(rows.flat().flatMap((row) => Object.keys(row.seconds || {})))].map((name) => [`Seconds of ${name}`, (row) => row.seconds && row.seconds[name]]);
  const more = { Rewards: numeric.filter((key) => rewards.has(key)).map(own), Speed: phases };
  const other = numeric.filter((key) => !rewards.has(key));
  const sections = [...CHARTS.map(([title, ...charts]) => [title, ...charts, ...(more[title] || [])]), ["Other", ...other.map(own)]];
  return sections.map(([title, ...charts]) => {
    const drawn = charts.map(([name, value]) => {
      const series = shown.map(({ run, color }, i) => ({ name: run.name, color, points: rows[i].map((row) => [x(row), value(row)]) }));
      return series.some((one) => one.points.some((point) => isNumber(point[1]))) ? lineChart({ title: name, series, xLabel: X_AXES[axis][0] }) : null;
    }).filter(Boolean);
    return drawn.length ? el("section", {}, el("h3", {}, title), el("div", { className: "charts" }, drawn)) : null;
  });
}

/** Rows with the number of training images so far. */
function withImages(rows) {
  let images = 0;
  return rows.map((row) => ({ ...row, images_so_far: (images += row.images || 0) }));
}

function warningsOf(runs) {
  const items = runs.flatMap((run) => run.warnings.map((text) => el("li", {}, runs.length > 1 ? `${run.name}: ${text}` : text)));
  return items.length ? el("section", { className: "notice" }, el("h3", {}, "Warnings"), el("ul", {}, items)) : null;
}

function settingsOf(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differing = names.filter((name) => new Set(runs.map((run) => run.settings[name])).size > 1);
  const table = (list) => el("div", { className: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "setting"), runs.map((run) => el("th", { scope: "col" }, run.name)))),
    el("tbody", {}, list.map((name) => el("tr", {}, el("th", { scope: "row" }, name), runs.map((run) => el("td", {}, run.settings[name] ?? "–")))))));
  return el("section", {}, el("h3", {}, runs.length > 1 ? "Settings that differ" : "Settings"),
    runs.length > 1 ? (differing.length ? table(differing) : el("p", {}, "None.")) : null,
    el("details", {}, el("summary", {}, "All settings"), table(names)));
}

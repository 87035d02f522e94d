"use strict";
// Evolution: the images of the same prompts and noise at every evaluation, beside the curve of a score.

const evolution = { run: 0, score: null, tag: "", base: true, step: null, timer: null };
const PLAY_MS = 700;

function evolutionPage(runs) {
  const state = evolution;
  stopPlaying();
  const run = runs[state.run] || runs[0];
  const evaluations = run.evaluations;
  const controls = el("div", { className: "controls" });
  if (runs.length > 1) controls.append(runSelect(runs, runs.indexOf(run), (i) => update({ run: i, step: null, tag: "" })));
  if (!evaluations.length) return el("div", {}, el("h2", {}, "Evolution"), controls, nothing(run));
  const names = scoreNames(run);
  if (!names.includes(state.score)) state.score = names[0];
  if (!tags(run).includes(state.tag)) state.tag = "";
  const update = (change) => { Object.assign(state, change); showPage(); };
  const isAtEnd = state.step === null || !evaluations.some((one) => one.step === state.step);
  let index = isAtEnd ? evaluations.length - 1 : evaluations.findIndex((one) => one.step === state.step);

  const slider = el("input", { type: "range", id: "step", min: 0, max: evaluations.length - 1, value: index,
    oninput: (event) => { stopPlaying(); show(Number(event.target.value)); } });
  const play = el("button", { type: "button", id: "play", onclick: () => (state.timer ? stopPlaying() : startPlaying()) }, "▶ Play");
  const where = el("output", { htmlFor: "step" });
  if (tags(run).length) controls.append(labelled("Tag", select([["", "all"], ...tags(run).map((tag) => [tag, tag])], state.tag, (tag) => update({ tag }))));
  controls.append(
    labelled("Score", select(names.map((name) => [name, name]), state.score, (score) => update({ score }))),
    el("label", { className: "check" }, el("input", { type: "checkbox", checked: state.base, onchange: (event) => {
      state.base = event.target.checked;
      grid.classList.toggle("with-base", state.base);
    } }), "Base beside it"));
  const chart = scoreChart(run, state, (x) => {
    stopPlaying();
    show(evaluations.reduce((best, one, i) => (Math.abs(one.step - x) < Math.abs(evaluations[best].step - x) ? i : best), 0));
  });
  const cards = evolutionCards(run, runs.indexOf(run), state);
  const grid = el("div", { className: "grid evolution" + (state.base ? " with-base" : "") + (cards.some((card) => card.source) ? " with-source" : "") }, cards.map((card) => card.node));

  function show(i) {
    index = i;
    const evaluation = evaluations[i];
    state.step = i === evaluations.length - 1 ? null : evaluation.step; // at the end a live run is followed
    slider.value = i;
    slider.setAttribute("aria-valuetext", `step ${evaluation.step}`);
    where.textContent = `step ${evaluation.step} (${i + 1} of ${evaluations.length})`;
    chart.setMark(evaluation.step);
    for (const card of cards) card.show(evaluation);
    const next = evaluations[i + 1];
    if (state.timer && next) for (const card of cards) new Image().src = imageAddress(runs.indexOf(run), next, card.file);
  }
  function startPlaying() {
    play.textContent = "⏸ Pause";
    state.timer = setInterval(() => (index + 1 < evaluations.length ? show(index + 1) : stopPlaying()), PLAY_MS);
    show(index + 1 < evaluations.length ? index : 0);
  }
  show(index);
  return el("div", {}, el("h2", {}, "Evolution"), controls, chart,
    el("div", { className: "player" }, play, labelled("Step", slider), where), grid);
}

function stopPlaying() {
  clearInterval(evolution.timer);
  evolution.timer = null;
  const play = document.getElementById("play");
  if (play) play.textContent = "▶ Play";
}

/** The mean of the score in the evaluations and, faintly, in the training batches; of a tag, of the images shown. */
function scoreChart(run, { score, tag }, pick) {
  const series = [];
  if (tag) {
    series.push({ name: `${score}, images of ${tag}`, color: "--line-1", points: run.evaluations.map((one) =>
      [one.step, mean(one.images.filter((image) => image.tag === tag).map((image) => image.scores[score]))]) });
  } else {
    series.push({ name: "training batches", color: "--muted", faint: true, points: run.rows.filter((row) => "epoch" in row).map((row) => [row.step, row[score]]) });
    series.push({ name: "evaluation", color: "--line-1", points: run.rows.filter((row) => row.eval).map((row) => [row.step, row.eval.scores[score]]) });
  }
  return lineChart({ title: score, series, pick });
}

function mean(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

/** A card for each image that the last evaluation keeps: {file, source, node, show(evaluation)}. */
function evolutionCards(run, runNumber, { tag, score }) {
  const base = run.evaluations[0];
  const entries = run.evaluations.at(-1).images.filter((entry) => !tag || entry.tag === tag);
  return entries.map((entry) => {
    const before = byFile(base).get(entry.file);
    const alt = (text) => short(`${entry.text}, ${text}`);
    const left = picture(before ? imageAddress(runNumber, base, entry.file) : null, alt("base"), { loading: "lazy" });
    const right = picture(null, "", { loading: "lazy" });
    const mark = el("span", {});
    const value = el("span", { className: "value" });
    const button = el("button", { type: "button", className: "images" },
      sourceImage(runNumber, run.evaluations.at(-1), entry),
      el("span", { className: "base" }, left, el("small", {}, "base ", checkMark(before && before.correct))),
      el("span", {}, right, mark));
    let shown = null;
    button.addEventListener("click", () => {
      const evaluation = shown;
      const list = entries.filter((one) => byFile(evaluation).has(one.file)).map((one) =>
        ({ run, runNumber, evaluation, entry: byFile(evaluation).get(one.file), base: byFile(base).get(one.file) }));
      openDetail(list, Math.max(0, list.findIndex((one) => one.entry.file === entry.file)));
    });
    const node = el("figure", { className: "card" }, button, el("figcaption", {}, promptText(entry.text), el("span", { className: "facts" },
      entry.tag ? el("small", { className: "tag" }, entry.tag) : null, value)));
    const show = (evaluation) => {
      shown = evaluation;
      const now = byFile(evaluation).get(entry.file);
      setPicture(right, now ? imageAddress(runNumber, evaluation, entry.file) : null, now ? alt(`step ${evaluation.step}`) : "not kept at this step");
      button.disabled = !now;
      node.className = `card ${correctness(now && now.correct)}`;
      mark.replaceChildren(el("small", {}, `step ${evaluation.step} `, checkMark(now && now.correct)));
      value.textContent = `${number(before && before.scores[score])} → ${number(now && now.scores[score])}`;
    };
    return { file: entry.file, source: entry.source, node, show };
  });
}

"use strict";
// Gallery: many images, filtered and sorted.

const gallery = { run: "all", task: "", tag: "", text: "", correct: "", low: "", high: "", score: null, step: "last", sort: "prompt" };
const CHUNK = 120; // images that are added at once

const SORTS = {
  prompt: ["prompt", (a, b) => a.entry.prompt - b.entry.prompt || a.evaluation.step - b.evaluation.step],
  better: ["most improved first", (a, b) => down(b.change) - down(a.change)],
  worse: ["most worsened first", (a, b) => up(a.change) - up(b.change)],
  high: ["highest score first", (a, b) => down(b.value) - down(a.value)],
  low: ["lowest score first", (a, b) => up(a.value) - up(b.value)],
};
const down = (value) => (isNumber(value) ? value : -Number.MAX_VALUE);
const up = (value) => (isNumber(value) ? value : Number.MAX_VALUE);

function galleryPage(runs) {
  const state = gallery;
  const names = [...new Set(runs.flatMap(scoreNames))];
  if (!names.includes(state.score)) state.score = names[0];
  const count = el("p", { className: "count", role: "status" });
  const grid = el("div", { className: "grid" });
  const more = el("button", { type: "button", hidden: true }, "Show more");
  const results = { list: [], shown: 0 };

  const add = () => {
    const part = results.list.slice(results.shown, results.shown + CHUNK);
    grid.append(...part.map((item, i) => galleryCard(item, results.list, results.shown + i, runs.length > 1)));
    results.shown += part.length;
    more.hidden = results.shown >= results.list.length;
  };
  const filter = (change) => {
    Object.assign(state, change);
    const all = galleryItems(runs, state);
    results.list = all.filter((item) => matches(item, state)).sort(SORTS[state.sort][1]);
    results.shown = 0;
    grid.replaceChildren();
    grid.classList.toggle("with-source", results.list.some((item) => item.entry.source));
    count.textContent = `${results.list.length} of ${all.length} images`;
    add();
  };
  more.addEventListener("click", add);
  new IntersectionObserver(([entry]) => entry.isIntersecting && !more.hidden && add(), { rootMargin: "600px" }).observe(more);
  filter({});
  return el("div", {}, el("h2", {}, "Gallery"), galleryControls(runs, names, state, filter), count, grid, more);
}

function galleryControls(runs, names, state, filter) {
  const steps = [...new Set(runs.flatMap((run) => run.evaluations.map((one) => one.step)))].sort((a, b) => a - b);
  const allTags = [...new Set(runs.flatMap(tags))];
  const tasks = [...new Set(runs.flatMap((run) => run.tasks))];
  const pairs = (values, all) => [["", all], ...values.map((value) => [value, value])];
  const range = (key, placeholder) => el("input", { type: "number", step: "any", value: state[key], placeholder, "aria-label": `${placeholder} score`, oninput: (event) => filter({ [key]: event.target.value }) });
  const known = (value, values) => (values.includes(value) ? value : "");
  state.tag = known(state.tag, allTags);
  state.task = known(state.task, tasks);
  return el("div", { className: "controls" },
    runs.length > 1 ? labelled("Run", select([["all", "all"], ...runs.map((run, i) => [String(i), run.name])], state.run, (run) => filter({ run }))) : null,
    tasks.length > 1 ? labelled("Task", select(pairs(tasks, "all"), state.task, (task) => filter({ task }))) : null,
    allTags.length ? labelled("Tag", select(pairs(allTags, "all"), state.tag, (tag) => filter({ tag }))) : null,
    labelled("Prompt", el("input", { type: "search", value: state.text, placeholder: "contains", oninput: (event) => filter({ text: event.target.value }) })),
    labelled("Step", select([["last", "last"], ["all", "all"], ...steps.map((step) => [String(step), String(step)])], state.step, (step) => filter({ step }))),
    labelled("Correct", select([["", "all"], ["correct", "correct"], ["wrong", "wrong"]], state.correct, (correct) => filter({ correct }))),
    labelled("Score", select(names.map((name) => [name, name]), state.score, (score) => filter({ score }))),
    el("fieldset", {}, el("legend", {}, "Range"), range("low", "from"), range("high", "to")),
    labelled("Sort", select(Object.entries(SORTS).map(([key, [text]]) => [key, text]), state.sort, (sort) => filter({ sort }))));
}

/** Every image of the chosen steps: {run, runNumber, evaluation, entry, base, value, change}. */
function galleryItems(runs, { step, score }) {
  return runs.flatMap((run, runNumber) => {
    const evaluations = step === "all" ? run.evaluations : step === "last" ? run.evaluations.slice(-1) : run.evaluations.filter((one) => one.step === Number(step));
    return evaluations.flatMap((evaluation) => evaluation.images.map((entry) => {
      const base = byFile(run.evaluations[0]).get(entry.file);
      const value = entry.scores[score];
      const before = base && base.scores[score];
      return { run, runNumber, evaluation, entry, base, value, change: isNumber(value) && isNumber(before) ? value - before : null };
    }));
  });
}

function matches({ run, runNumber, entry, value }, state) {
  return (state.run === "all" || Number(state.run) === runNumber)
    && (!state.task || run.tasks.includes(state.task))
    && (!state.tag || entry.tag === state.tag)
    && (!state.text || entry.text.toLowerCase().includes(state.text.toLowerCase()))
    && (!state.correct || correctness(entry.correct) === state.correct)
    && (state.low === "" || value >= Number(state.low))
    && (state.high === "" || value <= Number(state.high));
}

function galleryCard(item, list, index, several) {
  const { run, runNumber, evaluation, entry, value, change } = item;
  const image = picture(imageAddress(runNumber, evaluation, entry.file), short(`${entry.text}, step ${evaluation.step}`), { loading: "lazy" });
  const button = el("button", { type: "button", className: "images", onclick: () => openDetail(list, index) },
    sourceImage(runNumber, evaluation, entry), el("span", {}, image, entry.source ? el("small", {}, "result") : null));
  const facts = [several ? run.name : null, entry.tag, `step ${evaluation.step}`];
  return el("figure", { className: `card ${correctness(entry.correct)}` }, button,
    el("figcaption", {}, promptText(entry.text), el("span", { className: "facts" },
      el("small", { className: "tag" }, facts.filter(Boolean).join(" · ")),
      el("span", { className: "value" }, checkMark(entry.correct), ` ${number(value)}`,
        evaluation === run.evaluations[0] ? null : el("small", {}, ` ${signed(change)}`)))));
}

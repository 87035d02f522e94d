"use strict";
// Groups: the images of one group of a rollout, ordered by their advantages.

const groups = { run: 0, epoch: null };

function groupsPage(runs) {
  const state = groups;
  const run = runs[state.run] || runs[0];
  const runNumber = runs.indexOf(run);
  const controls = el("div", { className: "controls" });
  if (runs.length > 1) controls.append(runSelect(runs, runNumber, (i) => { Object.assign(state, { run: i, epoch: null }); showPage(); }));
  const rollouts = run.rollouts;
  if (!rollouts.length) return el("div", {}, el("h2", {}, "Groups"), controls, nothing(run));
  const found = rollouts.findIndex((one) => one.epoch === state.epoch);
  const content = el("div", {});
  const where = el("output", { htmlFor: "epoch" });
  const slider = el("input", { type: "range", id: "epoch", min: 0, max: rollouts.length - 1, value: found < 0 ? rollouts.length - 1 : found, oninput: (event) => show(Number(event.target.value)) });
  function show(i) {
    const rollout = rollouts[i];
    state.epoch = i === rollouts.length - 1 ? null : rollout.epoch;
    where.textContent = `epoch ${rollout.epoch + 1} (${i + 1} of ${rollouts.length} kept)`;
    slider.setAttribute("aria-valuetext", `epoch ${rollout.epoch + 1}`);
    content.replaceChildren(...rollout.groups.map((group) => groupSection(runNumber, rollout, group)));
  }
  show(Number(slider.value));
  return el("div", {}, el("h2", {}, "Groups"),
    el("p", {}, "Images that were sampled for training, with their advantages: learning makes the first ones likelier and the last ones less likely."),
    controls, el("div", { className: "player" }, labelled("Epoch", slider), where), content);
}

function groupSection(runNumber, rollout, group) {
  const address = imageAddress(runNumber, rollout, group.file);
  const rewards = group.scores.reward.filter(isNumber);
  const average = mean(rewards);
  const deviation = rewards.length ? Math.sqrt(mean(rewards.map((value) => (value - average) ** 2))) : null;
  const rows = Math.ceil(group.advantages.length / group.columns);
  const items = group.advantages.map((advantage, i) => {
    const tile = el("span", { className: "tile", role: "img", "aria-label": `image ${i + 1} of ${group.advantages.length}` });
    const share = (place, count) => (count > 1 ? (place / (count - 1)) * 100 : 0);
    Object.assign(tile.style, {
      backgroundImage: `url("${address}")`,
      backgroundSize: `${group.columns * 100}% ${rows * 100}%`,
      backgroundPosition: `${share(i % group.columns, group.columns)}% ${share(Math.floor(i / group.columns), rows)}%`,
    });
    const scores = Object.entries(group.scores).filter(([name]) => name !== "reward").map(([name, values]) => `${name} ${number(values[i])}`);
    return el("li", { title: scores.join("\n"), className: advantage > 0 ? "up" : advantage < 0 ? "down" : "" }, tile,
      el("b", {}, signed(advantage)), el("small", {}, `reward ${number(group.scores.reward[i])}`));
  });
  const list = el("ol", { className: "tiles" }, items);
  const sheet = new Image();
  sheet.addEventListener("load", () => {
    list.style.setProperty("--shape", `${sheet.naturalWidth / group.columns} / ${sheet.naturalHeight / rows}`);
    list.classList.toggle("pixels", sheet.naturalWidth / group.columns < 96);
  });
  sheet.addEventListener("error", () => list.before(el("p", { className: "notice" }, `Missing image: ${decodeURIComponent(address.split("?")[0])}`)));
  sheet.src = address;
  return el("section", { className: "group" }, promptText(group.text, "h3"),
    el("p", {}, [group.tag, `reward ${number(average)} ± ${number(deviation)}`, `seed ${group.seed}`].filter(Boolean).join(" · ")), sourceImage(runNumber, rollout, group, "figure"), list);
}

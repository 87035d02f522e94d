"use strict";
// One image in full size: its scores beside those before training, its seed, and what the rewards saw on it.

const detail = { list: [], index: 0, boxes: true };

/** Open the image number `index` of a list of {run, runNumber, evaluation, entry, base}. */
function openDetail(list, index) {
  Object.assign(detail, { list, index });
  if (!detail.dialog) {
    detail.dialog = el("dialog", { className: "detail", "aria-label": "Image", onkeydown: detailKey });
    detail.dialog.addEventListener("click", (event) => event.target === detail.dialog && detail.dialog.close());
    document.body.append(detail.dialog);
  }
  drawDetail();
  if (!detail.dialog.open) detail.dialog.showModal();
}

function detailKey(event) {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move && event.target.tagName !== "INPUT") moveDetail(move);
}

function moveDetail(by) {
  detail.index = Math.max(0, Math.min(detail.list.length - 1, detail.index + by));
  drawDetail();
}

function drawDetail() {
  const { dialog, list, index } = detail;
  const { run, runNumber, evaluation, entry, base } = list[index];
  const first = run.evaluations[0];
  const both = base && evaluation !== first;
  const names = Object.keys(entry.scores);
  const rows = names.map((name) => {
    const [before, now] = [base ? base.scores[name] : null, entry.scores[name]];
    return el("tr", {}, el("th", { scope: "row" }, name), both ? el("td", {}, number(before)) : null, el("td", {}, number(now)),
      both ? el("td", {}, signed(isNumber(before) && isNumber(now) ? now - before : null)) : null);
  });
  const head = ["score", ...(both ? ["base", `step ${evaluation.step}`, "change"] : [`step ${evaluation.step}`])];
  const seen = entry.detections || [];
  const facts = { run: run.name, tag: entry.tag, "prompt number": entry.prompt, seed: entry.seed, "optimiser step": evaluation.step };
  const toggle = el("input", { type: "checkbox", checked: detail.boxes, onchange: (event) => {
    detail.boxes = event.target.checked;
    dialog.classList.toggle("boxes", detail.boxes);
  } });
  dialog.classList.toggle("boxes", detail.boxes);
  const hadFocus = dialog.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  dialog.replaceChildren(
    el("div", { className: "bar" },
      el("button", { type: "button", "data-name": "previous", disabled: index === 0, onclick: () => moveDetail(-1) }, "← Previous"),
      el("span", {}, `${index + 1} of ${list.length}`),
      el("button", { type: "button", "data-name": "next", disabled: index === list.length - 1, onclick: () => moveDetail(1) }, "Next →"),
      el("button", { type: "button", "data-name": "close", onclick: () => dialog.close() }, "Close")),
    promptText(entry.text, "h2"),
    el("div", { className: "pair" },
      sourceImage(runNumber, evaluation, entry, "figure", { width: 512, height: 512 }),
      both ? largeImage(runNumber, first, base, `base, step ${first.step}`) : null,
      largeImage(runNumber, evaluation, entry, `step ${evaluation.step}`)),
    seen.length || (both && base.detections.length) ? el("label", { className: "check" }, toggle, "Show what the reward saw") : null,
    el("div", { className: "columns" },
      el("table", {}, el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, rows)),
      el("dl", {}, Object.entries(facts).filter(([, value]) => value !== null).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]),
        seen.length ? [el("dt", {}, "seen"), el("dd", {}, seen.map((one) => `${one.label} (${number(one.score)})`).join(", "))] : null)),
  );
  const wanted = hadFocus && dialog.querySelector(`[data-name="${hadFocus}"]:not(:disabled)`);
  (wanted || dialog.querySelector('[data-name="close"]')).focus();
}

function largeImage(runNumber, evaluation, entry, caption) {
  const frame = picture(imageAddress(runNumber, evaluation, entry.file), short(`${entry.text}, ${caption}`), { width: 512, height: 512 });
  for (const one of entry.detections || []) frame.append(detectionBox(one));
  return el("figure", {}, frame, el("figcaption", {}, caption, " ", checkMark(entry.correct)));
}

function detectionBox({ label, box }) {
  const [x0, y0, x1, y1] = box.map((share) => Math.max(0, Math.min(1, share)) * 100);
  const node = el("span", { className: y0 < 12 ? "box low" : "box", "aria-hidden": "true" }, el("b", { dir: "auto" }, label));
  Object.assign(node.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
  return node;
}

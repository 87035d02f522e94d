"use strict";
// What all pages share: elements, numbers, and the images of a run. Texts of a run are only ever set as text.

const COLORS = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6", "--line-7", "--line-8"];

/** Make an element. Properties that start with "on" are listeners; strings among the children become text. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A labelled control. */
function labelled(text, control) {
  return el("label", {}, el("span", {}, text), control);
}

/** A select of [value, text] pairs; `chosen` is kept if it is among them. */
function select(pairs, chosen, onchange) {
  const options = pairs.map(([value, text]) => el("option", { value, selected: value === chosen }, text));
  return el("select", { onchange: (event) => onchange(event.target.value) }, options);
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** A number with three significant digits at least, "–" if there is none. */
function number(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000 || Number.isInteger(value)) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return size !== 0 && size < 0.001 ? value.toExponential(1) : value.toFixed(3);
}

function signed(value) {
  return isNumber(value) ? (value > 0 ? "+" : value < 0 ? "−" : "±") + number(Math.abs(value)) : "–";
}

function short(text, length = 160) {
  return text.length > length ? text.slice(0, length) + "…" : text;
}

/** A prompt, in its own direction of writing. */
function promptText(text, tag = "span") {
  return el(tag, { className: "prompt", dir: "auto" }, text);
}

function imageAddress(runNumber, entry, file) {
  return `runs/${runNumber}/${encodeURIComponent(entry.folder)}/${encodeURIComponent(file)}?${entry.time || 0}`;
}

/** An image that says so when its file is missing. */
function picture(address, alt, properties = {}) {
  const image = el("img", { decoding: "async", width: 128, height: 128, ...properties });
  const frame = el("span", { className: "picture" }, image);
  image.addEventListener("error", () => {
    frame.classList.add("missing");
    image.alt = `Missing image: ${image.dataset.file}`;
  });
  image.addEventListener("load", () => {
    frame.classList.remove("missing");
    image.classList.toggle("pixels", image.naturalWidth < 96);
  });
  setPicture(frame, address, alt);
  return frame;
}

/** Show another image in a `picture`; without an address, an empty frame with the text. */
function setPicture(frame, address, alt) {
  const image = frame.firstChild;
  image.alt = alt;
  frame.classList.toggle("absent", !address);
  if (!address) {
    image.removeAttribute("src");
  } else if (image.getAttribute("src") !== address) {
    frame.classList.remove("missing");
    image.dataset.file = decodeURIComponent(address.split("?")[0]);
    image.src = address;
  }
}

/** The source image of an editing prompt with its label, as a `tag`; null where the prompt has none. */
function sourceImage(runNumber, entry, { source, text }, tag = "span", properties = { loading: "lazy" }) {
  if (!source) return null;
  const caption = el(tag === "figure" ? "figcaption" : "small", {}, "source");
  return el(tag, { className: "source" }, picture(imageAddress(runNumber, entry, source), short(`${text}, source`), properties), caption);
}

/** The entries of an evaluation by their file names, which are the same in every evaluation of a run. */
const byFile = (() => {
  const known = new WeakMap();
  return (evaluation) => {
    if (!known.has(evaluation)) known.set(evaluation, new Map(evaluation.images.map((image) => [image.file, image])));
    return known.get(evaluation);
  };
})();

function correctness(correct) {
  return correct === true ? "correct" : correct === false ? "wrong" : "";
}

/** "✓" or "✗" with its meaning as text, for what was checked. */
function checkMark(correct) {
  const text = correctness(correct);
  return text ? el("span", { className: text, role: "img", "aria-label": text }, correct ? "✓" : "✗") : "";
}

/** The names of the scores of the images of a run. */
function scoreNames(run) {
  const names = run.evaluations.flatMap((evaluation) => evaluation.images.slice(0, 1).flatMap((i) => Object.keys(i.scores)));
  return [...new Set(names)];
}

function tags(run) {
  return [...new Set(run.evaluations.flatMap((evaluation) => evaluation.images.map((image) => image.tag)))].filter(Boolean);
}

function runSelect(runs, chosen, onchange) {
  return labelled("Run", select(runs.map((run, i) => [String(i), run.name]), String(chosen), (value) => onchange(Number(value))));
}

/** What a page says instead of images. */
function nothing(run) {
  const off = run.settings["evaluation.gallery"] === "0";
  const reason = off ? "Its setting evaluation.gallery is 0." : "They appear after its first evaluation.";
  return el("p", { className: "empty" }, `${run.name} has no images yet. ${reason}`);
}

"use strict";
// The page that the address names, and the data: given with the page, or asked of the server again and again.

const PAGES = { evolution: evolutionPage, gallery: galleryPage, runs: runsPage, groups: groupsPage };
const POLL_MS = 2000;
let runs = [];

function currentPage() {
  const name = location.hash.slice(1);
  return name in PAGES ? name : "evolution";
}

/** Draw the current page anew; what has the focus keeps it where it is still there. */
function showPage() {
  const main = document.getElementById("main");
  const name = currentPage();
  const focused = main.contains(document.activeElement) ? focusPath(document.activeElement) : null;
  main.replaceChildren(runs.length ? PAGES[name](runs) : el("p", { className: "empty" }, "Loading…"));
  if (focused) restoreFocus(focused);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const problems = runs.flatMap((run) => run.problems.map((text) => el("li", {}, runs.length > 1 ? `${run.name}: ${text}` : text)));
  document.getElementById("problems").replaceChildren(...(problems.length ? [el("ul", { className: "notice", role: "alert" }, problems)] : []));
  document.title = `${runs.map((run) => run.name).join(", ")} – ${name}`;
}

const FOCUSABLE = "button, input, select, summary, .plot";

function focusPath(node) {
  const index = [...document.querySelectorAll(`main :is(${FOCUSABLE})`)].indexOf(node);
  return { index, caret: node.tagName === "INPUT" && node.type === "search" ? node.selectionStart : null };
}

function restoreFocus({ index, caret }) {
  const node = document.querySelectorAll(`main :is(${FOCUSABLE})`)[index];
  if (!node) return;
  node.focus({ preventScroll: true });
  if (caret !== null && node.setSelectionRange) node.setSelectionRange(caret, caret);
}

function say(text) {
  const status = document.getElementById("status");
  if (status.textContent !== text) status.textContent = text;
}

/** Ask the server for the runs; true if one has changed. Unchanged ones cost the server a look at its files. */
async function load(versions) {
  let changed = false;
  for (let i = 0; i < window.fastflowgrpo.runs.length; i++) {
    const response = await fetch(`runs/${i}.json`, { headers: versions[i] ? { "If-None-Match": versions[i] } : {}, cache: "no-store" });
    if (response.status === 304) continue;
    if (!response.ok) throw new Error(`the viewer answers with ${response.status}`);
    runs[i] = await response.json();
    versions[i] = response.headers.get("ETag");
    changed = true;
  }
  return changed;
}

async function poll(versions) {
  try {
    // A page that plays or shows an image is left alone; it is drawn when that ends.
    const busy = evolution.timer || (detail.dialog && detail.dialog.open);
    if (!busy && (await load(versions))) showPage();
    say(runs.every((run) => run.finished) ? "finished" : "live");
  } catch (error) {
    say("No answer: the viewer has stopped.");
  }
  setTimeout(poll, document.hidden ? 10 * POLL_MS : POLL_MS, versions);
}

window.addEventListener("hashchange", () => {
  if (location.hash === "#main") return;
  stopPlaying();
  showPage();
});
if (!window.fastflowgrpo) {
  document.getElementById("main").replaceChildren(el("p", { className: "notice" }, "data.js is missing: export the runs again."));
} else if (window.fastflowgrpo.live) {
  showPage();
  poll([]);
} else {
  runs = window.fastflowgrpo.runs;
  showPage();
}

// Start of the page: reads the address, shows its view, and keeps focus where it was.

import { isQuestion, showAsk } from "./ask.js";
import { showHome, listen } from "./home.js";
import { showQueries } from "./queries.js";
import { changed, go, readRoute } from "./route.js";
import { hideSample, showSample } from "./sample.js";
import { showShares } from "./shares.js";
import { restore } from "./upload.js";
import { showVersions } from "./versions.js";

const VIEWS = {
  ask: (main, params, signal) =>
    isQuestion(params) ? showAsk(main, params, signal, open) : showHome(main, params, signal),
  queries: showQueries,
  shares: showShares,
  versions: showVersions,
};
const TITLES = {
  ask: "Which training images made this picture?",
  queries: "Scored queries",
  shares: "Shares",
  versions: "Versions",
};

let shown = null;
let leaving = new AbortController();
let opener = null;

/** Open the dialog of a training sample: it has a place in the address as well. */
function open(trainId) {
  opener = document.activeElement?.id;
  const { view, params } = readRoute();
  go(view, changed(params, { open: String(trainId) }));
}

function closed() {
  const { view, params } = readRoute();
  if (!params.has("open")) return;
  go(view, changed(params, { open: null }), { replace: true });
  if (opener) document.getElementById(opener)?.focus();
}

async function show({ again = false } = {}) {
  const { view, params } = readRoute();
  const name = VIEWS[view] ? view : "ask";
  const place = changed(params, { open: null }).toString();
  const before = shown;
  shown = { name, place };
  if (again || before?.name !== name || before?.place !== place) showView(name, params, before);
  if (params.has("open")) await showSample(params.get("open"), { closed, signal: leaving.signal });
  else hideSample();
}

function showView(name, params, before) {
  const main = document.getElementById("main");
  const focused = document.activeElement?.id;
  leaving.abort();
  leaving = new AbortController();
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[name]} · FastGDA`;
  if (before && (before.name !== name || document.activeElement === document.body)) scrollTo(0, 0);
  const { signal } = leaving;
  main.setAttribute("aria-busy", "true");
  const drawing = VIEWS[name](main, params, signal);
  refocus(main, focused, before);
  Promise.resolve(drawing).then(() => {
    if (signal.aborted) return;
    main.setAttribute("aria-busy", "false");
    // A panel is drawn when its question is known.
    if ([document.body, main].includes(document.activeElement)) refocus(main, focused, before);
  });
}

/** Give the focus back to the control that had it; of a new view it is at its beginning. */
function refocus(main, focused, before) {
  const same = focused && document.getElementById(focused);
  if (same) same.focus({ preventScroll: true });
  else if (before) main.focus({ preventScroll: true });
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
addEventListener("hashchange", () => show());
addEventListener("again", () => show({ again: true }));
listen();
await restore();
await show();

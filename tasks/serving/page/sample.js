// The dialog of one training sample.

import * as api from "./api.js";
import { el, facts, line, put } from "./dom.js";
import { errorLine } from "./errors.js";
import { caption, mat, picture, queryCards } from "./pictures.js";
import { href } from "./route.js";
import { fileName, plural, whole } from "./words.js";

const SHOWN = 60;

/** Show a sample; `closed` is called when the dialog is left by Escape, its button or a click beside it. */
export async function showSample(trainId, { closed, signal }) {
  const dialog = document.getElementById("dialog");
  const leave = el("button", {
    type: "button",
    class: "close",
    "aria-label": "Close",
    text: "×",
    click: () => dialog.close(),
  });
  const body = el(
    "div",
    { class: "sheet" },
    el("h2", { id: "dialog-title", text: `Training image ${trainId}` }),
    line("quiet", "It is being read"),
  );
  put(dialog, leave, body);
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close();
  };
  dialog.onclose = closed;
  if (!dialog.open) dialog.showModal();
  try {
    const sample = await api.sample(trainId, signal);
    put(body, sheet(sample));
  } catch (error) {
    if (error.name !== "AbortError")
      put(body, el("h2", { id: "dialog-title", text: `Training image ${trainId}` }), errorLine(error));
  }
}

export function hideSample() {
  const dialog = document.getElementById("dialog");
  dialog.onclose = null;
  dialog.close();
}

function sheet(sample) {
  const title = caption(sample.captions);
  const others = sample.captions.slice(1);
  const influenced = sample.influenced ?? [];
  return [
    el(
      "div",
      { class: "sheet-head" },
      mat(picture(api.sampleImage(sample.train_id, 512), title, { loading: "eager" })),
      el(
        "div",
        {},
        el("h2", { id: "dialog-title", text: title }),
        others.length ? line("quiet", others.join(" · ")) : null,
        facts(known(sample)),
        el("a", {
          class: "button",
          id: "search-by-this",
          href: href("ask", { sample: sample.train_id }),
          text: "Search by this",
        }),
      ),
    ),
    el("h3", {
      text: influenced.length
        ? `It influenced ${plural(influenced.length, "scored query", "scored queries")}`
        : "It influenced no scored query",
    }),
    line(
      "quiet",
      influenced.length
        ? "Those in whose first 100 training images it is, by the teacher."
        : "It is among no query's first 100 training images.",
    ),
    queryCards(influenced.slice(0, SHOWN), (query) => href("ask", { query: query.query_id })),
    influenced.length > SHOWN ? line("quiet", `and ${whole(influenced.length - SHOWN)} more`) : null,
  ];
}

function known(sample) {
  const own = [
    ["Tar", fileName(sample.shard)],
    ["Key", sample.key],
    ["Place", `byte ${whole(sample.offset)}`],
    ["Size", sample.width ? `${sample.width} × ${sample.height}` : ""],
    ["train_id", sample.train_id],
    ["Look the same", sample.duplicates?.length ? sample.duplicates.join(", ") : ""],
  ];
  const metadata = Object.entries(sample.metadata ?? {}).map(([name, value]) => [
    name,
    typeof value === "object" ? JSON.stringify(value) : value,
  ]);
  return [...own, ...metadata];
}

// One question answered in several ways, side by side: a column each, a row for each rank.

import { el, line } from "./dom.js";
import { card, sizeOf } from "./pictures.js";
import { WAYS, sentence, whole, withError } from "./words.js";

/** What holds a picture: those that look the same are one. */
const samples = (hit) => [hit.train_id, ...(hit.duplicates ?? [])];

/** Ranks by train_id, those of folded pictures among them. */
function ranks(hits) {
  return new Map(hits.flatMap((hit) => samples(hit).map((id) => [id, hit.rank])));
}

const rankIn = (places, hit) =>
  samples(hit)
    .map((id) => places.get(id))
    .find(Boolean);

/** The columns of an answer: its own first, then those beside it. */
export function columns(answer, open) {
  const { hits, agreement } = answer;
  const own = { way: answer.tier, space: "", hits, agreement, notes: [] };
  const all = [own, ...answer.beside];
  const places = all.map((column) => ranks(column.hits));
  const others = (hit) => places.slice(1).filter((other) => rankIn(other, hit)).length;
  const mark = (column, hit) => {
    if (column !== own) return (rank) => (rank ? `${WAYS[own.way].name}: ${rank}` : null);
    return () => (others(hit) ? `in ${others(hit)} of ${answer.beside.length}` : null);
  };
  const grid = el(
    "div",
    { class: "columns" },
    all.map((column) => drawn(column, own, (hit) => mark(column, hit)(rankIn(places[0], hit)), open)),
  );
  grid.style.setProperty("--columns", all.length);
  grid.style.setProperty("--ranks", Math.max(1, ...all.map((column) => column.hits.length)));
  for (const event of ["pointerover", "focusin"]) grid.addEventListener(event, ({ target }) => showSame(grid, target));
  for (const event of ["pointerleave", "focusout"]) grid.addEventListener(event, () => showSame(grid, null));
  return el(
    "section",
    { class: "part", id: "ways", "aria-labelledby": "ways-title" },
    el("h2", { id: "ways-title", text: "The same question in other ways" }),
    line(
      "lead",
      answer.beside.length
        ? `A frame marks what ${WAYS[own.way].name} names as well, with its rank there. Above a column stands how far ` +
            "it agrees with the teacher."
        : "No other way answers this question at once.",
    ),
    grid,
    all.map(({ way, space, notes }) => [
      space ? line("quiet", `${WAYS[way].name}: nearest by the untuned features ${space}, which no teacher taught.`) : null,
      notes.map((text) => line("quiet", `${WAYS[way].name}: ${sentence(text)}`)),
    ]),
  );
}

function drawn(column, own, also, open) {
  const { way, space, hits, agreement } = column;
  const marks = hits.map(also);
  const shared = marks.filter(Boolean).length;
  const strongest = Math.max(0, ...hits.map(sizeOf));
  const name = WAYS[way].name;
  return el(
    "section",
    { class: "way", id: `way-${way}`, "aria-label": name },
    el(
      "header",
      {},
      el("h3", { text: name }),
      line("quiet made", space ? `${WAYS[way].made} ${space}` : WAYS[way].made),
      agreed(agreement),
      column === own ? null : line("shares", `${whole(shared)} of ${whole(hits.length)} as ${WAYS[own.way].name}`),
    ),
    hits.length
      ? el(
          "ol",
          {},
          hits.map((hit, place) => card(hit, { open, strongest, also: marks[place], name: way })),
        )
      : line("empty", "Nothing is known here."),
  );
}

function agreed({ measure, value, error }) {
  const [what, figure] = value === null ? ["agreement", "not measured"] : [measure, withError(value, error)];
  return el(
    "p",
    { class: "quiet", title: "Agreement with the teacher" },
    el("span", { class: "measure", text: `${what} ` }),
    figure,
  );
}

/** Mark a picture in all columns while it is pointed at in one. */
function showSame(grid, target) {
  const sample = target?.closest("[data-sample]")?.dataset.sample;
  for (const each of grid.querySelectorAll("[data-sample]"))
    each.classList.toggle("same", each.dataset.sample === sample);
}

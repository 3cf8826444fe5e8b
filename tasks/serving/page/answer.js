// An answer: the label that says how far to believe it, and its galleries.

import { el, facts, line } from "./dom.js";
import { gallery } from "./pictures.js";
import { TIERS, figure, percent, plural, sentence, whole, withError } from "./words.js";

const CAVEAT = "This is what the model's maths says. It is not proof.";

/** The label beside an answer, as a museum has one beside a picture: what matters first, the rest on demand. */
export function label(answer) {
  return plate(answer, [
    el(
      "p",
      { class: "plate-head" },
      el("span", { class: "tier tier-name", text: TIERS[answer.tier].name }),
      el("span", { class: "caveat", text: CAVEAT }),
    ),
    answer.agreement.note ? line("warning", sentence(answer.agreement.note)) : null,
    answer.notes.map((text) => line("note", sentence(text))),
  ]);
}

function plate(answer, head) {
  const { agreement, versions, influence } = answer;
  const tier = TIERS[answer.tier];
  const first = [
    [
      "Agreement with the teacher",
      agreement.value === null ? "not measured" : withError(agreement.value, agreement.error),
    ],
    answer.tier === "fast"
      ? ["Found of exact search", versions.recall_at_100 === null ? "not measured" : percent(versions.recall_at_100)]
      : ["Influence in these images", influence ? percent(influence.share) : "–"],
    ["Version", String(versions.published)],
    ["Lineage", el("code", { id: "lineage", text: answer.lineage.slice(0, 16) })],
  ];
  return el(
    "section",
    { class: "plate", "aria-label": `How far to believe the answer of tier ${tier.name}` },
    head,
    el(
      "dl",
      { class: "figures" },
      first.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", {}, value))),
    ),
    el(
      "details",
      {},
      el("summary", { text: "How this was made and measured" }),
      el("p", { text: tier.says }),
      facts(details(answer)),
    ),
  );
}

function details({ agreement, versions, influence, lineage, seconds }) {
  const measured = agreement.value === null ? "" : `${agreement.measure}, on queries that chose nothing`;
  return [
    ["Teacher", agreement.teacher],
    ["Measure", measured],
    [
      "All figures",
      agreement.measures.map((each) => `${each.name} ${withError(each.value, each.error)}`).join(", "),
    ],
    [
      "Index",
      versions.index &&
        `${versions.index} (${[versions.index_kind, plural(versions.vectors, "image")].filter(Boolean).join(", ")})`,
    ],
    [
      "Recall",
      versions.recall_at_100 === null
        ? "not measured"
        : `${percent(versions.recall_at_10)} of the first 10, ${percent(versions.recall_at_100)} of the first 100`,
    ],
    [
      "Influence",
      influence &&
        `${whole(influence.scored)} images; sums ${figure(influence.positive)} and ${figure(influence.negative)}`,
    ],
    ["Head", versions.head],
    ["Run", versions.run],
    ["Snapshot", versions.snapshot],
    ["Lineage", lineage],
    ["Took", `${figure(seconds)} s`],
  ];
}

/** The sections of one answer, below each other. */
export function sections(answer, open) {
  return [
    section(
      "raised",
      "What raised it",
      "The model was more likely to draw this picture because of these.",
      answer.hits,
      open,
      "No training image is left: take a filter away.",
    ),
    section(
      "lowered",
      "What lowered it",
      "Without these, the model would have been more likely to draw it.",
      answer.lowering,
      open,
    ),
    section(
      "similar",
      "Alike, yet of little influence",
      "Untuned features find them similar, and the head ranks them far down.",
      answer.similar,
      open,
    ),
  ];
}

function section(id, title, says, hits, open, empty = null) {
  if (!hits.length && !empty) return null;
  return el(
    "section",
    { class: `part ${id}`, id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title`, text: title }),
    line("lead", says),
    hits.length ? gallery(hits, open) : line("empty", empty),
  );
}

/** Two tiers' answers beside each other, each {title, hits, answer}; what both hold is marked. */
export function sideBySide(left, right, open) {
  const places = [left, right].map(({ hits }) => new Map(hits.map((hit) => [hit.train_id, hit.rank])));
  const both = left.hits.filter((hit) => places[1].has(hit.train_id)).length;
  const answers = [left.answer, right.answer];
  const warnings = new Set(answers.map(({ agreement }) => agreement.note).filter(Boolean));
  const notes = new Set(answers.flatMap((answer) => answer.notes));
  const column = (side, other, rank) =>
    el(
      "section",
      { class: "column", "aria-label": side.title },
      el("h2", { text: side.title }),
      plate(side.answer, null),
      side.hits.length
        ? gallery(side.hits, open, (id) => (rank.has(id) ? `${other.title}: ${rank.get(id)}` : null), side.answer.tier)
        : line("empty", "Nothing is known here."),
    );
  return [
    el(
      "header",
      { class: "beside-head" },
      line("caveat", CAVEAT),
      [...warnings].map((text) => line("warning", sentence(text))),
      [...notes].map((text) => line("note", sentence(text))),
      line("lead", `${whole(both)} of the ${plural(left.hits.length, "image")} on the left are on the right as well.`, {
        id: "overlap",
      }),
    ),
    el("div", { class: "beside" }, column(left, right, places[1]), column(right, left, places[0])),
  ];
}

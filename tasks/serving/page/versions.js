// Versions of the index: what is served, and how good each was measured to be.

import * as api from "./api.js";
import { history } from "./charts.js";
import { el, facts, line, put } from "./dom.js";
import { showError } from "./errors.js";
import { date, percent, whole, withError } from "./words.js";

export function showVersions(main, _params, signal) {
  const body = el("div", {}, line("quiet", "Versions are being read"));
  put(
    main,
    el(
      "header",
      { class: "head" },
      el("h1", { text: "Versions" }),
      line(
        "lead",
        "Every index that was built, what it finds of exact search, and how well its order agrees with the teacher.",
      ),
    ),
    body,
  );
  return api.indexes(signal).then(
    ({ indexes }) => put(body, versions(indexes)),
    showError(body),
  );
}

function versions(indexes) {
  if (!indexes.length) return [line("empty", "No index has been built yet: `fastgda index build` makes one.")];
  const oldest = [...indexes].sort((one, other) => String(one.created_at).localeCompare(String(other.created_at)));
  const points = (name, error) =>
    oldest.map((each) => ({
      name: short(each.version),
      value: each[name],
      error: error ? each[error] : null,
      served: each.served,
    }));
  const charts = [
    ["Agreement with the teacher (mAP)", points("map", "map_error")],
    ["Recall of the first 10", points("recall_at_10")],
    ["Recall of the first 100", points("recall_at_100")],
  ]
    .map(([title, values]) => [title, history(title, values)])
    .filter(([, chart]) => chart);
  return [
    el(
      "div",
      { class: "charts" },
      charts.map(([title, chart]) => el("figure", {}, el("figcaption", { text: title }), chart)),
    ),
    el("ol", { class: "versions" }, oldest.reverse().map(version)),
  ];
}

const short = (name) => String(name).split("/").at(-1).slice(0, 10);

function version(each) {
  const figures = [
    ["Images", each.vectors === undefined ? null : whole(each.vectors)],
    ["mAP", withError(each.map, each.map_error)],
    ["Recall@10", percent(each.recall_at_10)],
    ["Recall@100", percent(each.recall_at_100)],
    ["Head", each.head ? short(each.head) : null],
  ];
  return el(
    "li",
    { class: each.served ? "served" : null },
    el(
      "h2",
      {},
      el("code", { text: short(each.version) }),
      each.served ? el("span", { class: "tier", text: "served" }) : null,
      each.stale ? el("span", { class: "mark", text: "holds an image that was taken down" }) : null,
    ),
    line("quiet", [each.kind, date(each.created_at)].filter(Boolean).join(" · ")),
    facts(figures.filter(([, value]) => value !== "–")),
    each.reason ? line("quiet", each.reason) : null,
  );
}

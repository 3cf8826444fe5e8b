// The browser of scored queries.

import * as api from "./api.js";
import { announce, el, line, put, skeletons } from "./dom.js";
import { showError } from "./errors.js";
import { queryCards } from "./pictures.js";
import { changed, go, href } from "./route.js";
import { SPLITS, plural, whole } from "./words.js";

const PAGE = 48;

export function showQueries(main, params, signal) {
  const offset = Math.max(0, Number(params.get("offset")) || 0);
  const split = params.get("split") ?? "";
  const choice = el(
    "select",
    { id: "split", change: (event) => go("queries", { split: event.target.value }) },
    el("option", { value: "", text: "all splits" }),
    SPLITS.map((name) => el("option", { value: name, text: name, selected: name === split })),
  );
  const body = el("div", {}, skeletons(12));
  put(
    main,
    el(
      "header",
      { class: "head" },
      el("h1", { text: "Scored queries" }),
      line("lead", "Pictures of which the teacher has scored the training images. Each leads to its answer."),
      el("div", { class: "controls" }, el("label", {}, "Split ", choice)),
    ),
    body,
  );
  return api.queries({ split, offset, limit: PAGE }, signal).then(
    (page) => {
      announce(plural(page.total, "query", "queries"));
      put(
        body,
        page.queries.length
          ? queryCards(page.queries, (query) => href("ask", { query: query.query_id }))
          : line("empty", split ? `No query is of the split ${split}.` : "No query has been scored yet."),
        pager(params, offset, page.total),
      );
    },
    showError(body),
  );
}

function pager(params, offset, total) {
  if (total <= PAGE) return line("quiet", plural(total, "query", "queries"));
  const step = (text, to, there) =>
    el("a", {
      class: "button plain",
      id: `page-${text}`,
      text,
      ...(there ? { href: href("queries", changed(params, { offset: to || null })) } : { "aria-disabled": "true" }),
    });
  return el(
    "nav",
    { class: "pager", "aria-label": "Pages of queries" },
    step("Earlier", Math.max(0, offset - PAGE), offset > 0),
    el("span", { text: `${whole(offset + 1)}–${whole(Math.min(total, offset + PAGE))} of ${whole(total)}` }),
    step("Later", offset + PAGE, offset + PAGE < total),
  );
}

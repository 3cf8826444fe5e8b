// Shares of influence by any column of the samples.

import * as api from "./api.js";
import { shareBar } from "./charts.js";
import { action, announce, el, line, put } from "./dom.js";
import { rowsTable, saveCsv, saveJson } from "./download.js";
import { showError } from "./errors.js";
import { mat, ownPicture } from "./pictures.js";
import { changed, go } from "./route.js";
import { upload } from "./upload.js";
import { ANOTHER, SPLITS, TIERS, figure, fileName, percent, plural, sentence, whole } from "./words.js";

const SHOWN = 100;

export function showShares(main, params, signal) {
  const by = params.get("by") ?? "shard";
  const ofPicture = params.has("upload");
  const queryIds = params.getAll("query");
  const change = (name) => (event) => go("shares", changed(params, { [name]: event.target.value || null }));
  const column = el("select", { id: "by", change: change("by") }, el("option", { value: by, text: by }));
  api.columns(signal).then(
    (columns) => {
      const names = new Set([by, ...columns.map(({ name }) => name)]);
      put(
        column,
        [...names].map((name) => el("option", { value: name, text: name, selected: name === by })),
      );
    },
    () => {},
  );
  const split = el(
    "select",
    { id: "of", change: change("split"), disabled: queryIds.length > 0 },
    el("option", { value: "", text: "all scored queries" }),
    SPLITS.map((name) => el("option", { value: name, text: `split ${name}`, selected: name === params.get("split") })),
  );
  const day = (name, text) =>
    el(
      "label",
      {},
      `${text} `,
      el("input", { type: "date", id: name, value: params.get(name) ?? "", change: change(name) }),
    );
  const tier = el(
    "select",
    { id: "tier", change: change("tier") },
    ["fast", "sketch"].map((name) =>
      el("option", {
        value: name === "fast" ? "" : name,
        text: TIERS[name].name,
        selected: name === (params.get("tier") ?? "fast"),
      }),
    ),
  );
  const body = el("div", { class: "waiting" }, line("quiet", "Influence is being summed"));
  put(
    main,
    el(
      "header",
      { class: "head" },
      el("h1", { text: "Shares" }),
      line("lead", "Whose images the influence on generated pictures came from, with how sure that is."),
      el(
        "div",
        { class: "controls" },
        el("label", {}, "By ", column),
        ofPicture
          ? el("label", {}, "Tier ", tier)
          : [el("label", {}, "Of ", split), day("since", "Since"), day("until", "Until")],
      ),
      ofPicture || queryIds.length ? alone(params, queryIds) : null,
    ),
    body,
    el(
      "aside",
      { class: "label-plate" },
      el("h3", { text: "What these figures are for" }),
      el("p", {
        text:
          "A share is a sum of estimated influence. An interval that touches zero means that the data do not show " +
          "any share: it is called unproven. " +
          "Do not pay, or refuse to pay, anybody on an unproven share, nor take a proven one for proof of copying.",
      }),
    ),
  );
  if (ofPicture && !upload()) {
    return put(
      body,
      line("empty", "This link was made for a picture that it does not hold: bring the same one under Ask."),
    );
  }
  const question = ofPicture
    ? { by, image: upload().blob, caption: params.get("caption"), tier: params.get("tier") }
    : {
        by,
        split: params.get("split") || null,
        query_ids: queryIds.length ? queryIds : null,
        since: params.get("since"),
        until: params.get("until"),
      };
  return api.shares(Object.fromEntries(Object.entries(question).filter(([, value]) => value !== null)), signal).then(
    (answer) => put(body, result(answer, by)),
    showError(body),
  );
}

/** What the shares are of, and a button that leads to those of all queries. */
function alone(params, queryIds) {
  const brought = params.has("upload") && upload();
  return el(
    "div",
    { class: "alone" },
    brought ? mat(ownPicture(brought)) : null,
    el(
      "p",
      { class: "quiet" },
      params.has("upload") ? `Of your picture, "${params.get("caption")}". ` : `Of ${queryIds.join(", ")} alone. `,
      el("button", {
        type: "button",
        class: "link",
        text: "Of all queries",
        click: () => go("shares", changed(params, { query: null, upload: null, caption: null, tier: null })),
      }),
    ),
    brought && brought.fingerprint !== params.get("upload") ? line("warning", ANOTHER) : null,
  );
}

const NOISE = {
  groups: "Errors are those of the noise of the picture's own gradient.",
  calibration: "Predicted from the index, with errors by how far such predictions are off on scored queries.",
};

function result(answer, by) {
  const rows = answer.rows;
  announce(plural(rows.length, "payee"));
  if (!rows.length) return [line("empty", "No influence is known for this choice.")];
  const low = Math.min(0, ...rows.map((row) => row.low ?? 0));
  const high = Math.max(...rows.map((row) => Math.max(row.high ?? 0, row.share, row.uniform ?? 0)));
  const unproven = rows.filter((row) => !row.proven).length;
  const verdict = unproven ? `${whole(unproven)} of them unproven` : "all proven";
  const silent = answer.silent ? `; ${whole(answer.silent)} more have no positive influence` : "";
  const head = [
    [by],
    ["Share, with its interval", "wide"],
    ["Share", "number"],
    ["Signal to noise", "number extra"],
    ["Images", "number extra"],
    ["If paid evenly", "number extra"],
  ];
  return [
    line(
      "lead",
      `${plural(rows.length, "payee")}, ${verdict}, over ${plural(answer.queries, "query", "queries")}${silent}.`,
      { id: "share-summary" },
    ),
    NOISE[answer.noise] ? line("quiet", NOISE[answer.noise]) : null,
    answer.warnings.map((text) => line("warning", sentence(text))),
    answer.judged ? line("quiet", `The teacher against models that were trained again: ${answer.judged}`) : null,
    el(
      "table",
      { class: "shares" },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map(([text, name]) => el("th", { scope: "col", class: name, text })),
        ),
      ),
      el(
        "tbody",
        {},
        rows.slice(0, SHOWN).map((row) => shareRow(row, low, high)),
      ),
    ),
    line(
      "quiet",
      "The line below a bar is its interval, the dotted mark what a payee has where all images are paid the same.",
    ),
    rows.length > SHOWN ? line("quiet", `${whole(rows.length - SHOWN)} more are in the download.`) : null,
    el(
      "p",
      { class: "controls" },
      action("download-json", "Download JSON", () => saveJson(`shares-by-${by}`, answer)),
      action("download-csv", "Download CSV", () => saveCsv(`shares-by-${by}`, rowsTable(rows))),
    ),
  ];
}

const BEYOND = { more: "more than its number of images", less: "less than its number of images" };

function shareRow(row, low, high) {
  return el(
    "tr",
    {},
    el(
      "th",
      { scope: "row" },
      el("span", { text: by(row.payee) }),
      row.proven ? null : el("span", { class: "mark", text: "unproven" }),
      BEYOND[row.beyond_uniform] ? el("span", { class: "quiet beyond", text: BEYOND[row.beyond_uniform] }) : null,
    ),
    el("td", { class: "wide" }, shareBar(row, low, high)),
    el("td", {
      class: "number",
      text: percent(row.share) + (row.standard_error === null ? "" : ` ± ${percent(row.standard_error)}`),
    }),
    el("td", { class: "number extra", text: figure(row.signal_to_noise) }),
    el("td", { class: "number extra", text: whole(row.samples) }),
    el("td", { class: "number extra", text: percent(row.uniform) }),
  );
}

const by = (payee) => (payee === null || payee === "" ? "without a value" : fileName(payee));

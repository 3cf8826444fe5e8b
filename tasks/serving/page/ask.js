// A question and its answers: the panel beside, and what fills the page.

import * as api from "./api.js";
import { label, sections, sideBySide } from "./answer.js";
import { columns } from "./columns.js";
import { action, announce, confirmIn, el, line, put, skeletons } from "./dom.js";
import { saveCsv, saveJson, table } from "./download.js";
import { showError } from "./errors.js";
import { filters, joined } from "./filters.js";
import { questionForm } from "./home.js";
import { mat, ownPicture, picture } from "./pictures.js";
import { changed, go, href } from "./route.js";
import { upload } from "./upload.js";
import { agreed, teacher } from "./teacher.js";
import { ANOTHER, TIERS, plural } from "./words.js";

const COUNTS = [12, 24, 48, 96];
const AROUND = 12; // images of each list below the first
const REMEMBERED = 40;
const YOURS = "Your picture";
const answers = new Map();

export const isQuestion = (params) => ["query", "sample", "upload", "caption"].some((name) => params.has(name));

/** Show the answer to the question of the params. */
export async function showAsk(main, params, signal, open) {
  const tier = TIERS[params.get("tier")] ? params.get("tier") : "fast";
  if (params.has("upload") && !upload()) return showMissing(main, params);
  const body = el("div", { class: "results" }, skeletons(12));
  const side = el("aside", { class: "panel", "aria-label": "The question" });
  put(
    main,
    el("h1", { class: "unseen", text: "The training images of a picture" }),
    el("div", { class: "ask" }, side, body),
  );
  let question;
  try {
    question = await readQuestion(params, signal);
    put(side, panel(question, params, tier));
    const beside = params.get("beside");
    const wanted = [tier, ...(TIERS[beside] && beside !== tier ? [beside] : [])];
    const given = await askAll(wanted, question, params, body, signal);
    put(body, content(given, beside, open));
    put(side.querySelector("#out"), downloads(given[0], question));
    announce(`${plural(given[0].hits.length, "training image")}, tier ${TIERS[tier].name}`);
  } catch (error) {
    showError(body)(error);
  }
}

function content([first, second], beside, open) {
  const side = (answer) => ({ title: TIERS[answer.tier].name, hits: answer.hits, answer });
  if (second) return sideBySide(side(first), side(second), open);
  if (beside === "all") return [label(first), columns(first, open)];
  return [label(first), sections(first, open)];
}

/** What is asked: {title, image, fields}, of which `fields` go to the service. */
async function readQuestion(params, signal) {
  const caption = params.get("caption") ?? "";
  if (params.has("query")) {
    const id = params.get("query");
    const query = await api.query(id, signal);
    return {
      name: id,
      title: query.caption,
      kind: `Scored query ${id}, split ${query.split}`,
      image: picture(api.queryImage(id, 512), query.caption, { loading: "eager" }),
      fields: { query_id: id },
    };
  }
  if (params.has("sample")) {
    const id = params.get("sample");
    const [sample, image] = await Promise.all([api.sample(id, signal), api.bytes(api.sampleImage(id), signal)]);
    const words = sample.captions[0] ?? "";
    return {
      name: `sample-${id}`,
      title: words,
      kind: `Training image ${id}, without itself`,
      image: picture(api.sampleImage(id, 512), words, { loading: "eager" }),
      fields: { image, caption: words, exclude: id },
    };
  }
  if (params.has("upload")) {
    const brought = upload();
    return {
      name: `picture-${brought.fingerprint}`,
      title: caption || "without a caption",
      kind: YOURS,
      image: ownPicture(brought, caption || undefined),
      fields: { image: brought.blob, caption },
      other: brought.fingerprint !== params.get("upload"),
    };
  }
  return { name: "caption", title: caption, kind: "A caption alone", image: null, fields: { caption } };
}

async function askAll(tiers, question, params, body, signal) {
  const k = countOf(params);
  const settings = {
    k,
    around: AROUND,
    beside: params.get("beside") === "all" || null,
    where: joined(params.getAll("where")),
  };
  const fields = { ...question.fields, ...settings };
  const keys = tiers.map((tier) => JSON.stringify([tier, question.name, question.title, settings]));
  for (const [place, tier] of tiers.entries()) {
    if (!answers.has(keys[place])) remember(keys[place], await askOne({ ...fields, tier }, keys[place], body, signal));
  }
  return keys.map((key) => answers.get(key));
}

async function askOne(question, key, body, signal) {
  if (question.tier !== "exact") return api.attribute(question, signal);
  if (!teacher.has(key)) {
    await agreed(body, signal);
    teacher.start(key, question, (answer) => remember(key, answer));
  }
  return teacher.answer(key, body, signal);
}

const countOf = (params) => (COUNTS.includes(Number(params.get("k"))) ? Number(params.get("k")) : COUNTS[1]);

function remember(key, answer) {
  if (answers.size >= REMEMBERED) answers.delete(answers.keys().next().value);
  answers.set(key, answer);
}

function panel(question, params, tier) {
  const change = (changes) => go("ask", changed(params, changes));
  return [
    question.image ? mat(question.image) : null,
    line("title", question.title),
    line("quiet", question.kind),
    question.other ? line("warning", ANOTHER) : null,
    tierChoice(tier, change),
    selectOf(
      "beside",
      "Beside it",
      params.get("beside") ?? "",
      [
        ["", "nothing"],
        ["all", "all other ways"],
        ...Object.entries(TIERS)
          .filter(([name]) => name !== tier)
          .map(([name, { name: text }]) => [name, text]),
      ],
      change,
    ),
    selectOf(
      "k",
      "Images",
      String(countOf(params)),
      COUNTS.map((count) => [String(count), String(count)]),
      change,
    ),
    filters(params.getAll("where"), api.columns, (where) => change({ where })),
    el("div", { class: "actions", id: "out" }),
    el("p", {}, el("a", { href: "#/", id: "new", text: "Ask about another picture" })),
  ].filter(Boolean);
}

function tierChoice(tier, change) {
  return el(
    "fieldset",
    { class: "tiers" },
    el("legend", { text: "Tier" }),
    Object.entries(TIERS).map(([name, { name: text }]) =>
      el(
        "label",
        {},
        el("input", {
          type: "radio",
          name: "tier",
          id: `tier-${name}`,
          value: name,
          checked: name === tier,
          change: () => change({ tier: name === "fast" ? null : name, beside: null }),
        }),
        el("span", { text }),
      ),
    ),
  );
}

function selectOf(id, text, value, options, change) {
  return el(
    "label",
    { class: "field" },
    el("span", { text }),
    el(
      "select",
      { id, change: (event) => change({ [id]: event.target.value }) },
      options.map(([each, said]) => el("option", { value: each, text: said, selected: each === value })),
    ),
  );
}

function downloads(answer, question) {
  const copy = action("copy-link", "Copy link", async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      confirmIn(copy, "Copied");
    } catch {
      confirmIn(copy, "Copy it from the address bar");
    }
  });
  const name = `fastgda-${question.name}-${answer.tier}`;
  return [
    copy,
    action("download-json", "JSON", () => saveJson(name, answer), { "aria-label": "Download as JSON" }),
    action("download-csv", "CSV", () => saveCsv(name, table(answer)), { "aria-label": "Download as CSV" }),
    sharesOf(question, answer),
    question.fields.image && question.kind === YOURS
      ? line("quiet", "The link names your picture and does not hold it: whoever opens it has to bring the same one.")
      : null,
  ].filter(Boolean);
}

/** A link to the shares of the picture that was asked about; a training image is asked without itself, so has none. */
function sharesOf({ fields, kind }, { tier }) {
  const text = "Shares of this answer";
  const link = (params) => el("a", { class: "button plain", id: "shares-of", href: href("shares", params), text });
  if (fields.query_id) return link({ query: fields.query_id });
  if (kind !== YOURS || !fields.caption) return null;
  return link({ upload: upload().fingerprint, caption: fields.caption, tier: tier === "fast" ? null : "sketch" });
}

/** The place of an answer to a picture that this tab does not have. */
function showMissing(main, params) {
  put(
    main,
    el(
      "div",
      { class: "opening" },
      el(
        "header",
        {},
        el("h1", { text: "This link was made for a picture that it does not hold" }),
        el(
          "p",
          { class: "lead" },
          "Pictures stay with those who bring them. For the same answer bring the same one, of fingerprint ",
          el("code", { text: params.get("upload") }),
          ".",
        ),
      ),
      questionForm(params.get("caption") ?? ""),
    ),
  );
}

// Answers as files, made in the browser from what it shows.

import { el } from "./dom.js";

const COLUMNS = [
  "rank",
  "train_id",
  "key",
  "captions",
  "shard",
  "offset",
  "similarity",
  "score",
  "standard_error",
  "predicted_rank",
  "duplicates",
];
const SECTIONS = ["hits", "lowering", "similar"];

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** One cell of RFC 4180. A spreadsheet would run a text that begins as a formula does, so it gets an apostrophe. */
export function cell(value) {
  if (value === null || value === undefined) return "";
  let text = Array.isArray(value)
    ? value.join(" | ")
    : typeof value === "object"
      ? JSON.stringify(value)
      : String(value);
  if (typeof value !== "number" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (lines) => lines.map((line) => `${line.map(cell).join(",")}\r\n`).join("");

/** An answer as a table: one line a sample, its metadata in columns of their own. */
export function table(answer) {
  const of = (section, hits) => (hits ?? []).map((hit) => ({ section, ...hit }));
  const rows = [
    ...SECTIONS.flatMap((section) => of(section, answer[section])),
    ...(answer.beside ?? []).flatMap(({ way, hits }) => of(`beside ${way}`, hits)),
  ];
  const metadata = [...new Set(rows.flatMap((row) => Object.keys(row.metadata ?? {})))];
  const lines = rows.map((row) => [
    row.section,
    ...COLUMNS.map((name) => row[name]),
    ...metadata.map((name) => row.metadata?.[name]),
  ]);
  return csv([["section", ...COLUMNS, ...metadata], ...lines]);
}

export const saveJson = (name, value) =>
  save(`${name}.json`, "application/json", `${JSON.stringify(value, null, 2)}\n`);
export const saveCsv = (name, text) => save(`${name}.csv`, "text/csv;charset=utf-8", text);

/** Rows of equal keys as a table. */
export function rowsTable(rows) {
  const names = Object.keys(rows[0] ?? {});
  return csv([names, ...rows.map((row) => names.map((name) => row[name]))]);
}

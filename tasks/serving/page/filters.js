// Conditions on columns of the samples: each is a chip, and all of them must hold.

import { el, line, put } from "./dom.js";
import { showError } from "./errors.js";

const OPERATORS = [
  ["=", "is"],
  ["<>", "is not"],
  ["contains", "contains"],
  [">=", "at least"],
  ["<=", "at most"],
];
const NUMBER = /^(?:tiny|small|big|u)?int|^(?:u?int\d+|float|double|decimal|hugeint)/i;

const quoted = (text) => `'${text.replaceAll("'", "''")}'`;

/** A condition as the service reads it. A field of the tars' .json whose name is no plain one is no column. */
export function condition(column, operator, value) {
  const plain = /^[a-z_]\w{0,62}$/i.test(column.name);
  const name = plain ? `"${column.name}"` : `(metadata->>${quoted(column.name)})`; // "group" is a word of SQL
  if (operator === "contains") return `contains(lower(cast(${name} as varchar)), ${quoted(value.toLowerCase())})`;
  const number = NUMBER.test(column.type) && value.trim() !== "" && Number.isFinite(Number(value));
  return `${name} ${operator} ${number ? value.trim() : quoted(value)}`;
}

/** All conditions as one text. */
export const joined = (conditions) =>
  conditions.length > 1 ? conditions.map((each) => `(${each})`).join(" and ") : (conditions[0] ?? "");

/** A form that adds conditions: `change` hears of the new list. `columns` is asked once, when the form is opened. */
export function filters(conditions, columns, change) {
  const add = el("form", { class: "add-filter", id: "filter-form" });
  let asked = false;
  const ask = () => {
    if (asked) return;
    asked = true;
    put(add, line("quiet", "Columns are being read"));
    columns().then((known) => fillForm(add, known, (text) => change([...conditions, text])), showError(add));
  };
  const chips = conditions.map((text, index) =>
    el(
      "li",
      {},
      el("code", { text }),
      el("button", {
        type: "button",
        class: "remove",
        "aria-label": `Remove the filter ${text}`,
        text: "×",
        click: () => change(conditions.filter((_, other) => other !== index)),
      }),
    ),
  );
  return el(
    "details",
    { class: "filters", open: conditions.length > 0, toggle: (event) => event.target.open && ask() },
    el("summary", { id: "filters", text: conditions.length ? `Filters (${conditions.length})` : "Filters" }),
    chips.length ? el("ul", { class: "chips" }, chips) : null,
    add,
  );
}

function fillForm(form, columns, add) {
  if (!columns.length) {
    put(form, line("quiet", "The training samples have no columns to filter by."));
    return;
  }
  const column = el(
    "select",
    { id: "filter-column", "aria-label": "Column" },
    columns.map(({ name }) => el("option", { value: name, text: name })),
  );
  const operator = el(
    "select",
    { id: "filter-operator", "aria-label": "Comparison" },
    OPERATORS.map(([value, text]) => el("option", { value, text })),
  );
  const value = el("input", {
    id: "filter-value",
    "aria-label": "Value",
    placeholder: "value",
    maxlength: 200,
    required: true,
    autocomplete: "off",
  });
  put(form, column, operator, value, el("button", { class: "plain", id: "filter-add", text: "Add" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    add(
      condition(
        columns.find(({ name }) => name === column.value),
        operator.value,
        value.value,
      ),
    );
  });
}

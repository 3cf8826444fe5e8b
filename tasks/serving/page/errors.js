// What went wrong, in one readable line; where the service asks for a key, a place to give it.

import { key } from "./api.js";
import { el, put } from "./dom.js";

export function errorLine(error) {
  const line = el("p", { class: "error", role: "alert", text: error.message });
  return error.status === 401 ? el("div", {}, line, keyForm()) : line;
}

/** Show an error in a place, unless the user has left it. */
export function showError(place) {
  return (error) => {
    if (error.name !== "AbortError") put(place, errorLine(error));
  };
}

function keyForm() {
  const input = el("input", { type: "password", id: "key", autocomplete: "off", required: true });
  const give = (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    dispatchEvent(new CustomEvent("again"));
  };
  return el("form", { class: "key", submit: give }, el("label", { for: "key", text: "Key of this service" }), input,
    el("button", { text: "Use it" }), el("p", { class: "quiet", text: "It is kept until this tab is closed." }));
}

// What went wrong, in one readable line; where the service asks for a key, a place to give it.

import { key } from "./api.js";
import { action, el, line, put } from "./dom.js";

const AGAIN = [0, 429, 503]; // what may be answered when it is asked once more; 0 is no answer at all

export function errorLine(error) {
  const said = el("p", { class: "error", role: "alert", text: error.message });
  if (error.status === 401) return el("div", {}, said, keyForm());
  if (!AGAIN.includes(error.status)) return said;
  return el("div", {}, said, action("again", "Try again", again));
}

const again = () => dispatchEvent(new CustomEvent("again"));

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
    again();
  };
  return el(
    "form",
    { class: "key", submit: give },
    el("label", { for: "key", text: "Key of this service" }),
    input,
    el("button", { text: "Use it" }),
    line("quiet", "It is kept until this tab is closed."),
  );
}

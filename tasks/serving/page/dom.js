// Elements without HTML: whatever an answer holds becomes a text node or an attribute, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element. Attributes that are functions listen, `true` is an empty attribute, null and false are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of SVG, in the same way. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...shown(children));
  return element;
}

const shown = (children) =>
  children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

/** Put children, of which null and false are left out, in place of what an element holds. */
export function put(element, ...children) {
  element.replaceChildren(...shown(children));
}

/** A paragraph of one text. */
export const line = (name, text, attributes = {}) => el("p", { class: name, text, ...attributes });

/** A button beside the main one. */
export const action = (id, text, click, attributes = {}) =>
  el("button", { type: "button", class: "plain", id, text, click, ...attributes });

/** Names and values, without those that have no value. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el(
    "dl",
    {},
    known.map(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]),
  );
}

/** Say a sentence to those who hear the page. */
export function announce(text) {
  document.getElementById("live").textContent = text;
}

/** Grey places where pictures will be. */
export function skeletons(count) {
  const places = Array.from({ length: count }, () => el("li", { class: "card skeleton" }, el("div", { class: "mat" })));
  return el("ol", { class: "gallery", "aria-hidden": "true" }, places);
}

/** Tell in a button, for two seconds, that it did what it says. */
export function confirmIn(button, said) {
  const before = button.textContent;
  button.textContent = said;
  announce(said);
  setTimeout(() => {
    button.textContent = before;
  }, 2000);
}

// Pictures in their mats, and the cards of a gallery.

import * as api from "./api.js";
import { el } from "./dom.js";
import { figure, plural, predicted, strength } from "./words.js";

const SMALL = 64;

/** A picture of the service. With a key it is fetched, as an <img> cannot send one. */
export function picture(path, alt, attributes = {}) {
  const image = el("img", { alt, decoding: "async", loading: "lazy", width: 256, height: 256, ...attributes });
  showPixels(image);
  image.addEventListener("error", () => image.replaceWith(el("span", { class: "missing", text: "no picture" })));
  if (!api.key.get()) image.src = path;
  else
    api.bytes(path).then(
      (blob) => {
        image.src = URL.createObjectURL(blob);
        image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
      },
      () => image.dispatchEvent(new Event("error")),
    );
  return image;
}

/** The picture that the user brought. */
export function ownPicture(brought, alt = "The picture that you brought") {
  return showPixels(el("img", { src: brought.url, alt, class: "own" }));
}

/** Pictures of few pixels are shown as these, not as a blur. */
function showPixels(image) {
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= SMALL));
  return image;
}

export const mat = (...children) => el("div", { class: "mat" }, children);

export function caption(captions) {
  return captions?.length ? captions[0] : "without a caption";
}

/** One training sample of an answer: `open` is called with its train_id, `strongest` is the size of the best score. */
export function card(hit, { open, strongest, also = null, size = 256, name = "hit" }) {
  const text = caption(hit.captions);
  const part = barPart(hit, strongest);
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.inlineSize = `${100 * part}%`;
  const alike = hit.duplicates?.length ?? 0;
  return el(
    "li",
    { class: also ? "card both" : "card", "data-sample": hit.train_id },
    el(
      "button",
      { type: "button", id: `${name}-${hit.rank}-${hit.train_id}`, click: () => open(hit.train_id) },
      mat(
        picture(api.sampleImage(hit.train_id, size), text),
        alike > 0 &&
          el("span", {
            class: "alike",
            title: `${plural(alike, "picture")} that look the same`,
            text: `+${alike} alike`,
          }),
      ),
      el(
        "span",
        { class: "label" },
        el("span", { class: "number", text: hit.rank }),
        el("span", { class: "title", text }),
      ),
      bar,
      el(
        "span",
        { class: "facts" },
        el("span", { text: strength(hit) }),
        hit.predicted_rank ? el("span", { text: predicted(hit.predicted_rank) }) : null,
        also ? el("span", { class: "also", text: also }) : null,
      ),
    ),
  );
}

export const sizeOf = (hit) => Math.abs(hit.score ?? hit.similarity ?? 0);
const barPart = (hit, strongest) => (strongest > 0 ? Math.min(1, sizeOf(hit) / strongest) : 0);

/** A row of cards; `also` says of a train_id what stands beside it. */
export function gallery(hits, open, also = () => null, name = "hit") {
  const strongest = Math.max(0, ...hits.map(sizeOf));
  return el(
    "ol",
    { class: "gallery" },
    hits.map((hit) => card(hit, { open, strongest, also: also(hit.train_id), name })),
  );
}

/** A row of stored queries that lead to their answers. */
export function queryCards(queries, to) {
  return el(
    "ul",
    { class: "gallery queries" },
    queries.map((query) =>
      el(
        "li",
        { class: "card" },
        el(
          "a",
          { href: to(query) },
          mat(picture(api.queryImage(query.query_id, 256), query.caption)),
          el("span", { class: "label" }, el("span", { class: "title", text: query.caption })),
          el(
            "span",
            { class: "facts" },
            el("span", { text: query.rank ? `rank ${figure(query.rank)} there` : query.query_id }),
            el("span", { text: query.split }),
          ),
        ),
      ),
    ),
  );
}

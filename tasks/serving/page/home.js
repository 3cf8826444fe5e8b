// The question: a picture with its caption, a caption alone, or a query that is stored.

import * as api from "./api.js";
import { el, line, put, skeletons } from "./dom.js";
import { showError } from "./errors.js";
import { mat, queryCards } from "./pictures.js";
import { go, href } from "./route.js";
import { bring, firstImage, upload } from "./upload.js";

const STRIP = 12;
const KINDS = "image/png,image/jpeg,image/webp";

export function showHome(main, _params, signal) {
  const strip = el("div", {}, skeletons(6));
  put(
    main,
    el(
      "div",
      { class: "opening" },
      el(
        "header",
        {},
        el("h1", { text: "Which training images made this picture?" }),
        line(
          "lead",
          "Give a generated picture and the caption that it was drawn from. The answer names the training images " +
            "that raised its likelihood most, and says how far to believe it.",
        ),
      ),
      questionForm(),
    ),
    el(
      "section",
      { "aria-labelledby": "stored" },
      el(
        "div",
        { class: "row" },
        el("h2", { id: "stored", text: "Or take one that is scored already" }),
        el("a", { href: href("queries"), text: "All of them" }),
      ),
      strip,
    ),
  );
  return api
    .queries({ split: "test", limit: STRIP }, signal)
    .then(
      ({ queries }) =>
        put(
          strip,
          queries.length
            ? queryCards(queries, (query) => href("ask", { query: query.query_id }))
            : line("empty", "No query has been scored yet."),
        ),
      showError(strip),
    );
}

/** The form of a question, with the picture that was brought last. */
export function questionForm(caption = "") {
  const zone = dropZone();
  const input = el("input", {
    id: "caption",
    value: caption,
    maxlength: 1000,
    autocomplete: "off",
    placeholder: "a laughing face with sunglasses",
  });
  const problem = el("p", { class: "error", role: "alert", hidden: true });
  const ask = (event) => {
    event.preventDefault();
    const words = input.value.trim();
    problem.hidden = Boolean(upload() || words);
    problem.textContent = "Bring a picture, or type a caption.";
    if (problem.hidden) go("ask", { upload: upload()?.fingerprint, caption: words });
  };
  return el(
    "form",
    { class: "question", submit: ask },
    zone,
    el(
      "div",
      { class: "words" },
      el("label", { for: "caption", text: "Caption" }),
      input,
      problem,
      el("button", { id: "ask", text: "Find its training images" }),
    ),
  );
}

/** Where a picture is dropped, pasted or picked. */
export function dropZone() {
  const zone = el("div", { class: "drop" });
  const file = el("input", {
    type: "file",
    id: "file",
    class: "unseen",
    accept: KINDS,
    change: async () => {
      if (file.files.length) await bring(file.files[0]);
      show();
      document.getElementById("file").focus();
    },
  });
  function show() {
    const brought = upload();
    put(
      zone,
      file,
      el(
        "label",
        { for: "file" },
        mat(
          brought
            ? el("img", { src: brought.url, alt: "The picture that you brought", class: "own" })
            : el(
                "span",
                { class: "invite" },
                el("strong", { text: "Drop a picture" }),
                el("span", { text: "paste it, or pick a file" }),
              ),
        ),
        brought ? el("span", { class: "quiet", text: "Pick another" }) : null,
      ),
    );
  }
  show();
  return zone;
}

/** Take pictures that are dropped or pasted anywhere on the page. */
export function listen() {
  const take = async (files) => {
    const image = firstImage(files);
    if (!image) return;
    await bring(image);
    if (location.hash && location.hash !== "#/") go("ask");
    else dispatchEvent(new CustomEvent("again"));
    setTimeout(() => document.getElementById("caption")?.focus());
  };
  const over = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  };
  addEventListener("dragover", over);
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => take(event.clipboardData?.files));
}

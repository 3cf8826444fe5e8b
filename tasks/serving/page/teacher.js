// Answers of tier exact: jobs that go on while other pages are looked at.

import * as api from "./api.js";
import { action, el, line, put } from "./dom.js";

const jobs = new Map();

/** The teacher's answer costs seconds to minutes, so it begins with a button and not with a link. */
export function agreed(body, signal) {
  return new Promise((resolve, reject) => {
    put(
      body,
      el(
        "section",
        { class: "wait" },
        el("h2", { text: "The exact answer" }),
        line(
          "lead",
          "The teacher scores the training images for this picture anew. It takes seconds to minutes, and goes on " +
            "while you look at other pages.",
        ),
        el("button", { type: "button", id: "start-exact", text: "Ask the teacher", click: resolve }),
      ),
    );
    signal.addEventListener("abort", () => reject(new DOMException("left", "AbortError")));
  });
}

async function run(job, question) {
  const started = await api.attribute(question);
  if (!started.job) return started;
  job.id = started.job;
  return api.finished(started.job, (part) => {
    job.progress = part;
    job.show();
  });
}

export const teacher = {
  has: (key) => jobs.has(key),

  start(key, question) {
    const job = { progress: 0, id: null, show() {} };
    jobs.set(key, job);
    job.answer = run(job, question).finally(() => jobs.delete(key));
    job.answer.catch(() => {}); // whoever waits for it is told
  },

  /** Wait for a job, and show in a place how far it is. */
  async answer(key, body, signal) {
    const job = jobs.get(key);
    const bar = el("progress", { max: 1, "aria-label": "The teacher's work" });
    const text = el("p", { class: "quiet" });
    const stop = action("stop-exact", "Stop", () => job.id && api.cancel(job.id).catch(() => {}));
    job.show = () => {
      bar.value = job.progress;
      text.textContent = job.progress
        ? `${Math.round(100 * job.progress)} % is scored`
        : "The question waits for its turn";
    };
    job.show();
    put(body, el("section", { class: "wait" }, el("h2", { text: "The teacher is being asked" }), bar, text, stop));
    const answer = await job.answer;
    signal.throwIfAborted();
    return answer;
  },
};

// The HTTP interface of the service: one function a question, errors as one line.

const KEY = "fastgda-key";
const POLL = 700; // milliseconds between two looks at a job

export class ApiError extends Error {
  constructor(message, status, where = "") {
    super(message);
    this.status = status;
    this.where = where;
  }
}

/** The key that the service asks for, kept until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service does not answer: is it running, and is this machine online?", 0);
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const told = body.error || `The service answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(wait ? `${told} (try again in ${wait} s)` : told, response.status, body.where);
}

const getJson = async (path, options) => (await request(path, options)).json();
const postJson = (path, body, signal) =>
  getJson(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });

function postForm(path, fields, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== null && value !== undefined && value !== "") form.append(name, value);
  }
  return getJson(path, { method: "POST", body: form, signal });
}

const search = (params) => new URLSearchParams(Object.entries(params).filter(([, value]) => value || value === 0));

export const queries = (params, signal) => getJson(`v1/queries?${search(params)}`, { signal });
export const query = (id, signal) => getJson(`v1/queries/${encodeURIComponent(id)}`, { signal });
export const sample = (id, signal) => getJson(`v1/samples/${encodeURIComponent(id)}`, { signal });
/** The columns of the training samples that hold words or figures. */
export const columns = async (signal) =>
  (await getJson("v1/columns", { signal })).columns.filter(({ type }) => type !== "BLOB");
export const indexes = (signal) => getJson("v1/indexes", { signal });
/** Ask for shares: of scored queries, or of a picture, whose bytes go as a form. */
export const shares = (body, signal) =>
  body.image ? postForm("v1/shares", body, signal) : postJson("v1/shares", body, signal);

export const queryImage = (id, size) => `v1/queries/${encodeURIComponent(id)}/image?size=${size}`;
export const sampleImage = (id, size) => `v1/samples/${encodeURIComponent(id)}/image${size ? `?size=${size}` : ""}`;
export const bytes = async (path, signal) => (await request(path, { signal })).blob();

/** Ask which samples made an image: an answer, or of tier exact a job, {job, state, progress}. */
export const attribute = (question, signal) => postForm("v1/attribute", question, signal);

const jobPath = (id) => `v1/jobs/${encodeURIComponent(id)}`;

/** Wait for a job's answer. `progress` hears of the job, whose `progress` is the share that is done. */
export async function finished(id, progress) {
  for (;;) {
    const job = await getJson(jobPath(id));
    if (job.answer) return job.answer;
    if (job.error) throw new ApiError(job.error, 200, job.where);
    progress(job);
    await new Promise((resolve) => {
      setTimeout(resolve, POLL);
    });
  }
}

export const cancel = (id) => request(jobPath(id), { method: "DELETE" });

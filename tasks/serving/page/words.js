// Figures and names of the interface in plain words.

export const TIERS = {
  fast: { name: "Fast", says: "A small learned head and an index. Good for an order, and no more." },
  sketch: {
    name: "Sketch",
    says: "This picture's own gradient against sketches of the training images': scores of the teacher's, with errors.",
  },
  exact: { name: "Exact", says: "The teacher itself, asked on the spot. It takes a while." },
};

/** Tiers and untuned features, as they stand beside each other. */
export const WAYS = {
  fast: { name: "Fast", made: "head and index" },
  sketch: { name: "Sketch", made: "gradients" },
  exact: { name: "Exact", made: "the teacher's scores" },
  images: { name: "Images", made: "untuned" },
  captions: { name: "Captions", made: "untuned" },
};

export const ANOTHER = "This is another picture than the one that the link was made for.";

/** Of the stored queries. */
export const SPLITS = ["test", "validation", "train", "twin", "pseudo"];

const count = new Intl.NumberFormat("en");
const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const whole = (number) => count.format(number);

const RAISED = [..."⁻⁰¹²³⁴⁵⁶⁷⁸⁹"];
const raised = (digit) => RAISED["-0123456789".indexOf(digit)];
const power = (exponent) => `10${[...String(exponent)].map(raised).join("")}`;
const magnitude = (number) => (number === 0 ? 0 : Math.floor(Math.log10(Math.abs(number))));

/** Three digits that count, or a dash where nothing is known. */
export function figure(number) {
  if (number === null || number === undefined) return "–";
  const exponent = magnitude(number);
  if (exponent > -4 && exponent < 6) return plain.format(number);
  return `${(number / 10 ** exponent).toFixed(2)} × ${power(exponent)}`;
}

/** A figure with its standard error, as far as the error counts: one digit of it, or two that begin with 1. */
export function withError(number, error) {
  if (number === null || number === undefined) return "–";
  if (!error) return figure(number);
  const exponent = magnitude(Math.max(Math.abs(number), error));
  const scale = exponent < -2 ? exponent : 0;
  const [value, spread] = [number / 10 ** scale, error / 10 ** scale];
  const first = magnitude(spread);
  const decimals = Math.max(0, (spread < 2 * 10 ** first ? 1 : 0) - first);
  const both = `${value.toFixed(decimals)} ± ${spread.toFixed(decimals)}`;
  return scale ? `(${both}) × ${power(scale)}` : both;
}

/** A share in percent. What is not all of it is never rounded to 100 %. */
export function percent(part) {
  if (part === null || part === undefined) return "–";
  const almost = part < 1 && part >= 0.9995;
  return `${almost ? (Math.floor(1e5 * part) / 1e3).toFixed(3) : (100 * part).toFixed(1)} %`;
}

/** Where a normalised rank lies: 0.004 is among the first 0.4 %. */
export function predicted(rank) {
  if (rank === null || rank === undefined) return "";
  const part = 100 * rank;
  return `top ${part < 1 ? part.toFixed(2) : part.toFixed(1)} %`;
}

export function date(text) {
  const when = new Date(text);
  return Number.isNaN(when.valueOf()) ? "" : when.toISOString().slice(0, 16).replace("T", " ");
}

/** A line of the service as a sentence. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export const fileName = (path) => String(path).split("/").at(-1);
export const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;

/** What a hit is ordered by, in one short line. */
export function strength(hit) {
  if (hit.score !== null && hit.score !== undefined) return `score ${withError(hit.score, hit.standard_error)}`;
  return hit.similarity === null || hit.similarity === undefined ? "" : `similarity ${figure(hit.similarity)}`;
}

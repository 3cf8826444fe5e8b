// Two small charts of SVG. All that they show stands as text beside them as well.

import { svg } from "./dom.js";
import { percent, withError } from "./words.js";

const WIDTH = 320;

/** A share with its interval, where one is known, on a scale from `low` to `high`; one that is not proven is hollow. */
export function shareBar(row, low, high) {
  const x = (value) => 2 + ((value - low) / (high - low || 1)) * (WIDTH - 4);
  const [zero, end] = [x(0), x(row.share)];
  const known = typeof row.low === "number" && typeof row.high === "number";
  const said = known ? `${percent(row.share)}, from ${percent(row.low)} to ${percent(row.high)}` : percent(row.share);
  const interval = known ? `M${x(row.low)} 18H${x(row.high)}M${x(row.low)} 15V21M${x(row.high)} 15V21` : "";
  return svg(
    "svg",
    { class: "share", viewBox: `0 0 ${WIDTH} 24`, role: "img", "aria-label": said, preserveAspectRatio: "none" },
    svg("rect", {
      class: row.proven ? "proven" : "unproven",
      x: Math.min(zero, end),
      y: 3,
      width: Math.abs(end - zero),
      height: 9,
    }),
    svg("line", { class: "zero", x1: zero, x2: zero, y1: 0, y2: 24 }),
    typeof row.uniform === "number"
      ? svg("line", { class: "uniform", x1: x(row.uniform), x2: x(row.uniform), y1: 0, y2: 24 })
      : null,
    known ? svg("path", { class: "interval", d: interval }) : null,
  );
}

/** Points over versions, oldest first: [{name, value, error, served}]; nulls leave a gap. */
export function history(title, points) {
  const known = points.filter((point) => typeof point.value === "number");
  if (!known.length) return null;
  const lows = known.map((point) => point.value - 2 * (point.error ?? 0));
  const highs = known.map((point) => point.value + 2 * (point.error ?? 0));
  const margin = Math.max(0.005, 0.15 * (Math.max(...highs) - Math.min(...lows)));
  const [low, high] = [Math.min(...lows) - margin, Math.max(...highs) + margin];
  const x = (index) => (points.length === 1 ? WIDTH / 2 : 40 + (index / (points.length - 1)) * (WIDTH - 60));
  const y = (value) => 110 - ((value - low) / (high - low)) * 90;
  const path = points.map((point, index) => [point, index]).filter(([point]) => typeof point.value === "number");
  const line = path.map(([point, index], place) => `${place ? "L" : "M"}${x(index)} ${y(point.value)}`).join("");
  const said = `${title}: ${known.map((point) => `${point.name} ${withError(point.value, point.error)}`).join(", ")}`;
  return svg(
    "svg",
    { class: "history", viewBox: `0 0 ${WIDTH} 130`, role: "img", "aria-label": said },
    [low + margin, high - margin]
      .filter((value, index, all) => index === 0 || value - all[0] > 1e-6)
      .map((value) => [
        svg("line", { class: "grid", x1: 36, x2: WIDTH, y1: y(value), y2: y(value) }),
        svg("text", { x: 0, y: y(value) + 4, text: value.toFixed(value > 0.999 ? 4 : 3) }),
      ]),
    svg("path", { class: "line", d: line }),
    path.map(([point, index]) => [
      point.error
        ? svg("path", {
            class: "interval",
            d: `M${x(index)} ${y(point.value - 2 * point.error)}V${y(point.value + 2 * point.error)}`,
          })
        : null,
      svg(
        "circle",
        { class: point.served ? "served" : "", cx: x(index), cy: y(point.value), r: point.served ? 5 : 3.5 },
        svg("title", { text: `${point.name}: ${withError(point.value, point.error)}` }),
      ),
    ]),
  );
}

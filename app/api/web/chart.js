// Line charts as SVG.

import { element, svg } from "./dom.js";

const HEIGHT = 200;
const EDGE = { left: 48, right: 16, top: 16, bottom: 28 };

/**
 * Returns a chart that fills the width of its parent, in text of its normal size. `series` are {points: [[x, y]], kind,
 * label}. The label is at the highest point. `bands` are [from, to] on the x axis, and `marker` is an x value. Screen
 * readers get `description`.
 */
export function lineChart(options) {
  const root = element("div");
  root.style.minHeight = `${options.height ?? HEIGHT}px`; // the drawing does not change the size
  let shown = 0;
  new ResizeObserver(([{ contentRect: { width } }]) => {
    if (!width || width === shown) return;
    shown = width;
    root.replaceChildren(drawn(options, width));
  }).observe(root);
  return root;
}

function drawn({ series, x, y, height = HEIGHT, bands = [], marker = null, xLabel = "", yFormat = String, description }, width) {
  const [x0, x1] = x;
  const [y0, y1] = y;
  const across = (value) => EDGE.left + ((value - x0) / (x1 - x0 || 1)) * (width - EDGE.left - EDGE.right);
  const down = (value) => height - EDGE.bottom - ((value - y0) / (y1 - y0 || 1)) * (height - EDGE.top - EDGE.bottom);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description });
  for (const [from, to] of bands) {
    const [left, right] = [across(from), across(to)].sort((a, b) => a - b);
    chart.append(svg("rect", { class: "band", x: left, y: EDGE.top, width: Math.max(2, right - left), height: down(y0) - EDGE.top }));
  }
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    chart.append(svg("line", { class: "grid-line", x1: EDGE.left, x2: width - EDGE.right, y1: down(value), y2: down(value) }));
    chart.append(svg("text", { x: EDGE.left - 6, y: down(value) + 4, "text-anchor": "end" }, yFormat(value)));
  }
  for (const value of [x0, (x0 + x1) / 2, x1]) {
    chart.append(svg("text", { x: across(value), y: height - 10, "text-anchor": "middle" }, String(Number(value.toFixed(1)))));
  }
  if (xLabel) chart.append(svg("text", { x: across((x0 * 3 + x1) / 4), y: height - 10, "text-anchor": "middle" }, xLabel));
  if (marker !== null) {
    chart.append(svg("line", { class: "marker", x1: across(marker), x2: across(marker), y1: EDGE.top, y2: down(y0) }));
  }
  for (const { points, kind = "", label = "" } of series) {
    const path = points.map(([px, py], place) => `${place ? "L" : "M"}${across(px).toFixed(1)} ${down(py).toFixed(1)}`).join("");
    if (points.length) chart.append(svg("path", { class: `series ${kind}`, d: path }));
    if (points.length === 1) chart.append(svg("circle", { class: "dot", cx: across(points[0][0]), cy: down(points[0][1]), r: 3 }));
    if (label && points.length) {
      const [px, py] = points.reduce((best, point) => (point[1] > best[1] ? point : best));
      chart.append(svg("text", { class: kind === "main" ? "label-main" : "", x: across(px), y: down(py) - 6, "text-anchor": "middle" }, label));
    }
  }
  return chart;
}

export function bar(share, isBest = false) {
  const fill = element("div", { class: `bar-fill${isBest ? " best" : ""}` });
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return element("div", { class: "bar-track" }, fill);
}

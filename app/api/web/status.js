// The view "Status": the state of the service, its throughput and latency since the page was opened, the batches of the
// user, and the models.

import * as batches from "./batches.js";
import { lineChart } from "./chart.js";
import { duration, element, find, period, plural } from "./dom.js";
import { failureBox } from "./failure.js";
import { sampleNow, watchService } from "./health.js";
import { about } from "./models.js";

const MINUTES = 5;
const WINDOW = 3; // samples; images are finished in groups, so that shorter windows show only these groups

let samples = []; // {at, health, images, buckets}: at most MINUTES minutes
let isReached = true; // false if the service has not answered the last sample

/** Collects samples from the moment the page is opened, so that the charts have a history. */
export function start() {
  watchService((sample) => {
    isReached = sample !== null;
    if (sample) samples = [...samples, sample].filter(({ at }) => sample.at - at <= 60 * MINUTES + 1);
    if (find("#status").hidden) return;
    showCharts();
    if (sample) batches.notice(sample.batches);
  });
}

export async function open() {
  showCharts();
  sampleNow(); // so that the newest requests are counted
  try {
    const { models } = await about();
    find("#model-cards").replaceChildren(...models.map(modelCard));
  } catch (error) {
    find("#model-cards").replaceChildren(failureBox(error, open));
    return;
  }
  batches.open();
}

export const { close } = batches;

function showCharts() {
  const last = samples.at(-1);
  if (!last) {
    find("#status-figures").replaceChildren(element("div", {}, element("dt", {}, "Status"), element("dd", {}, "…")));
    return;
  }
  showFigures(last.health);
  showThroughput(last);
  showLatency(last);
}

function showFigures({ status, device, dtype, compiled, queue, uptime_seconds, version }) {
  const figures = [
    ["Status", isReached ? status : "no answer"],
    ["Device", device ?? "…", `${dtype ?? ""}${compiled ? ", compiled" : ""}`],
    ["Running images", queue.running],
    ["Waiting images", queue.waiting, `of ${queue.capacity.toLocaleString("en")}`],
    ["Uptime", period(uptime_seconds)],
    ["Version", version],
  ];
  find("#status-figures").replaceChildren(
    ...figures.map(([name, value, more]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value), more ? element("small", {}, ` ${more}`) : null)),
    ),
  );
}

/** Returns [minutes before now, value] for each sample, compared with the sample WINDOW places before it. */
function rates(last, value) {
  const before = (place) => samples[Math.max(0, place + 1 - WINDOW)];
  return samples.slice(1).map((sample, place) => [(sample.at - last.at) / 60, value(before(place), sample)]);
}

function showThroughput(last) {
  const points = rates(last, (before, after) => Math.max(0, after.images - before.images) / (after.at - before.at));
  const peak = Math.max(1, ...points.map(([, rate]) => rate));
  const now = points.at(-1)?.[1] ?? 0;
  show("#throughput-chart", points, peak, (rate) => rate.toFixed(peak < 10 ? 1 : 0), `${now.toFixed(1)} images per second in the last seconds. ${plural(last.images, "image")} since the start of the service.`);
}

function showLatency(last) {
  const points = rates(last, (before, after) => median(before.buckets, after.buckets)).filter(([, value]) => value !== null);
  const peak = Math.max(0.1, ...points.map(([, value]) => value));
  const now = points.at(-1)?.[1];
  const watched = last.at - samples[0].at;
  const none = watched ? `No request to /generate was answered in the last ${period(watched)}.` : "The median appears after the next request to /generate.";
  show("#latency-chart", points, peak, duration, now === undefined ? none : `Median of the newest requests: about ${duration(now)}.`);
}

function show(id, points, peak, format, text) {
  const chart = lineChart({
    series: [{ points, kind: "main" }], x: [-MINUTES, 0], y: [0, peak], height: 180, xLabel: "minutes", yFormat: format, description: text,
  });
  find(id).replaceChildren(chart, element("p", { class: "legend" }, text));
}

/** Returns the estimated median of the observations between two scrapes of a histogram, or null without any. */
function median(before, after) {
  const counts = [...after].map(([limit, count]) => [limit, count - (before.get(limit) ?? 0)]).sort(([a], [b]) => a - b);
  const total = counts.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let [lower, below] = [0, 0];
  for (const [limit, count] of counts) {
    if (count >= total / 2) {
      if (limit === Infinity) return lower;
      return lower + ((total / 2 - below) / (count - below)) * (limit - lower);
    }
    [lower, below] = [limit, count];
  }
  return lower;
}

function modelCard(model) {
  const steps = model.steps.length ? model.steps.join(", ") : `1 to ${model.max_steps}`;
  const guidance = model.guidable
    ? model.samplers.map((sampler) => `${sampler} ${model.guidance_scale[sampler]}`).join(", ")
    : "not supported";
  const facts = {
    Parameters: model.num_parameters.toLocaleString("en"),
    Classes: model.num_classes,
    Image: `${model.width} × ${model.height}${model.channels > 1 ? ", colour" : ""}`,
    Steps: `${steps} (default ${model.default_steps})`,
    Samplers: model.samplers.join(", "),
    Guidance: guidance,
    "Picture tasks": model.has_picture_tasks ? "yes" : "no",
    Device: `${model.device}, ${model.dtype}${model.compiled ? ", compiled" : ""}`,
    ...trainingFacts(model.training ?? {}),
    "SHA-256": model.sha256,
  };
  return element(
    "section",
    { class: "panel", "aria-label": `Model ${model.name}` },
    element("h2", {}, `Model ${model.name}`),
    element("dl", { class: "facts" }, Object.entries(facts).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))])),
  );
}

function trainingFacts(training) {
  const shown = Object.entries(training).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value));
  return Object.fromEntries(shown.map(([name, value]) => [name[0].toUpperCase() + name.slice(1).replaceAll("_", " "), value]));
}

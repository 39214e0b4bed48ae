// The view "Batch": the running requests at their own steps, from GET /events/batch.

import { element, find } from "./dom.js";
import { sentence } from "./failure.js";
import { about, json, stream } from "./service.js";

const SAMPLES = [
  { digit: 8, count: 24, num_steps: 100 },
  { digit: 3, count: 12, num_steps: 60, sampler: "ddim", guidance_scale: 3 },
  { digit: 5, count: 6, num_steps: 100, guidance_scale: 1 },
  { digit: 1, count: 4, num_steps: 20, sampler: "dpmpp" },
  { digit: 7, count: 1, num_steps: 100 },
  { digit: 2, count: 16, model: "fast" },
];
const LINGER = 700; // milliseconds for which a finished request stays visible
const RETRY = 2; // seconds until the stream is opened again

let abort = null;
let lanes = new Map(); // job number -> {root, cells, rows, seenAt}

/** Connects the button. Runs once. */
export function start() {
  find("#batch-send").addEventListener("click", send);
  document.addEventListener("visibilitychange", () => {
    if (find("#batch").hidden) return;
    if (document.hidden) close(); // a hidden tab would keep one of the few connections of the browser to the service
    else open();
  });
}

/** Watches the batch while the view is open. */
export async function open() {
  close();
  const own = new AbortController();
  abort = own;
  say("#batch-connection", "Connecting");
  say("#batch-problem", "");
  showFigures({ step: 0, waiting: 0, running: 0, rows: [] });
  showEmpty();
  while (!own.signal.aborted) {
    const wait = await watch(own.signal);
    if (wait === null) {
      if (abort === own) abort = null;
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

/** Shows the events of a stream. Returns the seconds to wait before the next one, or null without one. */
async function watch(signal) {
  try {
    for await (const { data } of stream("events/batch", null, signal)) {
      say("#batch-connection", "Live");
      show(data);
    }
    say("#batch-connection", "The connection was lost. Reconnecting.");
    return RETRY;
  } catch (error) {
    if (error.name === "AbortError") return null;
    const isLocked = error.status === 401 || error.status === 403;
    const next = isLocked ? "Send the sample requests or open the view again to enter a key." : "Reconnecting.";
    say("#batch-connection", `${error.status === 429 ? error.detail + "." : sentence(error)} ${next}`);
    return isLocked ? null : Math.max(RETRY, error.retryAfter ?? 0);
  }
}

export function close() {
  abort?.abort();
  abort = null;
  lanes = new Map();
}

/** Shows a text. Screen readers repeat a text that is set again, so an equal text is not set. */
function say(id, text) {
  if (find(id).textContent !== text) find(id).textContent = text;
}

/** Sends the sample requests that the service permits. */
async function send() {
  say("#batch-problem", "");
  try {
    const { models, limits } = await about();
    const requests = samples(models, limits).map((body) => json("generate", body));
    if (!abort) open(); // the stream was refused before the key was entered
    const failed = (await Promise.allSettled(requests)).find(({ status }) => status === "rejected");
    if (failed) say("#batch-problem", sentence(failed.reason));
  } catch (error) {
    say("#batch-problem", sentence(error));
  }
}

function samples(models, limits) {
  const permitted = SAMPLES.filter((body) => {
    const model = models.find(({ name }) => name === (body.model ?? "default"));
    if (!model) return false;
    const isGuided = (body.guidance_scale ?? 1) !== 1;
    return (
      (!body.num_steps || (!model.steps.length && body.num_steps <= model.max_steps)) &&
      (!body.sampler || model.samplers.includes(body.sampler)) &&
      (!isGuided || model.guidable)
    );
  });
  const bodies = permitted.length ? permitted : SAMPLES.map(({ digit, count }) => ({ digit, count }));
  return bodies.map((body) => ({ ...body, count: Math.min(body.count, limits.count) }));
}

function showFigures({ step, waiting, running, rows }) {
  const active = rows.filter(({ evaluations }) => evaluations);
  const requests = new Set(active.map(({ job }) => job)).size;
  const figures = [
    ["Steps since the start", step],
    ["Images in this step", active.length],
    ["Evaluations in this step", active.reduce((sum, row) => sum + row.evaluations, 0)],
    ["Requests in this step", requests],
    ["Running images", running],
    ["Waiting images", waiting],
  ];
  const root = find("#batch-figures");
  if (!root.children.length) {
    root.append(...figures.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))));
  }
  figures.forEach(([, value], place) => {
    root.children[place].lastChild.textContent = value.toLocaleString("en");
  });
}

function show(data) {
  showFigures(data);
  const now = performance.now();
  const byJob = new Map();
  for (const row of data.rows) byJob.set(row.job, [...(byJob.get(row.job) ?? []), row]);
  if (byJob.size && !lanes.size) find("#batch-lanes").replaceChildren();
  for (const [job, rows] of byJob) {
    if (!lanes.has(job)) addLane(job, rows[0]);
    updateLane(lanes.get(job), rows, now);
  }
  for (const [job, lane] of lanes) {
    if (byJob.has(job)) continue;
    finishLane(lane);
    if (now - lane.seenAt > LINGER || !data.rows.length) {
      lane.root.remove();
      lanes.delete(job);
    }
  }
  if (!lanes.size) showEmpty();
}

function addLane(job, row) {
  const cells = element("div", { class: "cells" });
  const facts = element("p", { class: "hint" });
  const root = element("div", { class: "lane" }, element("div", {}, element("h3", {}, `Request ${job}`), facts), cells);
  lanes.set(job, { root, cells, facts, byIndex: new Map() });
  find("#batch-lanes").append(root);
}

function updateLane(lane, rows, now) {
  lane.seenAt = now;
  const [first] = rows;
  const isGuided = rows.some(({ guided }) => guided);
  lane.facts.textContent = `${first.of} steps, ${first.sampler}${isGuided ? ", guided" : ""}${first.model === "default" ? "" : `, model ${first.model}`}`;
  const seen = new Set();
  for (const row of rows) {
    const key = `${row.sampler} ${row.index}`;
    seen.add(key);
    if (!lane.byIndex.has(key)) {
      const fill = element("span", { class: "fill" });
      const text = element("b");
      const cell = element("div", { class: "cell" }, fill, text);
      lane.byIndex.set(key, { cell, fill, text });
      lane.cells.append(cell);
    }
    const { cell, fill, text } = lane.byIndex.get(key);
    cell.classList.toggle("active", row.evaluations > 0);
    fill.style.width = `${(100 * row.step) / row.of}%`;
    text.textContent = row.evaluations > 1 ? `${row.step} ×${row.evaluations}` : row.step;
  }
  for (const [key, { cell }] of lane.byIndex) {
    if (seen.has(key)) continue;
    cell.remove();
    lane.byIndex.delete(key);
  }
}

function finishLane(lane) {
  lane.facts.textContent = "finished";
  for (const { cell } of lane.byIndex.values()) cell.classList.remove("active");
}

function showEmpty() {
  const text = "No image is running. Send the sample requests, or generate images in another tab.";
  find("#batch-lanes").replaceChildren(element("p", { class: "hint" }, text));
}

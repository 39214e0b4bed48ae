// The view "Batch": the running requests at their own steps, from GET /events/batch. The sample requests show their
// images too, and are compared with the same requests one after the other.

import { element, find, moves, plural, pngUrl, setBusy } from "./dom.js";
import { sentence } from "./failure.js";
import { about, fullModel, modelOf } from "./models.js";
import { Comparison } from "./one-by-one.js";
import { newSeed } from "./random.js";
import { Run } from "./run.js";
import { LONGEST_WAIT, pause, stream } from "./service.js";

// A browser opens at most six connections to a service. One has the events of the batch, and one stays free.
const SAMPLES = [
  { label: 8, count: 24, num_steps: 100 },
  { label: 3, count: 8, num_steps: 50, sampler: "ddim", guidance_scale: 3 },
  { label: 5, count: 4, num_steps: 20, sampler: "dpmpp" },
  { label: 7, count: 1, num_steps: 10, sampler: "dpmpp" },
];
const APART = 300; // milliseconds between the sample requests
const PREVIEWS = 25; // of a sample request
const LINGER = 700; // milliseconds for which another finished request stays visible
const RETRY = 2; // seconds until the stream is opened again

let abort = null;
let sending = null; // aborts the sample requests
let lanes = new Map(); // job number -> lane of any other request
let own = []; // lanes of the sample requests
let ownRuns = []; // their runs, and those one after the other, which have no lanes

export function start() {
  find("#batch-send").addEventListener("click", send);
  document.addEventListener("visibilitychange", () => {
    if (find("#batch").hidden) return;
    if (document.hidden) unwatch(); // a hidden tab would keep one of the few connections of the browser to the service
    else open();
  });
}

export async function open() {
  unwatch();
  const watching = new AbortController();
  abort = watching;
  say("#batch-connection", "Connecting");
  if (!sending) say("#batch-problem", "");
  showFigures({ rows: [] });
  showEmpty();
  while (!watching.signal.aborted) {
    const wait = await watch(watching.signal);
    if (wait === null) {
      if (abort === watching) abort = null;
      return;
    }
    await pause(wait);
  }
}

/** Shows the events of a stream. Returns the seconds until it is opened again, or null if it is not. */
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

function unwatch() {
  abort?.abort();
  abort = null;
  for (const { root } of lanes.values()) root.remove();
  lanes = new Map();
}

/** Stops watching, and cancels the sample requests. */
export function close() {
  unwatch();
  sending?.abort();
}

/** Shows a text. Screen readers repeat a text that is set again, so an equal text is not set. */
function say(id, text) {
  if (find(id).textContent !== text) find(id).textContent = text;
}

/** Sends the sample requests that the service permits, then the same requests one after the other. */
async function send() {
  const controller = new AbortController();
  const { signal } = controller;
  sending = controller;
  setBusy(find("#batch-send"), true);
  say("#batch-problem", "");
  for (const lane of own) lane.root.remove();
  [own, ownRuns] = [[], []];
  let comparison = null;
  try {
    const { limits } = await about();
    signal.throwIfAborted();
    if (!abort) open(); // the stream was refused before the key was entered
    const bodies = samples(fullModel(), limits);
    comparison = new Comparison(bodies);
    const running = bodies.map(async (body, place) => {
      await pause((place * APART) / 1000, signal);
      const lane = new OwnLane(body);
      own.push(lane);
      await comparison.together(place, () => answer(body, signal, (run) => lane.watch(run)));
    });
    await Promise.all(running);
    await comparison.oneByOne((body) => answer(body, signal));
  } catch (error) {
    say("#batch-problem", signal.aborted ? "" : sentence(error));
    controller.abort(); // the other requests
  }
  comparison?.stop(signal.aborted);
  if (sending === controller) sending = null;
  setBusy(find("#batch-send"), false);
}

/** Sends a request, again if the service is busy. Resolves when it is answered. */
async function answer(body, signal, watchRun = () => {}) {
  for (;;) {
    const run = new Run("generate", body, `previews=${PREVIEWS}`);
    ownRuns.push(run);
    signal.addEventListener("abort", () => run.cancel(), { once: true });
    watchRun(run);
    await run.start();
    if (run.state === "done") return;
    if (run.error.status !== 429 || !(run.error.retryAfter <= LONGEST_WAIT)) throw run.error;
    say("#batch-problem", `The service is busy. A request will be sent again in ${plural(run.error.retryAfter, "second")}.`);
    await pause(run.error.retryAfter, signal);
    say("#batch-problem", "");
  }
}

function samples({ name, num_classes, samplers, steps, max_steps, guidable }, limits) {
  const isPermitted = ({ num_steps, sampler = samplers[0], guidance_scale = 1 }) =>
    !steps.length && num_steps <= max_steps && samplers.includes(sampler) && (guidance_scale === 1 || guidable);
  const permitted = SAMPLES.filter(isPermitted);
  const bodies = permitted.length ? permitted : SAMPLES.map(({ label, count }) => ({ label, count }));
  return bodies.map((body) => ({
    ...body, label: body.label % num_classes, model: name, count: Math.min(body.count, limits.count), seed: newSeed(),
  }));
}

function showFigures({ rows }) {
  const active = rows.filter(({ evaluations }) => evaluations);
  const figures = [
    ["Images in this step", active.length],
    ["Evaluations in this step", active.reduce((sum, row) => sum + row.evaluations, 0)],
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
  for (const lane of own) if (byJob.has(lane.job)) lane.update(byJob.get(lane.job));
  for (const { facts } of ownRuns) byJob.delete(facts?.job);
  for (const [job, rows] of byJob) {
    if (!lanes.has(job)) lanes.set(job, new Lane(`Request ${job}`));
    lanes.get(job).update(rows);
    lanes.get(job).seenAt = now;
  }
  for (const [job, lane] of lanes) {
    if (byJob.has(job)) continue;
    lane.end();
    if (now - lane.seenAt > LINGER || !data.rows.length) {
      lane.root.remove();
      lanes.delete(job);
    }
  }
  showEmpty();
}

const settingsOf = (of, sampler, isGuided, model) =>
  `${of} steps, ${sampler}${isGuided ? ", guided" : ""}${model === "default" ? "" : `, model ${model}`}`;

/** The line of a request: one cell for each image, with the number of its finished steps. */
class Lane {
  constructor(title) {
    this.facts = element("p", { class: "hint" });
    this.cells = element("div", { class: "cells" });
    this.root = element("div", { class: "lane" }, element("div", {}, element("h2", {}, title), this.facts), this.cells);
    this.images = new Map(); // an image of the request -> {cell, picture, text, of}
    find("#batch-lanes > .hint")?.remove();
    find("#batch-lanes").append(this.root);
  }

  imageOf(key) {
    if (!this.images.has(key)) {
      const [picture, text] = [element("img", { alt: "" }), element("b")];
      const cell = element("div", { class: "cell" }, picture, text);
      this.images.set(key, { cell, picture, text, of: null });
      this.cells.append(cell);
    }
    return this.images.get(key);
  }

  /** Shows the rows of the current step. An image that had a row before is finished. */
  update(rows) {
    const running = new Set();
    for (const row of rows) {
      const image = this.imageOf(this.keyOf(row));
      running.add(image);
      image.of = row.of;
      image.cell.classList.remove("done");
      image.cell.classList.toggle("active", row.evaluations > 0);
      image.text.textContent = row.evaluations > 1 ? `${row.step} ×${row.evaluations}` : row.step;
    }
    for (const image of this.images.values()) if (image.of && !running.has(image)) this.finish(image);
    const [first] = rows;
    if (first) this.settings = settingsOf(first.of, first.sampler, rows.some(({ guided }) => guided), first.model);
    this.facts.textContent = this.settings ?? "";
  }

  keyOf({ sampler, index }) {
    return `${sampler} ${index}`;
  }

  finish({ cell, text, of }) {
    cell.classList.remove("active");
    cell.classList.add("done");
    text.textContent = of;
  }

  end() {
    this.update([]);
    this.facts.textContent = "finished";
  }
}

/** The line of a sample request. It shows all images, also while they wait. */
class OwnLane extends Lane {
  constructor(body) {
    super(`${modelOf(body).title(body.label)}, ${plural(body.count, "image")}`);
    for (let index = 0; index < body.count; index++) this.imageOf(index).text.textContent = "waits";
  }

  get job() {
    return this.run?.isActive ? this.run.facts?.job : null;
  }

  keyOf({ index }) {
    return index;
  }

  watch(run) {
    this.run = run;
    run.addEventListener("change", () => this.show());
  }

  show() {
    const { run } = this;
    const last = run.frames.at(-1);
    for (const [index, image] of this.images) {
      const png = run.images[index] ?? (moves() ? last?.x0[index] : null);
      if (png && png !== image.shown) image.picture.src = pngUrl(png);
      image.shown = png;
    }
    if (run.isActive) return;
    for (const image of this.images.values()) {
      image.cell.classList.remove("active");
      if (run.state === "done") this.finish({ ...image, of: last?.of ?? image.of ?? "" });
    }
    const state = { done: "finished", cancelled: "cancelled", failed: run.error?.retryAfter ? "waits" : "failed" }[run.state];
    this.facts.textContent = [this.settings, state].filter(Boolean).join(", ");
  }
}

function showEmpty() {
  if (find("#batch-lanes").children.length) return;
  const text = "No image is running. Send the sample requests, or generate images in another tab.";
  find("#batch-lanes").replaceChildren(element("p", { class: "hint" }, text));
}

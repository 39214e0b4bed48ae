// Watches the service: asks for /health and /metrics every few seconds while the page is visible.

import { announce, element, find } from "./dom.js";

const INTERVAL = 5000; // milliseconds between two samples
const RETRY = 2000; // milliseconds while the service does not answer
const TIMEOUT = 5000; // milliseconds for an answer
const TEXTS = {
  unreachable: "The service does not answer. This page tries again every two seconds.",
  starting: "The service is starting. It loads and compiles the model.",
  draining: "The service is stopping. It finishes its requests and accepts no new ones.",
  failed: "The engine has failed. The service must be restarted.",
};

let shown = "ok";
let known = null; // the digests of the models when the page was opened

/** Takes a sample now. Resolves when it was passed on. */
export let sampleNow = async () => {};

/**
 * Calls `take({at, health, images, buckets, batches})` for each sample from now on, and `take(null)` if there is no
 * answer.
 */
export function watchService(take) {
  let timer = null;
  let isBusy = false;
  const sample = async () => {
    clearTimeout(timer);
    if (document.hidden || isBusy) return;
    isBusy = true;
    try {
      const health = await (await get("health")).json();
      const text = await (await get("metrics")).text();
      showState(health.status);
      showChangedModels(health.models);
      take({ at: performance.now() / 1000, health, ...parseMetrics(text) });
    } catch {
      showState("unreachable");
      take(null);
    }
    isBusy = false;
    timer = setTimeout(sample, shown === "ok" ? INTERVAL : RETRY);
  };
  sampleNow = sample;
  document.addEventListener("visibilitychange", sample);
  sample();
}

const get = (path) => fetch(path, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });

/** Shows a banner if the service has restarted with other models. The address keeps the state over a reload. */
function showChangedModels(models) {
  if (!models) return; // the service is starting
  const digests = models.map(({ sha256 }) => sha256).join();
  known ??= digests;
  if (digests === known) return;
  const reload = element("button", { type: "button", class: "small", click: () => location.reload() }, "Reload the page");
  find("#banner").hidden = false;
  find("#banner").replaceChildren("The service has started with another model. ", reload);
}

function showState(state) {
  if (state === shown) return;
  const banner = find("#banner");
  banner.hidden = state === "ok";
  banner.textContent = TEXTS[state] ?? "";
  if (state === "ok") announce("The service is ready");
  shown = state;
}

/**
 * Returns the number of images and the latency histogram of /generate from the Prometheus text format, and a text that
 * changes if a batch starts, continues or ends.
 */
function parseMetrics(text) {
  let images = 0;
  let batches = "";
  const buckets = new Map();
  for (const line of text.split("\n")) {
    if (line.startsWith("unfog_images_total{")) images += Number(line.split(" ").at(-1));
    if (/^unfog_(unfinished_batches|batch_lines_total)\b/.test(line)) batches += line;
    const match = /^unfog_request_duration_seconds_bucket\{(.*)\} (\S+)$/.exec(line);
    if (!match || !match[1].includes('route="/generate"')) continue;
    const limit = /le="([^"]+)"/.exec(match[1])[1];
    buckets.set(limit === "+Inf" ? Infinity : Number(limit), Number(match[2]));
  }
  return { images, buckets, batches };
}

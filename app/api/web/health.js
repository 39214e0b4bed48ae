// Watches the service: asks for /health and /metrics every few seconds while the page is visible.

import { announce, find } from "./dom.js";
import { forgetAbout } from "./service.js";

const INTERVAL = 5000; // milliseconds between two samples
const RETRY = 2000; // milliseconds while the service does not answer
const TEXTS = {
  unreachable: "The service does not answer. This page tries again every two seconds.",
  starting: "The service is starting. It loads and compiles the model.",
  draining: "The service is stopping. It finishes its requests and accepts no new ones.",
  failed: "The engine has failed. The service must be restarted.",
};

let shown = "ok";

/** Calls `take({at, health, images, buckets})` for each sample, from now on. */
export function watchService(take) {
  let timer = null;
  const sample = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    let wait = INTERVAL;
    try {
      const health = await (await fetch("health", { cache: "no-store" })).json();
      const text = await (await fetch("metrics", { cache: "no-store" })).text();
      showState(health.status);
      take({ at: performance.now() / 1000, health, ...parseMetrics(text) });
    } catch {
      showState("unreachable");
    }
    if (shown !== "ok") wait = RETRY;
    timer = setTimeout(sample, wait);
  };
  document.addEventListener("visibilitychange", sample);
  sample();
}

function showState(state) {
  if (state === shown) return;
  if (shown === "unreachable") forgetAbout(); // another release may have started
  const banner = find("#banner");
  banner.hidden = state === "ok";
  banner.textContent = TEXTS[state] ?? "";
  if (state === "ok") announce("The service is ready");
  shown = state;
}

/** Returns the number of images and the latency histogram of /generate from the Prometheus text format. */
export function parseMetrics(text) {
  let images = 0;
  const buckets = new Map();
  for (const line of text.split("\n")) {
    if (line.startsWith("unfog_images_total{")) images += Number(line.split(" ").at(-1));
    const match = /^unfog_request_duration_seconds_bucket\{(.*)\} (\S+)$/.exec(line);
    if (!match || !match[1].includes('route="/generate"')) continue;
    const limit = /le="([^"]+)"/.exec(match[1])[1];
    buckets.set(limit === "+Inf" ? Infinity : Number(limit), Number(match[2]));
  }
  return { images, buckets };
}

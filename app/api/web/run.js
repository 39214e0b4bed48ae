// One streamed request for images, with all of its frames. Views watch its event "change".

import { INTERRUPTED, ServiceError, stream } from "./service.js";

// The previews of four images have 7 kB a step, which is much for a slow network.
const PREVIEWS = /[23]g/.test(navigator.connection?.effectiveType) ? 10 : 100;

const WORD_COLUMNS = 16; // as in a sheet of the service

export class Run extends EventTarget {
  /** `path` is a route such as "generate", `body` its request, and `query` chooses what the stream contains. */
  constructor(path, body, query = `previews=${PREVIEWS}&include=x_t`) {
    super();
    Object.assign(this, { path, body, query, count: body.labels?.length ?? body.count ?? 1 });
    this.columns = body.labels ? Math.min(this.count, WORD_COLUMNS) : Math.ceil(Math.sqrt(this.count));
    this.state = "sent"; // sent, queued, running, done, failed or cancelled
    this.frames = []; // {step, of, x0, xt}: base64 PNG files of all images
    this.images = new Array(this.count).fill(null); // base64 PNG files of the finished images
    this.facts = null; // data of the event `accepted`
    this.result = null; // data of the event `done`
    this.error = null;
    this.abort = new AbortController();
  }

  /** Sends the request. Resolves at the end of the run, also if it fails or is cancelled. */
  async start() {
    this.startedAt = performance.now();
    try {
      for await (const { name, data } of stream(`${this.path}?${this.query}`, this.body, this.abort.signal)) {
        this.take(name, data);
        this.dispatchEvent(new Event("change"));
      }
      if (!this.result) throw new ServiceError(INTERRUPTED);
    } catch (error) {
      this.error = error;
      this.state = error.name === "AbortError" ? "cancelled" : "failed";
    }
    this.endedAt = performance.now();
    this.dispatchEvent(new Event("change"));
  }

  cancel() {
    this.abort.abort();
  }

  take(name, data) {
    if (name === "accepted") {
      this.facts = data;
      this.acceptedAt = performance.now();
      this.state = "queued";
    } else if (name === "progress") {
      this.firstStepAt ??= performance.now();
      this.state = "running";
      this.frames.push({ step: data.step, of: data.of, x0: data.previews, xt: data.x_t ?? data.previews });
    } else if (name === "image") {
      this.images[data.index] = data.png;
    } else if (name === "done") {
      this.result = data;
      this.state = "done";
    }
  }

  get isActive() {
    return this.state === "sent" || this.state === "queued" || this.state === "running";
  }

  /** The share of the work that is done, 0 to 1. */
  get progress() {
    const last = this.frames.at(-1);
    return this.state === "done" ? 1 : last ? last.step / last.of : 0;
  }

  /** The estimated seconds until the end, or null. At first it is the estimate of the service, then that of the steps. */
  get secondsLeft() {
    const last = this.frames.at(-1);
    const now = performance.now();
    if (last && last.step > 2 && this.progress > 0.1) {
      return ((now - this.firstStepAt) / 1000) * (1 / this.progress - 1);
    }
    return this.facts ? Math.max(0, this.facts.eta_seconds - (now - this.acceptedAt) / 1000) : null;
  }
}

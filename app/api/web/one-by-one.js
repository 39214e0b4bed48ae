// Draws requests that share their steps, and the same requests one after the other, on one time axis.

import { announce, duration, element, find, moves, plural } from "./dom.js";
import { modelOf } from "./models.js";

const UPDATE = 100; // milliseconds between two drawings

export class Comparison {
  constructor(bodies) {
    this.rows = bodies.map((body) => ({ body }));
    find("#comparison").hidden = false;
    find("#comparison-text").textContent = "The requests share their steps.";
    this.draw();
    if (moves()) this.clock = setInterval(() => this.draw(), UPDATE);
  }

  /** Measures a request. `send(body)` resolves when it is answered. */
  async together(place, send) {
    const row = this.rows[place];
    this.startedAt ??= performance.now();
    row.arrival = this.now();
    await send(row.body);
    row.seconds = this.now() - row.arrival;
    this.draw();
  }

  /** Sends each request after the answer to the one before. The chart keeps the arrival times and shows the waits. */
  async oneByOne(send) {
    find("#comparison-text").textContent = "The same requests are sent one after the other.";
    let free = 0; // the time at which the request before is answered
    for (const row of this.rows) {
      row.begin = Math.max(row.arrival, free);
      this.startedAt = performance.now() - 1000 * row.begin;
      await send(row.body);
      row.end = free = this.now();
    }
    const most = (of) => this.rows.reduce((best, row) => (of(row) > of(best) ? row : best));
    const late = most(({ arrival, begin }) => begin - arrival);
    const large = most(({ body }) => body.count);
    const facts = ({ body, arrival, seconds, end }) => [plural(body.count, "image"), duration(seconds), duration(end - arrival)];
    const [few, soon, later] = facts(late);
    const [many, shared, alone] = facts(large);
    const text =
      late.begin > late.arrival
        ? `The request for ${few} was answered after ${soon}. If the requests run one after the other, it waits for those before it and is answered after ${later}. The request for ${many} took ${shared}, and ${alone} alone.`
        : "Each request was answered before the next one arrived, so no request had to wait.";
    find("#comparison-text").textContent = text;
    announce(text);
  }

  stop(isAborted) {
    clearInterval(this.clock);
    this.draw();
    if (isAborted) find("#comparison-text").textContent = "The comparison was stopped before its end.";
  }

  now() {
    return (performance.now() - this.startedAt) / 1000;
  }

  draw() {
    const now = this.now();
    const [together, alone] = [({ arrival, seconds }) => (seconds ? arrival + seconds : now), ({ begin, end }) => end ?? now];
    const started = this.rows.filter(({ arrival }) => arrival !== undefined);
    const all = Math.max(1, ...started.map(together), ...started.filter(({ begin }) => begin !== undefined).map(alone));
    const bar = (kind, from, to) => {
      const made = element("div", { class: kind });
      made.style.left = `${(100 * from) / all}%`;
      made.style.width = `${(100 * (to - from)) / all}%`;
      return made;
    };
    const lines = this.rows.flatMap((row) => {
      const { body, arrival, seconds, begin, end } = row;
      const shared = arrival === undefined ? [] : [bar("shared", arrival, together(row))];
      const single = begin === undefined ? [] : [bar("waiting", arrival, begin), bar("alone", begin, alone(row))];
      return [
        element("h2", {}, `${modelOf(body).title(body.label)}, ${plural(body.count, "image")}`),
        element("div", { class: "track" }, shared),
        element("span", { class: "mono" }, seconds ? duration(seconds) : ""),
        element("div", { class: "track" }, single),
        element("span", { class: "mono" }, end ? duration(end - arrival) : ""),
      ];
    });
    find("#comparison-rows").replaceChildren(...lines);
  }
}

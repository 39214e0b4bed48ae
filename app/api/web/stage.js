// Shows a run: its images while they emerge, progress and cancel, then the scrubber over every step.

import { element, announce, duration, moves, plural, pngUrl } from "./dom.js";
import { failureBox } from "./failure.js";
import { modelOf } from "./models.js";

const FRAMES_PER_SECOND = 25; // of the playback
const CALM_MILLISECONDS = 1000; // time between two updates of the text if the user prefers reduced motion

const LONG_ROW = 5; // a row of more images uses the full width

const NOISY = "x_t: the noisy image";
const HOW = "Move the slider to see each step.";
const PREDICTED = "predicted x_0: the expected clean image";

export class Stage {
  /** `open(run, index)` is called for a click on a finished image, and `retry()` by the button after an error. */
  constructor(root, { open, retry, extra = () => null }) {
    Object.assign(this, { root, open, retry, extra });
    this.run = null;
  }

  show(run) {
    const hadFocus = this.root.contains(document.activeElement);
    this.stop();
    this.run = run;
    this.position = null; // index of the frame on the scrubber; null: the newest one
    this.build();
    const update = () => this.schedule();
    run.addEventListener("change", update);
    this.clock = setInterval(update, 500); // for the time left
    this.unwatch = () => run.removeEventListener("change", update);
    this.update();
    announce(`Generating ${plural(run.count, "image")}`);
    if (hadFocus) this.cancelButton.focus({ preventScroll: true });
  }

  stop() {
    this.unwatch?.();
    this.unwatch = null;
    clearInterval(this.clock);
    clearInterval(this.player);
    this.player = null;
  }

  build() {
    const { count, columns } = this.run;
    const pane = (name, text, open) => {
      const images = Array.from({ length: count }, (_, index) => {
        const image = element("img", { alt: "" });
        if (!open) return element("div", { class: "tile" }, image);
        return element("button", { type: "button", class: "tile", disabled: true, click: () => open(index) }, image);
      });
      const labels = images.map(() => element("span", { class: "similarity", "aria-hidden": "true" }));
      const grid = element("div", { class: "grid" }, images.map((image, index) => element("div", {}, image, labels[index])));
      grid.style.setProperty("--columns", columns);
      const caption = element("figcaption", {}, text);
      const figure = element("figure", { class: "pane" }, grid, caption);
      return { figure, text: caption, images: images.map((each) => each.firstChild), tiles: images, labels, name, shown: [] };
    };
    this.panes = {
      xt: pane("xt", NOISY),
      x0: pane("x0", PREDICTED, (index) => this.open(this.run, index)),
    };
    this.line = element("div", { class: "run-line" });
    this.bar = element("progress", { max: 1, value: 0, "aria-label": "Progress of the images" });
    this.slider = element("input", { type: "range", min: 0, "aria-label": "Step", input: () => this.seek(), pointerdown: () => this.pause() });
    this.play = element("button", { type: "button", class: "small", click: () => this.togglePlay() }, "Play");
    this.at = element("output", { "aria-live": "off" });
    this.scrubber = element("div", { class: "scrubber", hidden: true }, this.play, this.slider, this.at);
    this.footer = element("div", { class: "run-line" });
    this.panesRow = element("div", { class: `panes${this.run.columns > LONG_ROW ? " long" : ""}` }, this.panes.xt.figure, this.panes.x0.figure);
    this.explanation = element("div", { class: "explanation" });
    this.problem = element("div");
    this.root.replaceChildren(
      element("div", { class: "panel run" }, this.bar, this.line, this.panesRow, this.problem, this.scrubber, this.footer, this.explanation),
    );
    this.shownState = null;
    this.choosePanes();
  }

  /** Returns the name of an image for screen readers. */
  nameOf(index) {
    const { body, count } = this.run;
    const label = body.labels?.[index] ?? body.label;
    return `${label === undefined ? "" : `${modelOf(body).title(label)}, `}image ${index + 1} of ${count}`;
  }

  /** Updates the page before the next frame of the display, so that many events cost one update. */
  schedule() {
    if (this.isScheduled) return;
    this.isScheduled = true;
    const update = () => {
      this.isScheduled = false;
      if (this.run) this.update();
    };
    if (moves() || !this.run.isActive) requestAnimationFrame(update);
    else setTimeout(update, CALM_MILLISECONDS);
  }

  update() {
    const { run } = this;
    const hadFocus = this.line.contains(document.activeElement);
    this.bar.value = run.progress;
    this.bar.hidden = !run.isActive;
    this.line.hidden = !run.isActive;
    if (run.isActive) this.showProgress();
    // With reduced motion only finished images appear. The scrubber shows the steps.
    if (this.position === null && (moves() || !run.isActive)) this.showFrame(run.frames.length - 1);
    if (run.state !== this.shownState) this.showState(hadFocus);
  }

  showProgress() {
    const { run } = this;
    const last = run.frames.at(-1);
    const left = run.secondsLeft;
    const parts = [
      run.state === "sent" && "Sending the request",
      run.state === "queued" && (run.facts.position ? `${plural(run.facts.position, "image")} ahead in the queue` : "Starting"),
      run.state === "running" && `Step ${last.step} of ${last.of}`,
      left !== null && left > 0.5 && `about ${Math.ceil(left)} s left`,
    ].filter(Boolean);
    this.status ??= element("span");
    this.cancelButton ??= element("button", { type: "button", class: "small", click: () => this.run.cancel() }, "Cancel");
    this.status.textContent = parts.join(", ");
    if (!this.status.isConnected || this.status.parentNode !== this.line) {
      this.line.replaceChildren(this.status, element("span", { class: "grow" }), this.cancelButton);
    }
  }

  /** `hadFocus` is true if the removed button had the focus. The first button of the new state gets it. */
  showState(hadFocus) {
    const { run } = this;
    this.shownState = run.state;
    this.choosePanes();
    if (run.isActive) return;
    clearInterval(this.clock);
    this.scrubber.hidden = run.frames.length < 2;
    this.slider.max = run.frames.length - 1;
    this.slider.value = this.slider.max;
    this.describePosition(run.frames.length - 1);
    this.panes.x0.tiles.forEach((tile, index) => {
      tile.disabled = !run.images[index];
      tile.setAttribute("aria-label", `${this.nameOf(index)}: details`);
    });
    this.footer.replaceChildren();
    if (run.state === "done") this.showResult();
    else if (run.state === "cancelled") this.showCancelled();
    else this.problem.replaceChildren(...this.notes(), failureBox(run.error, this.retry));
    if (hadFocus) [...this.root.querySelectorAll("button:enabled")].find((each) => each.checkVisibility())?.focus({ preventScroll: true });
  }

  notes() {
    return this.run.note ? [element("p", { role: "note" }, this.run.note)] : [];
  }

  showResult() {
    const { run } = this;
    const seconds = run.result.timing.total_seconds;
    this.problem.replaceChildren(...this.notes());
    this.footer.replaceChildren(
      element("span", {}, `${plural(run.count, "image")} in ${duration(seconds)}. Seed `, element("span", { class: "mono" }, String(run.body.seed))),
      element("span", { class: "grow" }),
      ...[this.extra(run)].flat().filter(Boolean),
    );
    announce(`${plural(run.count, "image")} finished in ${duration(seconds)}`);
  }

  /** Shows the similarity of each finished image below it, and elements that explain the numbers. */
  showSimilarities(similarities, explanation) {
    const { tiles, labels } = this.panes.x0;
    similarities.forEach((similarity, index) => {
      labels[index].textContent = similarity.toFixed(2);
      tiles[index].setAttribute("aria-label", `${this.nameOf(index)}, similarity ${similarity.toFixed(2)}: details`);
    });
    this.explanation.replaceChildren(...explanation);
  }

  showCancelled() {
    const text = `Cancelled after ${plural(this.run.frames.at(-1)?.step ?? 0, "step")}. The service has stopped the work.`;
    this.problem.replaceChildren(
      element("div", { class: "actions" }, element("p", {}, text), element("button", { type: "button", click: this.retry }, "Run again")),
    );
    announce(text);
  }

  /** Shows a frame. The frame after the last step has the finished images. */
  showFrame(index) {
    const { run } = this;
    const frame = run.frames[index];
    if (!frame && !run.images.some(Boolean)) return;
    const isLast = index === run.frames.length - 1;
    const finished = (name, place) => (isLast || !frame ? run.images[place] : null) ?? frame?.[name][place];
    for (const { name, images, shown } of Object.values(this.panes)) {
      images.forEach((image, place) => {
        const png = finished(name, place);
        if (!png || shown[place] === png) return;
        shown[place] = png;
        image.src = pngUrl(png);
        image.alt = name === "xt" ? `noisy image ${place + 1}` : `image ${place + 1}`;
      });
    }
  }

  describePosition(index) {
    const frame = this.run.frames[index];
    if (!frame) return;
    this.at.textContent = `${frame.step} / ${frame.of}`;
    this.slider.setAttribute("aria-valuetext", `step ${frame.step} of ${frame.of}`);
  }

  seek() {
    this.position = Number(this.slider.value);
    this.showFrame(this.position);
    this.describePosition(this.position);
    this.choosePanes();
  }

  pause() {
    clearInterval(this.player);
    this.player = null;
    this.play.textContent = "Play";
  }

  togglePlay() {
    if (this.player) {
      this.pause();
      return;
    }
    if (this.slider.value === this.slider.max) this.slider.value = 0;
    this.play.textContent = "Pause";
    const advance = () => {
      this.slider.value = Number(this.slider.value) + 1;
      this.seek();
      if (this.slider.value === this.slider.max) this.pause();
    };
    this.player = setInterval(advance, 1000 / FRAMES_PER_SECOND);
  }

  /** Shows x_t next to x_0, except for finished images, where both are equal. */
  choosePanes() {
    const { run } = this;
    const isLast = this.position === null || this.position === run.frames.length - 1;
    const isAlone = run.state === "done" && isLast;
    this.panes.xt.figure.hidden = isAlone;
    this.panesRow.dataset.panes = isAlone ? 1 : 2;
    this.panesRow.hidden = !moves() && run.isActive; // there is nothing to see before the end
    this.panes.x0.text.textContent = isAlone ? `The finished image${run.count > 1 ? "s" : ""}. ${run.frames.length > 1 ? HOW : ""}` : PREDICTED;
  }
}

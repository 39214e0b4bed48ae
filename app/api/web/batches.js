// The batches of the user in the view "Status": their progress, cancelling, and downloads of their results.

import { announce, download, element, find, period, setBusy } from "./dom.js";
import { sentence } from "./failure.js";
import { blobOf, call, hasKey, json, pause } from "./service.js";

const MOST = 20; // batches, the newest ones
const MOST_ERRORS = 3; // shown of a batch that has failed
const INTERVAL = 2; // seconds between two requests while a batch is unfinished
const UNFINISHED = {
  validating: "Checking the file",
  in_progress: "Running",
  finalizing: "Storing the results",
  cancelling: "Cancelling",
};
const ENDED = { completed: "Completed", failed: "Failed", expired: "Expired after 24 hours", cancelled: "Cancelled" };

let watching = null; // aborts the requests
let isIdle = false; // true if the batches are shown and all have ended
let seen = ""; // the metrics of batches at the last sample
const rows = new Map(); // id of a batch -> its Row

/** Shows the batches, and watches them until all have ended. */
export async function open() {
  close();
  if (find("#status").hidden) return;
  watching = new AbortController();
  const { signal } = watching;
  while (!signal.aborted) {
    const wait = await refresh(signal);
    if (wait === null) return;
    await pause(wait);
    await visible();
  }
}

export function close() {
  watching?.abort();
  isIdle = false;
}

/** Takes the metrics of batches. If they have changed, a batch may be new. */
export function notice(metrics) {
  const isChanged = metrics !== seen;
  seen = metrics;
  if (isChanged && isIdle) open();
}

/** Resolves when the tab is visible. */
const visible = () =>
  new Promise((resolve) => {
    if (document.hidden) document.addEventListener("visibilitychange", () => resolve(visible()), { once: true });
    else resolve();
  });

/** Shows the newest batches. Returns the seconds until the next request, or null if there is none. */
async function refresh(signal) {
  try {
    const { data, has_more } = await json(`v1/batches?limit=${MOST}`, null, signal);
    if (signal.aborted) return null;
    show(data, has_more);
    isIdle = !data.some(({ status }) => UNFINISHED[status]);
    return isIdle ? null : INTERVAL;
  } catch (error) {
    if (signal.aborted) return null;
    const isLocked = error.status === 401 || error.status === 403;
    find("#batches").hidden = false;
    const next = isLocked ? "Open the view again to enter a key." : "The page tries again.";
    say(find("#batches-problem"), `${sentence(error).replace(/\.?$/, ".")} ${next}`);
    return isLocked ? null : Math.max(INTERVAL, error.retryAfter ?? 0);
  }
}

/** Shows a text. Screen readers repeat a text that is set again, so an equal text is not set. */
function say(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function show(batches, hasMore) {
  say(find("#batches-problem"), "");
  find("#batches").hidden = !batches.length;
  find("#no-batches").hidden = batches.length > 0;
  say(find("#more-batches"), hasMore ? `Only the newest ${MOST} batches are shown.` : "");
  const ids = new Set(batches.map(({ id }) => id));
  for (const [id, { root }] of rows) {
    if (ids.has(id)) continue;
    root.remove();
    rows.delete(id);
  }
  const list = find("#batch-list");
  batches.forEach((batch, place) => {
    if (!rows.has(batch.id)) rows.set(batch.id, new Row(batch));
    const { root } = rows.get(batch.id);
    // A row that is in its place is not moved: it would lose the focus.
    if (list.children[place] !== root) list.insertBefore(root, list.children[place] ?? null);
    rows.get(batch.id).update(batch);
  });
}

const number = (value) => value.toLocaleString("en");

class Row {
  constructor({ id, endpoint, created_at, metadata }) {
    this.id = id;
    this.status = null;
    this.isCancelling = false; // true while the request is sent
    this.described = { "aria-describedby": `${id}-title ${id}-made` }; // tells the buttons of several batches apart
    this.state = element("span");
    this.cancel = this.button("Cancel", () => this.sendCancel());
    this.downloads = element("span", { class: "actions" });
    this.bar = element("progress", { "aria-label": "Answered lines" });
    this.counts = element("p");
    this.errors = element("ul", { class: "error" });
    this.problem = element("p", { class: "error", role: "status" });
    const title = element("h3", { id: `${id}-title` }, endpoint);
    const made = new Date(1000 * created_at).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
    const pairs = Object.entries(metadata ?? {}).map(([name, value]) => `${name}: ${value}`);
    this.root = element(
      "li",
      {},
      element("div", { class: "run-line" }, title, this.state, element("span", { class: "grow" }), this.downloads, this.cancel),
      this.bar,
      this.counts,
      this.errors,
      this.problem,
      element("p", { class: "hint", id: `${id}-made` }, [made, ...pairs].join(", "), " ", element("span", { class: "mono" }, id)),
    );
  }

  button(text, click) {
    return element("button", { type: "button", class: "small", ...this.described, click }, text);
  }

  update(batch) {
    const isUnfinished = batch.status in UNFINISHED;
    const hadFocus = this.root.contains(document.activeElement);
    this.state.textContent = UNFINISHED[batch.status] ?? ENDED[batch.status] ?? batch.status;
    this.showProgress(batch);
    this.bar.hidden = !isUnfinished;
    this.cancel.hidden = !isUnfinished;
    setBusy(this.cancel, this.isCancelling || batch.status === "cancelling" || batch.status === "finalizing");
    if (batch.status === this.status) return;
    const isNew = this.status === null;
    this.status = batch.status;
    if (isUnfinished) return;
    this.problem.textContent = "";
    this.downloads.replaceChildren(...this.links(batch));
    this.errors.replaceChildren(...errorsOf(batch.errors?.data ?? []).map((text) => element("li", {}, text)));
    if (!isNew) announce(["Batch", this.state.textContent, this.counts.textContent].filter(Boolean).join(", "));
    if (hadFocus) (this.downloads.firstChild ?? find("#batches-title")).focus({ preventScroll: true });
  }

  showProgress({ status, request_counts: { total, completed, failed }, images, images_per_second, seconds_left }) {
    const isRunning = status === "in_progress";
    const isPartial = status === "cancelled" || status === "expired"; // then `failed` includes lines without an answer
    this.bar.max = Math.max(1, total);
    this.bar.value = completed + failed;
    const parts = [
      `${number(isPartial ? completed : completed + failed)} of ${number(total)} line${total === 1 ? "" : "s"}`,
      failed && `${number(failed)} failed${isPartial ? " or not answered" : ""}`,
      images && `${number(images)} image${images === 1 ? "" : "s"}`,
      isRunning && images_per_second && `${images_per_second.toFixed(1)} images per second`,
      isRunning && seconds_left !== null && `about ${period(seconds_left)} left`,
    ];
    this.counts.textContent = total ? parts.filter(Boolean).join(", ") : "";
  }

  links({ output_file_id, error_file_id, images }) {
    const file = (id) => `v1/files/${id}/content`;
    return [
      output_file_id && this.link("Results", file(output_file_id), `${this.id}_output.jsonl`),
      output_file_id && images && this.link("Images (ZIP)", `batches/${this.id}/images.zip`, `${this.id}.zip`),
      error_file_id && this.link("Errors", file(error_file_id), `${this.id}_error.jsonl`),
    ].filter(Boolean);
  }

  /**
   * Returns a link, with which the browser saves the file to the disk. With an API key, returns a button, because a link
   * cannot send the key.
   */
  link(text, path, name) {
    if (!hasKey()) return element("a", { class: "button small", href: path, download: name, ...this.described }, text);
    const button = this.button(text, () => this.save(button, path, name));
    return button;
  }

  async save(button, path, name) {
    setBusy(button, true);
    this.problem.textContent = "";
    try {
      const answer = await call(path, { accept: "*/*" });
      download(name, await blobOf(answer));
    } catch (error) {
      say(this.problem, sentence(error));
    }
    setBusy(button, false);
  }

  async sendCancel() {
    this.isCancelling = true;
    setBusy(this.cancel, true);
    this.problem.textContent = "";
    try {
      await json(`v1/batches/${this.id}/cancel`, {});
    } catch (error) {
      if (error.status !== 409) say(this.problem, sentence(error)); // 409: the batch has ended in the meantime
    }
    this.isCancelling = false;
    open();
  }
}

/** Returns texts for the errors in the input file. */
function errorsOf(errors) {
  const place = (line) => (line ? `Line ${number(line)}: ` : "");
  const texts = errors.slice(0, MOST_ERRORS).map(({ line, message }) => `${place(line)}${message}.`);
  const left = errors.length - MOST_ERRORS;
  return left > 0 ? [...texts, `And ${number(left)} more.`] : texts;
}

// Shows an error in plain words, with a countdown if the service says when to try again.

import { announce, element, plural } from "./dom.js";

const TITLES = {
  overloaded: "The service is busy",
  rate_limited: "Too many requests",
  starting: "The service is starting",
  draining: "The service is stopping",
  engine_failed: "The engine has failed",
  deadline_exceeded: "The images took too long",
  unauthorized: "This service needs an API key",
  forbidden: "The API key was refused",
  unreachable: "The service does not answer",
  interrupted: "The connection broke",
  invalid_request: "The request is not valid",
  invalid_image: "The picture cannot be read",
  body_too_large: "The picture is too large",
  cancelled: "Cancelled",
  storage_unavailable: "The database does not answer",
  not_available: "This service has no CLIP model",
};
const ADVICE = {
  overloaded: "Other requests are in the queue. Your request was not started.",
  rate_limited: "The service limits the number of requests per period. Your request was not started.",
  starting: "It loads and compiles the model. The first start takes up to a minute, later starts a few seconds.",
  draining: "It accepts no new requests. A new process usually starts soon.",
  deadline_exceeded: "Ask for fewer images or fewer steps, or try again when the service is less busy.",
  unreachable: "Check that it is running and that you are online. Then try again.",
  interrupted: "The stream ended before the result was complete. Try again: the same seed gives the same images.",
  storage_unavailable: "Batches continue when it answers again.",
  engine_failed: "The service must be restarted.",
  forbidden: "Check the key and try again.",
  unauthorized: "Try again and enter a key.",
};

/** Returns a text for an error: the title, and a sentence that says what to do. */
export function sentence(error) {
  if (!error.code) return `The page has an error. ${error.message}`;
  const title = TITLES[error.code] ?? "The service reported an error";
  const fields = (error.errors ?? []).map((each) => `${each.loc.join(".")}: ${each.msg}`).join(". ");
  const id = error.code === "internal_error" ? ` Request id: ${error.request_id}.` : "";
  return `${title}. ${fields || ADVICE[error.code] || error.detail}${id}`;
}

/** Returns a box that describes the error. `retry` is called by its button, which waits for `Retry-After`. */
export function failureBox(error, retry) {
  const [title, text] = sentence(error).split(/\. (.*)/s);
  const wait = element("span", { class: "hint", role: "timer" });
  const button = element("button", { type: "button", class: "primary", click: retry }, "Try again");
  const box = element(
    "div",
    { class: "failure", role: "group", "aria-label": title },
    element("h2", {}, title),
    element("p", {}, text),
    element("div", { class: "actions" }, retry ? button : null, wait),
  );
  if (retry && error.retryAfter) countDown(error.retryAfter, wait, button, box);
  announce(`${title}. ${text}`);
  return box;
}

function countDown(seconds, wait, button, box) {
  const end = performance.now() + 1000 * seconds;
  button.disabled = true;
  const update = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    if (left > 0 && (box.isConnected || left === seconds)) {
      wait.textContent = `You can try again in ${plural(left, "second")}.`;
      setTimeout(update, 250);
      return;
    }
    wait.textContent = "You can try again now.";
    button.disabled = false;
  };
  update();
}

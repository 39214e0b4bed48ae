// Calls the service. Every failure becomes a ServiceError with a text that a user can act on.

import { eventsOf } from "./event-stream.js";
import { load, save } from "./storage.js";

export const LONGEST_WAIT = 120; // seconds
export const INTERRUPTED = { code: "interrupted", detail: "The connection broke" };
const KEY = "unfog-api-key"; // name in the session storage, which the browser deletes when the tab is closed

let key = load("sessionStorage", KEY);

/** An error of the service or of the connection to it. `code` is the code of the API, or one of this page. */
export class ServiceError extends Error {
  constructor({ status = 0, code, detail, retryAfter = null, errors = [], request_id = null }) {
    super(detail);
    Object.assign(this, { status, code, detail, retryAfter, errors, request_id });
  }
}

/** Asks the user for an API key. The main module sets it. Resolves to the key, or to null. */
let askForKey = async () => null;
export const setKeyPrompt = (prompt) => {
  askForKey = prompt;
};
export const hasKey = () => key !== null;

/** Sends a request and returns the response. Asks for a key if the service needs one, and then sends it again. */
export async function call(path, { body, accept = "application/json", signal } = {}) {
  for (;;) {
    const sent = key;
    const response = await send(path, body, accept, signal);
    if (response.status !== 401 && response.status !== 403) {
      if (sent) save("sessionStorage", KEY, sent);
      if (response.ok) return response;
      throw await errorOf(response);
    }
    const error = await errorOf(response);
    if (key !== sent) continue; // another request has asked for the key in the meantime
    const entered = await askForKey(error.status === 403);
    if (!entered) throw error;
    key = entered;
  }
}

async function send(path, body, accept, signal) {
  const headers = { Accept: accept };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  try {
    return await fetch(path, options);
  } catch (error) {
    throw connectionError(error);
  }
}

/** Resolves after a number of seconds. Rejects when the signal is aborted. */
export const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });

export async function json(path, body, signal) {
  return (await call(path, { body, signal })).json();
}

export const blobOf = (response) =>
  response.blob().catch(() => {
    throw new ServiceError(INTERRUPTED);
  });

/**
 * Does the same as `json`, but waits and tries again if the service is busy. `tell(seconds)` is called before each wait,
 * and `tell(0)` after it.
 */
export async function patientJson(path, body, tell) {
  for (;;) {
    try {
      return await json(path, body);
    } catch (error) {
      if (error.status !== 429 || !(error.retryAfter <= LONGEST_WAIT)) throw error;
      tell(error.retryAfter);
      await pause(error.retryAfter);
      tell(0);
    }
  }
}

/** Sends a request and yields {name, data} for each event of the response. Throws for an event `error`. */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal, accept: "text/event-stream" });
  try {
    for await (const event of eventsOf(response.body)) {
      if (event.name === "error") throw new ServiceError(event.data);
      yield event;
    }
  } catch (error) {
    if (error instanceof ServiceError || error.name === "AbortError") throw error;
    throw new ServiceError(INTERRUPTED);
  }
}

function connectionError(error) {
  if (error.name === "AbortError") return error;
  return new ServiceError({ code: "unreachable", detail: "The service does not answer" });
}

async function errorOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    const answer = await response.json();
    return new ServiceError({ ...(answer.error ? ofOpenai(response, answer.error) : answer), retryAfter });
  } catch {
    const detail = `The response has status ${response.status} and does not come from unfog. Check the proxy`;
    return new ServiceError({ status: response.status, code: "unknown", detail, retryAfter });
  }
}

/** Returns the fields of an error of a route below /v1, which has the format of OpenAI. */
const ofOpenai = ({ status, headers }, { code, message }) => ({
  status, code, detail: message, request_id: headers.get("X-Request-ID"),
});

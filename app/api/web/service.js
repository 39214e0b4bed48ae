// Calls the service. Every failure becomes a ServiceError with a text that a user can act on.

import { eventsOf } from "./event-stream.js";

export const INTERRUPTED = { code: "interrupted", detail: "The connection broke" };
const KEY = "unfog-api-key"; // in sessionStorage: the key is forgotten when the tab is closed

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
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Sends a request and returns the response. Asks for a key if the service needs one, and then sends it again. */
export async function call(path, { body, accept = "application/json", signal } = {}) {
  for (;;) {
    const sent = sessionStorage.getItem(KEY);
    const response = await send(path, body, accept, signal, sent);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401 && error.status !== 403) throw error;
    // Another request may have asked for the key in the meantime.
    if (sessionStorage.getItem(KEY) === sent) {
      const key = await askForKey(error.status === 403);
      if (!key) throw error;
      sessionStorage.setItem(KEY, key);
    }
  }
}

async function send(path, body, accept, signal, key) {
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

/** Sends a request and returns the JSON of the response. */
export async function json(path, body, signal) {
  return (await call(path, { body, signal })).json();
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
    return new ServiceError({ ...(await response.json()), retryAfter });
  } catch {
    const detail = `The response has status ${response.status} and does not come from unfog. Check the proxy`;
    return new ServiceError({ status: response.status, code: "unknown", detail, retryAfter });
  }
}

let loaded = null;
/** Returns the answer of GET /models. It is requested once, and again after a failure. */
export function about() {
  loaded ??= json("models").catch((error) => {
    loaded = null;
    throw error;
  });
  return loaded;
}
export const forgetAbout = () => {
  loaded = null;
};

/** Returns the default model. */
export async function defaultModel() {
  return (await about()).models[0];
}

// A JavaScript client: generates digits, shows the progress, recognises a digit, and retries failed requests.
//
// It has no dependencies. In a browser, import `service`, `post` and `events`, and set `service.url`. The service must
// permit the origin of the page with UNFOG_CORS_ORIGINS. It also runs in Node.js 18 or newer.
//
// Run: node examples/client.mjs [FOLDER]

const env = globalThis.process?.env ?? {};
export const service = { url: env.UNFOG_URL ?? "http://127.0.0.1:8000", key: env.UNFOG_API_KEY };
const MAX_ATTEMPTS = 5;
const MAX_WAIT = 60; // seconds

// Sends a request. Retries it after a lost connection, and after 429 or 503 when the time in Retry-After is over. All
// attempts have the same Idempotency-Key, so they get the same images. `body` is an object for JSON, or FormData.
export async function post(path, accept, body) {
  const headers = { Accept: accept, "Idempotency-Key": `${Date.now()}-${Math.random()}` };
  if (service.key) headers.Authorization = `Bearer ${service.key}`;
  if (!(body instanceof FormData)) {
    headers["Content-Type"] = "application/json"; // for FormData, fetch sets it
    body = JSON.stringify(body);
  }
  for (let attempt = 1; ; attempt++) {
    let problem, wait;
    try {
      const signal = AbortSignal.timeout(60_000); // milliseconds
      const response = await fetch(service.url + path, { method: "POST", headers, body, signal });
      if (response.ok) return response;
      problem = await response.text();
      wait = response.headers.get("Retry-After"); // only 429 and 503 have it
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a lost connection is a TypeError
      problem = error.message;
      wait = 1;
    }
    if (wait === null || wait > MAX_WAIT || attempt === MAX_ATTEMPTS) throw new Error(problem);
    console.log(`attempt ${attempt} failed, next attempt in ${wait} s: ${problem}`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

// Yields the name and the data of each event of an event stream. Leaving the loop early cancels the request.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const complete = text.split("\n\n"); // an empty line ends each event
      text = complete.pop();
      for (const event of complete) {
        const [, name, data] = event.match(/^event: (.*)\ndata: (.*)$/);
        yield [name, JSON.parse(data)];
      }
    }
  } finally {
    await reader.cancel();
  }
}

async function main(folder) {
  const { readFile, writeFile } = await import("node:fs/promises");
  const body = { digit: 7, sampler: "dpmpp", num_steps: 10, scale: 4 };

  const response = await post("/generate", "image/png", body);
  await writeFile(`${folder}/seven.png`, new Uint8Array(await response.arrayBuffer()));
  console.log("wrote seven.png with seed", response.headers.get("X-Seed"));

  const stream = await post("/generate?previews=5", "text/event-stream", { ...body, count: 2 });
  for await (const [name, data] of events(stream)) {
    if (name === "progress") console.log(`step ${data.step} of ${data.of}`);
    if (name === "error") throw new Error(data.detail);
    if (name !== "image") continue;
    await writeFile(`${folder}/stream-${data.index}.png`, Buffer.from(data.png, "base64"));
    console.log(`wrote stream-${data.index}.png`);
  }

  const form = new FormData();
  form.set("image", new Blob([await readFile(`${folder}/seven.png`)]));
  const answer = await (await post("/recognize", "application/json", form)).json();
  console.log(`recognised ${answer.digit} with probability ${Math.max(...answer.probabilities)}`);
}

if (globalThis.process?.argv[1]?.endsWith("client.mjs")) await main(process.argv[2] ?? ".");

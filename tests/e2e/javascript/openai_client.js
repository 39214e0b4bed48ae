// Calls the OpenAI Images API with the unmodified JavaScript client, and prints the results as JSON.
// The argument is a JSON object: url, image and mask (files), limitedUrl with its key, and slowUrl.

import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const asked = JSON.parse(process.argv[2]);
let numRequests = 0;

function clientOf(url, apiKey = "not-checked", maxRetries = 0) {
  const counted = (...request) => {
    numRequests += 1;
    return fetch(...request);
  };
  return new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries, fetch: counted });
}

async function eventsOf(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

async function errorOf(promise) {
  numRequests = 0;
  try {
    await promise();
  } catch (error) {
    const { status, param, code, type } = error;
    return { name: error.constructor.name, status, param, code, type, numRequests };
  }
  return null;
}

const client = clientOf(asked.url);
const common = { n: 2, size: "56x56", quality: "medium", seed: 5 };
const image = () => toFile(createReadStream(asked.image), "image.png", { type: "image/png" });
const mask = () => toFile(createReadStream(asked.mask), "mask.png", { type: "image/png" });
const limited = clientOf(asked.limitedUrl, asked.key, 2);
const slow = clientOf(asked.slowUrl, "not-checked", 2);
const longRequest = { prompt: "7", n: 10 };
const results = {};

results.models = (await client.models.list()).data.map((model) => model.id);
results.generated = await client.images.generate({ prompt: "a handwritten seven, please", ...common });
results.edited = await client.images.edit({ prompt: "7", image: await image(), ...common });
results.several = await client.images.edit({ prompt: "7", image: [await image()], ...common });
results.filled = await client.images.edit({ prompt: "7", image: await image(), mask: await mask(), ...common });
results.generationEvents = await eventsOf(
  await client.images.generate({ prompt: "7", ...common, stream: true, partial_images: 2 }),
);
results.editEvents = await eventsOf(
  await client.images.edit({ prompt: "7", image: await image(), ...common, stream: true, partial_images: 1 }),
);
results.errors = {
  prompt: await errorOf(() => client.images.generate({ prompt: "a cat" })),
  size: await errorOf(() => client.images.generate({ prompt: "7", size: "1024x1024" })),
  image: await errorOf(async () => client.images.edit({ prompt: "7", image: await toFile(Buffer.from("x"), "x.png") })),
  model: await errorOf(() => client.models.retrieve("gpt-image-1")),
  key: await errorOf(() => clientOf(asked.limitedUrl, "wrong").images.generate({ prompt: "7" })),
  timeout: await errorOf(() => slow.images.generate(longRequest)),
  stream: await errorOf(async () => eventsOf(await slow.images.generate({ ...longRequest, stream: true }))),
};
numRequests = 0;
await limited.models.list();
const numWithoutRetry = numRequests;
const answer = await limited.images.generate({ prompt: "7", quality: "medium" });
results.retried = { images: answer.data.length, numRequests: numRequests - numWithoutRetry };

console.log(JSON.stringify(results));

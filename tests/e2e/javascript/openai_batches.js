// Calls the OpenAI Files and Batch APIs with the unmodified JavaScript client, and prints the results as JSON.
// The argument is a JSON object: url, lines and long (files with the lines of two batches), and an unknown batch.

import { createReadStream } from "node:fs";
import { setTimeout } from "node:timers/promises";
import OpenAI from "openai";

const asked = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: `${asked.url}/v1`, apiKey: "not-checked", maxRetries: 2 });
const results = {};

async function errorOf(promise) {
  try {
    await promise();
  } catch (error) {
    const { status, param, code } = error;
    return { name: error.constructor.name, status, param, code };
  }
  return null;
}

function upload(path, options = {}) {
  return client.files.create({ file: createReadStream(path), purpose: "batch", ...options });
}

async function create(file, endpoint) {
  return client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h" });
}

async function isListed(list, id) {
  for await (const each of list) if (each.id === id) return true;
  return false;
}

results.file = await upload(asked.lines, { expires_after: { anchor: "created_at", seconds: 3600 } });
results.batch = await create(results.file, "/v1/images/generations");
while (["validating", "in_progress", "finalizing"].includes(results.batch.status)) {
  await setTimeout(20);
  results.batch = await client.batches.retrieve(results.batch.id);
}
results.output = await (await client.files.content(results.batch.output_file_id)).text();
results.listedFile = await isListed(client.files.list({ limit: 2 }), results.file.id);
results.listedBatch = await isListed(client.batches.list({ limit: 2 }), results.batch.id);
results.deleted = await client.files.delete(results.file.id);

const long = await upload(asked.long);
results.cancelling = (await client.batches.cancel((await create(long, "/generate")).id)).status;
results.errors = {
  batch: await errorOf(() => client.batches.retrieve(asked.unknown)),
  file: await errorOf(() => client.files.content(results.file.id)),
  purpose: await errorOf(() => upload(asked.lines, { purpose: "assistants" })),
  endpoint: await errorOf(() => create(long, "/v1/embeddings")),
  cancel: await errorOf(() => client.batches.cancel(results.batch.id)),
};

console.log(JSON.stringify(results));

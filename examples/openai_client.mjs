// The official client of the OpenAI API in JavaScript: generates, edits and streams digits, and shows an error.
//
// Install: npm install openai
// Run:     node examples/openai_client.mjs [FOLDER]

import { readFile, writeFile } from "node:fs/promises";
import OpenAI, { toFile } from "openai";

const url = process.env.UNFOG_URL ?? "http://127.0.0.1:8000";
const apiKey = process.env.UNFOG_API_KEY ?? "none"; // The client requires a key, even if the service does not.
const folder = process.argv[2] ?? ".";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey });

async function write(name, base64) {
  await writeFile(`${folder}/${name}`, Buffer.from(base64, "base64"));
  console.log(`wrote ${name}`);
}

const models = await client.models.list();
console.log("models:", models.data.map((model) => model.id).join(", "));

// `seed` is not a field of OpenAI's API. The client sends such fields unchanged.
const size = "28x28";
const quality = "medium"; // 10 steps
const images = await client.images.generate({ prompt: "a handwritten seven", n: 2, size, quality, seed: 42 });
for (const [index, image] of images.data.entries()) await write(`generated-${index}.png`, image.b64_json);

// The mask has the size of the image. Its lower half is transparent, so the edit fills in this half.
const mask = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAYAAAByDd+UAAAAJElEQVR42u3NMQEAIAAEodP+nbXFT1CAU72GbmNCoVAoBICFD1YlARvz1bEJAAAAAElFTkSuQmCC", "base64");
const edited = await client.images.edit({
  image: await toFile(await readFile(`${folder}/generated-0.png`), "image.png", { type: "image/png" }),
  mask: await toFile(mask, "mask.png", { type: "image/png" }),
  prompt: "7",
  size,
});
await write("edited.png", edited.data[0].b64_json);

const request = { prompt: "the digit 3", size, quality };
const stream = await client.images.generate({ ...request, stream: true, partial_images: 2 });
for await (const event of stream) {
  const isPartial = event.type === "image_generation.partial_image";
  await write(isPartial ? `partial-${event.partial_image_index}.png` : "streamed.png", event.b64_json);
}

try {
  await client.images.generate({ prompt: "a cat" });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log(`error ${error.status} in ${error.param}: ${error.message}`);
}

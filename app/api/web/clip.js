// Prompts, and the CLIP similarity of images to them.

import { json } from "./service.js";

const DIGIT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
const MAX_PROMPT_LENGTH = 200; // Unicode characters
const MAX_IMAGES = 64; // of a request to /score

export const digitPrompt = (digit) => `a handwritten digit ${DIGIT_WORDS[digit]}`;

export const isPrompt = (text) =>
  text.trim() !== "" && [...text].length <= MAX_PROMPT_LENGTH && text.isWellFormed();

/** Returns the prompt of the text chunks of an image, or null. The chunk is a JSON string. */
export function promptOf(chunks) {
  try {
    const prompt = JSON.parse(chunks["CLIP-Prompt"]);
    return typeof prompt === "string" && isPrompt(prompt) ? prompt : null;
  } catch {
    return null;
  }
}

/** Returns the similarity of each PNG file to the prompt, and the mean similarity of real images of the digit. */
export async function score(images, prompt, digit, signal) {
  const similarities = [];
  let realDigits = null;
  for (let first = 0; first < images.length; first += MAX_IMAGES) {
    const body = { images: images.slice(first, first + MAX_IMAGES), prompts: [prompt], fit: "resize", invert: false };
    const answer = await json("score", body, signal);
    similarities.push(...answer.similarities.map(([similarity]) => similarity));
    realDigits = answer.real_digits.similarities[0][digit];
  }
  return { similarities, realDigits };
}

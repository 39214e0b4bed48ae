// Ten real digits of MNIST's test split, one of each class, and the drawing of the user.

import { element } from "./dom.js";
import { SIDE, canvasOf } from "./png.js";
import { ServiceError } from "./service.js";

let sheet = null;

/** Returns the grey values of a real digit. */
export async function realDigit(digit) {
  sheet ??= loadSheet().catch((error) => {
    sheet = null; // so that the next call tries again
    throw new ServiceError({ code: "unreachable", detail: error.message });
  });
  const context = await sheet;
  const { data } = context.getImageData(SIDE * digit, 0, SIDE, SIDE);
  return Float32Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i]);
}

async function loadSheet() {
  const image = new Image();
  image.src = "static/digits.png";
  await image.decode();
  const canvas = element("canvas", { width: 10 * SIDE, height: SIDE });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context;
}

/** Fills an element with a button for each real digit. `choose(digit, grey)` is called for a click. */
export async function addRealDigits(root, choose) {
  const all = await Promise.all(Array.from({ length: 10 }, (_, digit) => realDigit(digit)));
  root.replaceChildren();
  for (const [digit, grey] of all.entries()) {
    const image = element("img", { src: canvasOf(grey).toDataURL(), alt: "", width: SIDE, height: SIDE });
    root.append(element("button", { type: "button", "aria-label": `Digit ${digit}`, click: () => choose(digit, grey) }, image));
  }
}

let readDrawing = async () => null;
/** Returns the drawing of the view Draw as grey values, or null. */
export const drawingOf = () => readDrawing();
export const setDrawingReader = (read) => {
  readDrawing = read;
};

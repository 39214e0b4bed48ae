// Ten real digits of MNIST's test split, one of each class, and the drawing of the user.

import { element } from "./dom.js";
import { canvasOf, valuesOf } from "./png.js";
import { ServiceError } from "./service.js";

const SIDE = 28; // pixels of a digit in the file

let sheet = null;

/** Returns true if the real digits are images as the model generates them. */
export const suit = (model) => model.isDigits && model.normalises_drawings;

/** Returns the values of a real digit in the shape of the model. */
export async function realDigit(digit, model) {
  sheet ??= loadSheet().catch((error) => {
    sheet = null; // so that the next call tries again
    throw new ServiceError({ code: "unreachable", detail: error.message });
  });
  return valuesOf(await sheet, model, [SIDE * digit, 0, SIDE, SIDE]);
}

async function loadSheet() {
  const image = new Image();
  image.src = "static/digits.png";
  await image.decode();
  return image;
}

/** Fills an element with a button for each real digit. `choose(digit, values)` is called for a click. */
export async function addRealDigits(root, model, choose) {
  const all = await Promise.all(model.class_names.map((_, digit) => realDigit(digit, model)));
  const buttons = all.map((values, digit) => {
    const image = element("img", { src: canvasOf(values, model).toDataURL(), alt: "" });
    return element("button", { type: "button", "aria-label": `Digit ${digit}`, click: () => choose(digit, values) }, image);
  });
  root.replaceChildren(...buttons);
}

let readDrawing = async () => null;
export const drawingOf = () => readDrawing();
export const setDrawingReader = (read) => {
  readDrawing = read;
};

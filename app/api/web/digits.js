// Ten real digits of MNIST's test split, one of each class, and the drawing of the user.

import { element } from "./dom.js";
import { SIDE, canvasOf } from "./png.js";

let sheet = null;

/** Returns the grey values of a real digit. */
export async function realDigit(digit) {
  sheet ??= loadSheet();
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
  for (let digit = 0; digit < 10; digit++) {
    const grey = await realDigit(digit);
    const image = element("img", { src: canvasOf(grey).toDataURL(), alt: "", width: SIDE, height: SIDE });
    root.append(element("button", { type: "button", "aria-label": `Digit ${digit}`, click: () => choose(digit, grey) }, image));
  }
}

let drawing = null; // grey values of the last drawing
export const drawingOf = () => drawing;
export const setDrawing = (grey) => {
  drawing = grey;
};

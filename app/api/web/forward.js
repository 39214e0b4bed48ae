// The forward process on a real or drawn digit: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

import { lineChart } from "./chart.js";
import { addRealDigits, drawingOf, realDigit } from "./digits.js";
import { element, find, pngUrl, showValue } from "./dom.js";
import { sentence } from "./failure.js";
import { SIDE, base64Of, canvasOf, draw } from "./png.js";
import { gaussian } from "./random.js";
import { json } from "./service.js";

const GREY = 127.5; // grey levels of one unit of x: the range -1 to 1 is 0 to 255
const MAX_NOISE_STD = 1000; // of /denoise
const PREDICTION = "predicted x_0";
const WAIT = 150; // milliseconds without a change after which the prediction is requested

let model;
let noise;
let request = null;
let timer = null;
let tiles;
export const state = { grey: null, onChange: () => {} }; // the chosen digit; onChange is called for a new one

export async function start(loaded) {
  model = loaded;
  newNoise();
  tiles = {
    x_0: element("canvas", { width: SIDE, height: SIDE, role: "img", "aria-label": "The clean digit" }),
    x_t: element("canvas", { width: SIDE, height: SIDE, role: "img", "aria-label": "The digit with noise" }),
    mean: element("img", { width: SIDE, height: SIDE, alt: "The prediction of the model" }),
  };
  const texts = { x_0: "x_0: the clean image", x_t: "x_t: the noisy image", mean: PREDICTION };
  find("#forward-tiles").replaceChildren(
    ...Object.entries(tiles).map(([name, tile]) =>
      element("figure", {}, element("div", { class: "tile" }, tile), element("figcaption", {}, texts[name])),
    ),
  );
  tiles.mean.parentNode.parentNode.hidden = !model.has_picture_tasks;
  await addRealDigits(find("#forward-digits"), choose);
  find("#forward-drawing").hidden = !model.has_picture_tasks;
  find("#forward-drawing").addEventListener("click", useDrawing);
  find("#forward-noise").addEventListener("click", () => {
    newNoise();
    update();
    state.onChange();
  });
  find("#forward-t").addEventListener("input", update);
  showValue(find("#forward-t"), find("#forward-t-value"));
  choose(3, await realDigit(3));
}

function newNoise() {
  noise = Float32Array.from({ length: SIDE * SIDE }, gaussian);
}

function choose(digit, grey) {
  state.grey = grey;
  const buttons = find("#forward-digits").children;
  [...buttons].forEach((button, place) => button.setAttribute("aria-pressed", place === digit));
  draw(tiles.x_0, grey);
  update();
  state.onChange();
}

async function useDrawing() {
  try {
    const grey = await drawingOf();
    if (grey) choose(null, grey);
    else location.hash = "#/draw";
  } catch (error) {
    captionOf(tiles.x_0).textContent = sentence(error);
  }
}

const captionOf = (tile) => find("figcaption", tile.parentNode.parentNode);

/** Returns the standard deviation of the noise in grey levels at timestep t, at most MAX_NOISE_STD. */
export function noiseStd(t) {
  const alpha = model.alpha_bar[t];
  return Math.min(MAX_NOISE_STD, Math.sqrt((1 - alpha) / alpha) * GREY);
}

/** Returns the picture (784 grey values, not clipped) of x_t / sqrt(alpha_bar_t), as /denoise expects it. */
export function noisyPicture(t) {
  const std = noiseStd(t);
  return state.grey.map((value, place) => value + std * noise[place]);
}

function update() {
  const t = Number(find("#forward-t").value);
  const alpha = model.alpha_bar[t];
  const [signal, std] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
  draw(tiles.x_t, state.grey.map((value, place) => GREY * (1 + signal * (value / GREY - 1) + std * noise[place])));
  find("#forward-equation").textContent = `x_t = ${signal.toFixed(3)} · x_0 + ${std.toFixed(3)} · noise`;
  const points = (value) => model.alpha_bar.map((each, place) => [place, value(each)]);
  find("#forward-chart").replaceChildren(
    lineChart({
      series: [
        { points: points((each) => Math.sqrt(each)), kind: "main", label: "" },
        { points: points((each) => Math.sqrt(1 - each)), kind: "second" },
      ],
      x: [0, model.alpha_bar.length - 1],
      y: [0, 1],
      height: 160,
      marker: t,
      xLabel: "timestep t",
      description: `Signal ${signal.toFixed(2)} and noise ${std.toFixed(2)} at timestep ${t}`,
    }),
    element("p", { class: "legend" }, "Line: factor of the digit. Dashed line: factor of the noise."),
  );
  clearTimeout(timer);
  timer = setTimeout(() => predict(t), WAIT);
}

/** Shows the predicted x_0 of the noisy image. */
async function predict(t) {
  request?.abort();
  request = new AbortController();
  if (!model.has_picture_tasks) return;
  const caption = captionOf(tiles.mean);
  try {
    const body = { image: base64Of(canvasOf(noisyPicture(t))), noise_std: noiseStd(t), mode: "mean", invert: false, fit: "resize" };
    const answer = await json("denoise", body, request.signal);
    tiles.mean.src = pngUrl(answer.images[0].png);
    caption.textContent = noiseStd(t) < MAX_NOISE_STD ? PREDICTION : `${PREDICTION} at the strongest noise that /denoise accepts`;
  } catch (error) {
    if (error.name !== "AbortError") caption.textContent = sentence(error);
  }
}

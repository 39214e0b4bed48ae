// The forward process on a real, generated or drawn image: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

import { lineChart } from "./chart.js";
import { addRealDigits, drawingOf, realDigit, suit } from "./digits.js";
import { element, find, pngUrl, setBusy, showValue } from "./dom.js";
import { sentence } from "./failure.js";
import { showClasses } from "./models.js";
import { base64Of, canvasOf, draw, valuesOfPng } from "./png.js";
import { gaussian, newSeed } from "./random.js";
import { json } from "./service.js";

const GREY = 127.5; // levels of one unit of x: the range -1 to 1 is 0 to 255
const MAX_NOISE_STD = 1000; // of /denoise
const PREDICTION = "predicted x_0";
const WAIT = 150; // milliseconds without a change after which the prediction is requested

let noise;
let request = null;
let timer = null;
let tiles;
// The model, and the label and the values of the chosen image. onChange is called for another image and for other noise.
export const state = { model: null, label: null, values: null, onChange: () => {} };

export function start() {
  find("#forward-drawing").addEventListener("click", useDrawing);
  find("#forward-new").addEventListener("click", () => generateImage().catch(showError));
  find("#forward-noise").addEventListener("click", () => {
    newNoise();
    if (state.values) changed();
  });
  find("#forward-t").addEventListener("input", () => state.values && update());
  showValue(find("#forward-t"), find("#forward-t-value"));
}

/** Shows a real digit, or a generated image if the classes are not digits. */
export async function show(model) {
  Object.assign(state, { model, values: null, onChange: () => {} });
  newNoise();
  const { width, height, has_picture_tasks } = model;
  tiles = {
    x_0: element("canvas", { width, height, role: "img", "aria-label": "The clean image" }),
    x_t: element("canvas", { width, height, role: "img", "aria-label": "The image with noise" }),
    mean: element("img", { alt: "The prediction of the model" }),
  };
  const texts = { x_0: "x_0: the clean image", x_t: "x_t: the noisy image", mean: PREDICTION };
  find("#forward-tiles").replaceChildren(
    ...Object.entries(tiles).map(([name, tile]) =>
      element("figure", {}, element("div", { class: "tile" }, tile), element("figcaption", {}, texts[name])),
    ),
  );
  tiles.mean.parentNode.parentNode.hidden = !has_picture_tasks;
  find("#forward-drawing").hidden = !has_picture_tasks;
  const slider = find("#forward-t");
  Object.assign(slider, { max: model.end, value: Math.round(0.4 * model.end) });
  slider.dispatchEvent(new Event("input"));
  for (const id of ["#forward-class", "#forward-new"]) find(id).hidden = suit(model);
  find("#forward-digits").hidden = !suit(model);
  if (suit(model)) {
    await addRealDigits(find("#forward-digits"), model, choose);
    choose(3, await realDigit(3, model));
  } else {
    showClasses(find("#forward-label"), model);
    await generateImage();
  }
}

async function generateImage() {
  const { model } = state;
  setBusy(find("#forward-new"), true);
  try {
    const label = Number(find("#forward-label").value);
    const answer = await json("generate", { label, model: model.name, seed: newSeed() });
    const values = await valuesOfPng(answer.images[0].png, model);
    if (model === state.model) choose(label, values);
  } finally {
    setBusy(find("#forward-new"), false);
  }
}

function newNoise() {
  const { width, height, channels } = state.model;
  noise = Float32Array.from({ length: width * height * channels }, gaussian);
}

function choose(label, values) {
  Object.assign(state, { label, values });
  [...find("#forward-digits").children].forEach((button, place) => button.setAttribute("aria-pressed", place === label));
  draw(tiles.x_0, values);
  changed();
}

function changed() {
  update();
  state.onChange();
}

const showError = (error) => {
  captionOf(tiles.x_0).textContent = sentence(error);
};

async function useDrawing() {
  try {
    const values = await drawingOf();
    if (values) choose(null, values);
    else location.hash = "#/draw";
  } catch (error) {
    showError(error);
  }
}

const captionOf = (tile) => find("figcaption", tile.parentNode.parentNode);

/** Returns the standard deviation of the noise in grey levels at timestep t, at most MAX_NOISE_STD. */
export function noiseStd(t) {
  const alpha = state.model.alpha_bar[t];
  return Math.min(MAX_NOISE_STD, Math.sqrt((1 - alpha) / alpha) * GREY);
}

/** Returns the values (not clipped) of x_t / sqrt(alpha_bar_t), as /denoise expects it. */
export function noisyPicture(t) {
  const std = noiseStd(t);
  return state.values.map((value, place) => value + std * noise[place]);
}

function update() {
  const t = Number(find("#forward-t").value);
  const { alpha_bar } = state.model;
  const alpha = alpha_bar[t];
  const [signal, std] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
  draw(tiles.x_t, state.values.map((value, place) => GREY * (1 + signal * (value / GREY - 1) + std * noise[place])));
  find("#forward-equation").textContent = `x_t = ${signal.toFixed(3)} · x_0 + ${std.toFixed(3)} · noise`;
  const points = (value) => alpha_bar.map((each, place) => [place, value(each)]);
  find("#forward-chart").replaceChildren(
    lineChart({
      series: [
        { points: points((each) => Math.sqrt(each)), kind: "main", label: "" },
        { points: points((each) => Math.sqrt(1 - each)), kind: "second" },
      ],
      x: [0, state.model.end],
      y: [0, 1],
      height: 160,
      marker: t,
      xLabel: "timestep t",
      description: `Signal ${signal.toFixed(2)} and noise ${std.toFixed(2)} at timestep ${t}`,
    }),
    element("p", { class: "legend" }, "Line: factor of the image. Dashed line: factor of the noise."),
  );
  clearTimeout(timer);
  timer = setTimeout(() => predict(t), WAIT);
}

async function predict(t) {
  request?.abort();
  request = new AbortController();
  const { model } = state;
  if (!model.has_picture_tasks) return;
  const caption = captionOf(tiles.mean);
  try {
    const body = { model: model.name, image: base64Of(canvasOf(noisyPicture(t), model)), noise_std: noiseStd(t), mode: "mean", invert: false, fit: "resize" };
    if (!model.guidable && state.label !== null) body.label = state.label; // the model predicts nothing without a class
    const answer = await json("denoise", body, request.signal);
    tiles.mean.src = pngUrl(answer.images[0].png);
    caption.textContent = noiseStd(t) < MAX_NOISE_STD ? PREDICTION : `${PREDICTION} at the strongest noise that /denoise accepts`;
  } catch (error) {
    if (error.name !== "AbortError") caption.textContent = sentence(error);
  }
}

// The four tasks of the view "Draw": recognise, remove noise, fill in and redraw.

import { bar } from "./chart.js";
import { openDetail } from "./detail.js";
import { announce, element, find, pngUrl, showValue } from "./dom.js";
import { failureBox } from "./failure.js";
import { about, className, showClasses } from "./models.js";
import { base64Of, bytesOf, canvasOf, textChunks, valuesOfPng } from "./png.js";
import { gaussian, newSeed } from "./random.js";
import { Run } from "./run.js";
import { json } from "./service.js";
import { Stage } from "./stage.js";

const COUNT = 4; // images of /inpaint and /edit
const MOST_BARS = 20; // of more classes only the most likely ones are shown

let model;
let pad;
let mask;
let values;
let limits = { count: COUNT };
let request = null; // the running call of /recognize
const shown = {}; // task -> {run, stage} of its newest run

/** Connects the controls. `values()` returns the values of the drawing, or null. */
export function start(parts) {
  ({ pad, mask, values } = parts);
  showValue(find("#noise-std"), find("#noise-std-value"));
  showValue(find("#strength"), find("#strength-value"), (value) => value.toFixed(2));
  find("#denoise-run").addEventListener("click", () => withDrawing("denoise", denoise));
  find("#inpaint-run").addEventListener("click", () => withDrawing("inpaint", inpaint));
  find("#edit-run").addEventListener("click", () => withDrawing("edit", edit));
  find("#mask-clear").addEventListener("click", () => {
    mask.set(() => false);
    announce("Nothing is marked");
  });
  find("#mask-half").addEventListener("click", () => {
    mask.set((x, y) => y >= model.height / 2);
    announce("The lower half is marked");
  });
}

/** Offers the tasks for a model, without the results for another one. */
export function use(loaded) {
  model = loaded;
  showClasses(find("#inpaint-label"), model, "find automatically");
  showClasses(find("#edit-label"), model, "recognise from the sketch");
  for (const task of Object.keys(shown)) {
    stop(task);
    delete shown[task];
  }
}

/** Shows what the drawing means for a task: the recognised class, or the picture under the mask. */
export async function drawingChanged(task) {
  ({ limits } = await about());
  if (!model.has_picture_tasks) return;
  for (const name of ["denoise", "inpaint", "edit"]) {
    if (!shown[name]) showHint(name, pad.isEmpty ? `Draw ${model.thing} first.` : "");
  }
  if (task === "recognize") await recognize();
  if (task === "inpaint") {
    await guarded("inpaint", async () => mask.setValues((await values()) ?? new Float32Array(model.width * model.height)));
  }
}

const resultOf = (task) => find(`#${task}-result`);
const showHint = (task, text) => resultOf(task).replaceChildren(element("p", { class: "hint" }, text));

/** Runs `work`. Shows its error in the result of the task. */
async function guarded(task, work) {
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") resultOf(task).replaceChildren(failureBox(error, () => guarded(task, work)));
  }
}

async function withDrawing(task, work) {
  if (pad.isEmpty) showHint(task, `Draw ${model.thing} first.`);
  else await guarded(task, work);
}

async function recognize() {
  request?.abort();
  if (pad.isEmpty) {
    showBars(null);
    return;
  }
  const own = new AbortController();
  request = own;
  await guarded("recognize", async () => {
    const answer = await json("recognize", pad.picture, own.signal);
    if (request === own) showBars(answer);
  });
}

function showBars(answer) {
  const { class_names: names, noun, thing, isDigits } = model;
  const isKnown = answer !== null && answer.is_digit !== false; // null for classes that are not digits
  let bars = names.map((name, label) => ({ name, value: answer?.probabilities[label] ?? 0 }));
  if (bars.length > MOST_BARS) bars = bars.sort((a, b) => b.value - a.value).slice(0, answer ? MOST_BARS / 2 : 0);
  const rows = bars.flatMap(({ name, value }) => {
    const isBest = isKnown && name === answer.label;
    return [
      element("span", { class: `name${isBest ? " best" : ""}` }, name),
      bar(value, isBest),
      element("span", { class: "value" }, answer ? `${(100 * value).toFixed(1)}%` : ""),
    ];
  });
  const verdict = isKnown
    ? element("p", { class: isDigits ? "verdict" : "verdict words" }, element("strong", {}, answer.label))
    : answer
      ? element("p", {}, `This is probably not ${isDigits ? thing : "any of the classes"}. It is most similar to the ${noun} ${answer.label}.`)
      : element("p", { class: "hint" }, `Draw ${thing}. The result appears after each stroke.`);
  const facts = answer
    ? `${answer.evaluations} evaluations in ${Math.round(1000 * answer.timing.denoise_seconds)} ms`
    : "";
  resultOf("recognize").replaceChildren(verdict, element("div", { class: "bars" }, rows), element("p", { class: "hint" }, facts));
  if (isKnown) announce(`Recognised: ${answer.label}, ${Math.round(100 * Math.max(...answer.probabilities))} percent`);
  else if (answer) announce(verdict.textContent);
}

function stop(task) {
  shown[task]?.run.cancel();
  shown[task]?.stage.stop();
}

/** Starts a streamed task and shows its images in `root`. */
function startRun(task, body, root) {
  stop(task);
  const run = new Run(task, body);
  const again = () => startRun(task, body, root);
  const extra = (finished) => element("span", {}, classOf(textChunks(bytesOf(finished.images[0]))));
  const stage = new Stage(root, { open: openDetail, retry: again, extra });
  shown[task] = { run, stage };
  stage.show(run);
  return run.start();
}

const chosen = (id) => (find(id).value === "" ? {} : { label: Number(find(id).value) });

function classOf(chunks) {
  const name = className(chunks);
  return model.class_names.includes(name) ? `${model.isDigits ? "Digit" : "Class"}: ${name}` : "";
}

async function denoise() {
  const clean = await values();
  const std = Number(find("#noise-std").value);
  const noisy = canvasOf(clean.map((value) => value + std * gaussian()), model);
  const body = { model: model.name, image: base64Of(noisy), invert: false, fit: "resize" };
  const mean = await json("denoise", { ...body, mode: "mean" });
  const tile = (source, text) =>
    element("figure", {}, element("div", { class: "tile" }, element("img", { src: source, alt: text })), element("figcaption", {}, text));
  const [noisyValues, meanValues] = await Promise.all([base64Of(noisy), mean.images[0].png].map((png) => valuesOfPng(png, model)));
  const sample = element("div");
  resultOf("denoise").replaceChildren(
    element(
      "div",
      { class: "tiles" },
      tile(canvasOf(clean, model).toDataURL(), "your drawing"),
      tile(noisy.toDataURL(), `with noise, ${psnr(clean, noisyValues)}`),
      tile(pngUrl(mean.images[0].png), `predicted in one step, ${psnr(clean, meanValues)}`),
    ),
    element("p", {}, `Estimated noise: ${mean.noise_std.toFixed(1)} grey levels. A higher PSNR means more similar to your drawing. The prediction in one step is the mean of all possible images, so it is blurred. The images below are one possible result, step by step.`),
    sample,
  );
  await startRun("denoise", { ...body, seed: newSeed() }, sample);
}

function psnr(clean, other) {
  const error = clean.reduce((sum, value, place) => sum + (value - other[place]) ** 2, 0) / clean.length;
  return error ? `PSNR ${(10 * Math.log10(255 ** 2 / error)).toFixed(1)} dB` : "no error";
}

async function inpaint() {
  const picture = await values();
  mask.setValues(picture);
  if (mask.isEmpty) {
    showHint("inpaint", "Paint over the part to fill in, or press “Mark the lower half”.");
    return;
  }
  const body = { model: model.name, image: base64Of(canvasOf(picture, model)), mask: mask.base64, invert: false, count: Math.min(COUNT, limits.count), seed: newSeed(), ...chosen("#inpaint-label") };
  await startRun("inpaint", body, resultOf("inpaint"));
}

async function edit() {
  const body = { ...pad.picture, strength: Number(find("#strength").value), count: Math.min(COUNT, limits.count), seed: newSeed(), ...chosen("#edit-label") };
  await startRun("edit", body, resultOf("edit"));
}

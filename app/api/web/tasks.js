// The four tasks of the view "Draw": recognise, remove noise, fill in and redraw.

import { bar } from "./chart.js";
import { openDetail } from "./detail.js";
import { addDigits, announce, element, find, pngUrl, showValue } from "./dom.js";
import { failureBox } from "./failure.js";
import { SIDE, base64Of, bytesOf, canvasOf, greyOf, textChunks } from "./png.js";
import { gaussian, newSeed } from "./random.js";
import { Run } from "./run.js";
import { about, json } from "./service.js";
import { Stage } from "./stage.js";

const COUNT = 4; // images of /inpaint and /edit

let pad;
let mask;
let grey;
let models = [];
let limits = { count: COUNT };
let request = null; // the running call of /recognize
const shown = {}; // task -> {run, stage} of its newest run

/** Connects the controls. `grey()` returns the drawing as 784 grey values, or null. */
export function start(parts) {
  ({ pad, mask, grey } = parts);
  addDigits(find("#inpaint-digit"), "find automatically");
  addDigits(find("#edit-digit"), "recognise from the sketch");
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
    mask.set((x, y) => y >= SIDE / 2);
    announce("The lower half is marked");
  });
}

/** Shows what the drawing means for a task: the recognised digit, or the picture under the mask. */
export async function drawingChanged(task) {
  try {
    ({ models, limits } = await about());
  } catch (error) {
    resultOf(task).replaceChildren(failureBox(error, () => drawingChanged(task)));
    return;
  }
  const hasTasks = models[0].has_picture_tasks;
  find("#no-tasks").hidden = hasTasks;
  for (const part of find("#tasks").querySelectorAll("[role]:is([role=tablist], [role=tabpanel])")) part.inert = !hasTasks;
  if (!hasTasks) return;
  if (task === "recognize") await recognize();
  if (task === "inpaint") {
    await guarded("inpaint", async () => mask.setGrey((await grey()) ?? new Float32Array(SIDE * SIDE)));
  }
  for (const name of ["denoise", "inpaint", "edit"]) {
    if (!shown[name]) showHint(name, pad.isEmpty ? "Draw a digit first." : "");
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
  if (pad.isEmpty) showHint(task, "Draw a digit first.");
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
  const probabilities = answer?.probabilities ?? new Array(10).fill(0);
  const rows = probabilities.flatMap((value, digit) => {
    const isBest = digit === answer?.digit && answer.is_digit;
    return [
      element("span", { class: `name${isBest ? " best" : ""}` }, String(digit)),
      bar(value, isBest),
      element("span", { class: "value" }, answer ? `${(100 * value).toFixed(1)}%` : ""),
    ];
  });
  const verdict = answer
    ? answer.is_digit
      ? element("p", { class: "verdict" }, element("strong", {}, String(answer.digit)))
      : element("p", {}, `This is probably not a digit. It is most similar to the digit ${answer.digit}.`)
    : element("p", { class: "hint" }, "Draw a digit. The result appears after each stroke.");
  const facts = answer
    ? `${answer.evaluations} evaluations in ${Math.round(1000 * answer.timing.denoise_seconds)} ms`
    : "";
  resultOf("recognize").replaceChildren(verdict, element("div", { class: "bars" }, rows), element("p", { class: "hint" }, facts));
  if (answer?.is_digit) announce(`Recognised: ${answer.digit}, ${Math.round(100 * Math.max(...probabilities))} percent`);
  else if (answer) announce(verdict.textContent);
}

/** Starts a streamed task and shows its images in `root`. */
function startRun(task, body, root, digitText) {
  shown[task]?.run.cancel();
  shown[task]?.stage.stop();
  const run = new Run(task, body);
  const again = () => startRun(task, body, root, digitText);
  const extra = (finished) => element("span", {}, digitText(textChunks(bytesOf(finished.images[0])).Digit));
  const stage = new Stage(root, { open: openDetail, retry: again, extra });
  shown[task] = { run, stage };
  stage.show(run);
  return run.start();
}

const chosen = (id) => (find(id).value === "" ? {} : { digit: Number(find(id).value) });
const found = (digit) => (digit === "none" ? "" : `Digit: ${digit}`);

async function denoise() {
  const clean = await grey();
  const std = Number(find("#noise-std").value);
  const noisy = canvasOf(clean.map((value) => value + std * gaussian()));
  const body = { image: base64Of(noisy), invert: false, fit: "resize" };
  const mean = await json("denoise", { ...body, mode: "mean" });
  const tile = (source, text) =>
    element("figure", {}, element("div", { class: "tile" }, element("img", { src: source, alt: text, width: SIDE, height: SIDE })), element("figcaption", {}, text));
  const [noisyGrey, meanGrey] = await Promise.all([base64Of(noisy), mean.images[0].png].map(greyOf));
  const sample = element("div");
  resultOf("denoise").replaceChildren(
    element(
      "div",
      { class: "tiles" },
      tile(canvasOf(clean).toDataURL(), "your drawing"),
      tile(noisy.toDataURL(), `with noise, ${psnr(clean, noisyGrey)}`),
      tile(pngUrl(mean.images[0].png), `predicted in one step, ${psnr(clean, meanGrey)}`),
    ),
    element("p", {}, `Estimated noise: ${mean.noise_std.toFixed(1)} grey levels. A higher PSNR means more similar to your drawing. The prediction in one step is the mean of all possible images, so it is blurred. The images below are one possible result, step by step.`),
    sample,
  );
  await startRun("denoise", { ...body, seed: newSeed() }, sample, found);
}

function psnr(clean, other) {
  const error = clean.reduce((sum, value, place) => sum + (value - other[place]) ** 2, 0) / clean.length;
  return error ? `PSNR ${(10 * Math.log10(255 ** 2 / error)).toFixed(1)} dB` : "no error";
}

async function inpaint() {
  const values = await grey();
  mask.setGrey(values);
  if (mask.isEmpty) {
    showHint("inpaint", "Paint over the part to fill in, or press “Mark the lower half”.");
    return;
  }
  const body = { image: base64Of(canvasOf(values)), mask: mask.base64, invert: false, count: Math.min(COUNT, limits.count), seed: newSeed(), ...chosen("#inpaint-digit") };
  await startRun("inpaint", body, resultOf("inpaint"), found);
}

async function edit() {
  const body = { ...pad.picture, strength: Number(find("#strength").value), count: Math.min(COUNT, limits.count), seed: newSeed(), ...chosen("#edit-digit") };
  await startRun("edit", body, resultOf("edit"), found);
}

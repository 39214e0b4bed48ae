// The view "Draw": a picture by mouse, finger or file, and the four tasks on it.

import { generateAddress } from "./address.js";
import { promptOf } from "./clip.js";
import { factList } from "./detail.js";
import { addRealDigits, setDrawingReader, suit } from "./digits.js";
import { element, find, showValue } from "./dom.js";
import { failureBox } from "./failure.js";
import { about, changes, className, fullModel } from "./models.js";
import { Mask, Pad } from "./pad.js";
import { base64Of, textChunks, valuesOf, valuesOfPng } from "./png.js";
import { ServiceError, json } from "./service.js";
import * as tasks from "./tasks.js";

const WAIT = 250; // milliseconds after a stroke until the drawing is sent
const MOST_SIDE = 1024; // pixels; larger pictures are reduced before they are sent

let model = null;
let pad;
let mask;
let timer = null;
let task = "recognize";
let fitted = null; // the promise of the values of the drawing, until it changes

export function start() {
  pad = new Pad(find("#pad"), changed);
  mask = new Mask(find("#mask"));
  tasks.start({ pad, mask, values });
  setDrawingReader(values);
  changes.addEventListener("change", () => find("#draw").hidden || open());
  find("#pad").addEventListener("pointerdown", () => {
    find("#pad-hint").hidden = true;
  });
  find("#pad-undo").addEventListener("click", () => pad.undo());
  find("#pad-clear").addEventListener("click", () => pad.clear());
  showValue(find("#pad-width"), find("#pad-width-value"));
  find("#pad-file").addEventListener("change", (event) => {
    if (event.target.files[0]) openFile(event.target.files[0]);
    event.target.value = "";
  });
  startTabs();
  startDrop();
}

/** Shows the real digits, if they suit the model, and the result of the task. */
export async function open() {
  try {
    await useModel();
    run();
    if (suit(model)) await addRealDigits(find("#pad-digits"), model, (_, values) => pad.setValues(values));
  } catch (error) {
    model = null;
    showProblem(error, open);
  }
}

async function useModel() {
  await about();
  if (model === fullModel()) return;
  model = fullModel();
  fitted = null;
  find("#draw").classList.toggle("unsupported", !model.has_picture_tasks);
  find("#pen").hidden = model.channels === 1;
  find("#pad-digits").hidden = !suit(model);
  pad.use(model);
  mask.use(model);
  tasks.use(model);
  if (!model.hasClasses && task === "recognize") find("#tab-denoise").click();
  find("#pad-hint").hidden = !pad.isEmpty;
}

function showProblem(error, retry) {
  find("#provenance").replaceChildren(failureBox(error, retry));
  find("#provenance").hidden = false;
}

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    task = tab.id.replace("tab-", "");
    for (const each of tabs) {
      each.setAttribute("aria-selected", each === tab);
      each.tabIndex = each === tab ? 0 : -1;
      find(`#task-${each.id.replace("tab-", "")}`).hidden = each !== tab;
    }
    run();
  };
  for (const [place, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      const next = tabs[(place + by + tabs.length) % tabs.length];
      next.focus();
      select(next);
    });
  }
  select(tabs[0]);
}

function changed() {
  fitted = null;
  find("#pad-hint").hidden = !pad.isEmpty;
  find("#provenance").hidden = true;
  clearTimeout(timer);
  timer = setTimeout(run, WAIT);
}

function run() {
  clearTimeout(timer);
  if (model && !find("#draw").hidden) tasks.drawingChanged(task);
}

/** Returns the values of the drawing in the shape of the model, or null. */
async function values() {
  await useModel();
  if (pad.isEmpty) return null;
  fitted ??= pad.exact ? Promise.resolve(pad.exact) : fit(pad.picture);
  fitted.catch(() => {
    fitted = null; // so that the next call tries again
  });
  return fitted;
}

/** Returns the values of a picture as the model gets it: /edit with strength 0 only fits it. */
async function fit(picture) {
  const answer = await json("edit", { ...picture, model: model.name, strength: 0 });
  return valuesOfPng(answer.images[0].png, model);
}

function startDrop() {
  const isActive = () => !find("#draw").hidden;
  addEventListener("dragover", (event) => {
    if (!isActive()) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!isActive()) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (isActive() && file) openFile(file);
  });
}

/** Shows a picture file as the model gets it, and its text chunks if this service has written it. */
async function openFile(file) {
  try {
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new ServiceError({ code: "invalid_image", detail: "The file is not a picture that this browser can read" });
    });
    await useModel();
    pad.setValues(await valuesOfPicture(bitmap));
  } catch (error) {
    showProblem(error, error.code === "invalid_image" ? null : () => openFile(file));
    return;
  }
  showProvenance(textChunks(new Uint8Array(await file.arrayBuffer())));
}

async function valuesOfPicture(bitmap) {
  if (bitmap.width === model.width && bitmap.height === model.height) return valuesOf(bitmap, model);
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.ceil(scale * bitmap.width), height: Math.ceil(scale * bitmap.height) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const how = model.normalises_drawings ? { fit: "auto", invert: "auto" } : { fit: "resize", invert: false };
  return fit({ image: base64Of(canvas), ...how });
}

async function showProvenance(chunks) {
  const box = find("#provenance");
  const isOwn = chunks?.Software?.startsWith("unfog ") && chunks["Model-SHA256"];
  box.hidden = true;
  if (!isOwn) return;
  const index = Number.parseInt(chunks.Index?.split("-").at(-1), 10) || 0;
  const { models = [], clip } = await about().catch(() => ({}));
  const made = models.find(({ sha256 }) => sha256 === chunks["Model-SHA256"]); // undefined: the address has no model
  const name = className(chunks);
  const label = made ? made.class_names.indexOf(name) : (models[0]?.labelOf(name) ?? -1);
  const what = chunks.Layout && made?.isAlphabet ? { labels: made.spell(name) } : { label, count: index + 1 };
  const isGenerated = !chunks.Task && Math.min(...(what.labels ?? [label])) >= 0 && /^[0-9]+$/.test(chunks.Seed);
  const address = generateAddress({
    ...what, seed: chunks.Seed, num_steps: chunks.Steps,
    sampler: chunks.Sampler, guidance_scale: chunks["Guidance-Scale"], model: made?.name,
    clip_guidance_scale: chunks["CLIP-Guidance-Scale"], clip_prompt: promptOf(chunks),
  });
  const hasClip = !chunks["CLIP-SHA256"] || clip?.sha256 === chunks["CLIP-SHA256"];
  const note = made && hasClip ? "" : `This service does not have the ${made ? "CLIP " : ""}model of this picture, so it cannot generate the same image.`;
  box.hidden = false;
  box.replaceChildren(
    element("h2", {}, "This picture was made by unfog"),
    factList(chunks),
    ...(note ? [element("p", { class: "hint" }, note)] : []),
    isGenerated
      ? element("button", { type: "button", click: () => { location.hash = address; } }, "Generate again")
      : element("p", { class: "hint" }, chunks.Task ? "It was made from another picture, so its parameters alone do not reproduce it." : "This page cannot generate a picture of these classes again."),
  );
}

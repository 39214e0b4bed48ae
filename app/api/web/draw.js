// The view "Draw": a picture by mouse, finger or file, and the four tasks on it.

import { generateAddress } from "./address.js";
import { promptOf } from "./clip.js";
import { factList } from "./detail.js";
import { addRealDigits, setDrawingReader } from "./digits.js";
import { element, find, showValue } from "./dom.js";
import { failureBox } from "./failure.js";
import { Mask, Pad } from "./pad.js";
import { SIDE, base64Of, greyOf, textChunks } from "./png.js";
import { about, json } from "./service.js";
import * as tasks from "./tasks.js";

const WAIT = 250; // milliseconds after a stroke until the drawing is sent

let pad;
let mask;
let timer = null;
let task = "recognize";
let normalised = null; // the promise of the drawing as 784 grey values, until the drawing changes

export function start() {
  pad = new Pad(find("#pad"), changed);
  mask = new Mask(find("#mask"));
  tasks.start({ pad, mask, grey });
  setDrawingReader(grey);
  find("#pad").addEventListener("pointerdown", () => {
    find("#pad-hint").hidden = true;
  });
  find("#pad-undo").addEventListener("click", () => pad.undo());
  find("#pad-clear").addEventListener("click", () => pad.clear());
  showValue(find("#pad-width"), find("#pad-width-value"));
  find("#pad-width").addEventListener("input", (event) => {
    pad.width = Number(event.target.value);
  });
  find("#pad-file").addEventListener("change", (event) => {
    if (event.target.files[0]) openFile(event.target.files[0]);
    event.target.value = "";
  });
  startTabs();
  startDrop();
}

/** Shows the real digits and the result of the selected task. */
export async function open() {
  run();
  if (find("#pad-digits").children.length) return;
  try {
    await addRealDigits(find("#pad-digits"), (_, values) => pad.setGrey(values));
  } catch (error) {
    find("#pad-digits").replaceChildren();
    find("#provenance").hidden = false;
    find("#provenance").replaceChildren(failureBox(error, open));
  }
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

/** Shows the result of the selected task after a short pause. */
function changed() {
  normalised = null;
  find("#pad-hint").hidden = !pad.isEmpty;
  find("#provenance").hidden = true;
  clearTimeout(timer);
  timer = setTimeout(run, WAIT);
}

function run() {
  if (!find("#draw").hidden) tasks.drawingChanged(task);
}

/** Returns the drawing as 784 grey values, fitted as in MNIST: /edit with strength 0 returns the fitted image. */
function grey() {
  normalised ??= fit();
  normalised.catch(() => {
    normalised = null; // so that the next call tries again
  });
  return normalised;
}

async function fit() {
  if (pad.isEmpty) return null;
  return pad.exact ?? greyOf((await json("edit", { ...pad.picture, strength: 0 })).images[0].png);
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

/** Shows a picture file, and its text chunks if this service has written it. */
async function openFile(file) {
  const box = find("#provenance");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    const detail = "The file is not a picture that this browser can read";
    box.replaceChildren(failureBox({ code: "invalid_image", detail }, null));
    box.hidden = false;
    return;
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bitmap.width === SIDE && bitmap.height === SIDE) pad.setGrey(await greyOfBitmap(bitmap));
  else pad.setPicture(bitmap);
  showProvenance(textChunks(bytes));
}

async function greyOfBitmap(bitmap) {
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return greyOf(base64Of(canvas));
}

async function showProvenance(chunks) {
  const box = find("#provenance");
  const isOwn = chunks?.Software?.startsWith("unfog ") && chunks["Model-SHA256"];
  box.hidden = true;
  if (!isOwn) return;
  const isGenerated = !chunks.Task && /^[0-9]$/.test(chunks.Digit) && /^[0-9]+$/.test(chunks.Seed);
  const index = Number.parseInt(chunks.Index?.split("-").at(-1), 10) || 0;
  const { models = [], clip } = await about().catch(() => ({}));
  const model = models.find(({ sha256 }) => sha256 === chunks["Model-SHA256"])?.name; // undefined: the address has no model
  const address = generateAddress({
    digit: chunks.Digit, count: index + 1, seed: chunks.Seed, num_steps: chunks.Steps,
    sampler: chunks.Sampler, guidance_scale: chunks["Guidance-Scale"], model,
    clip_guidance_scale: chunks["CLIP-Guidance-Scale"], clip_prompt: promptOf(chunks),
  });
  const hasClip = !chunks["CLIP-SHA256"] || clip?.sha256 === chunks["CLIP-SHA256"];
  const note = model && hasClip ? "" : `This service does not have the ${model ? "CLIP " : ""}model of this picture, so it cannot generate the same image.`;
  box.hidden = false;
  box.replaceChildren(
    element("h2", {}, "This picture was made by unfog"),
    factList(chunks),
    ...(note ? [element("p", { class: "hint" }, note)] : []),
    isGenerated
      ? element("button", { type: "button", click: () => { location.hash = address; } }, "Generate again")
      : element("p", { class: "hint" }, "It was made from another picture, so its parameters alone do not reproduce it."),
  );
}

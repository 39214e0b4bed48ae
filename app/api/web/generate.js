// The view "Generate": the form, the stage with the running request, and its state in the address.

import { generateAddress, generateFields } from "./address.js";
import { digitPrompt, score } from "./clip.js";
import { announce, element, find, menu, moves, showValue } from "./dom.js";
import { openDetail } from "./detail.js";
import { failureBox, sentence } from "./failure.js";
import * as history from "./history.js";
import { about, areAlike, changes, choose, chosenModel as model, modelOf, showClasses } from "./models.js";
import { MAX_SEED, newSeed } from "./random.js";
import { Run } from "./run.js";
import { copy, linkOf, saveAs, saveSheet } from "./share.js";
import { Stage } from "./stage.js";

const SEED_HINT = "The same seed with the same settings gives the same images.";
const STEPS_HINT = "More steps take longer.";
const GUIDANCE_HINT = "A higher value makes the class clearer and the images less varied.";
const WORD = "unfog";
const WORD_HINT = "All letters are generated at the same time.";
const SAMPLER_NAMES = { ddpm: "DDPM", ddim: "DDIM", dpmpp: "DPM-Solver++" };

let form;
let stage;
let models = [];
let classes = null; // the names that the form offers
let limits = { count: 64 };
let clip = null; // the CLIP model of the service, if it has one
let changed = new Set(); // fields that the user has set; the others have the defaults of the model
let quality = null; // chosen after the sampler and the steps
let run = null;
let scoring = null; // aborts the running request to /score

export function start() {
  form = find("#generate-form");
  stage = new Stage(find("#generate-stage"), { open: openDetail, retry: submitAgain, extra: saveButtons });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (checkCount() && checkSeed() && checkWord()) generate(bodyOfForm());
  });
  form.seed.addEventListener("input", checkSeed);
  form.count.addEventListener("input", checkCount);
  form.addEventListener("change", ({ target: { name, value } }) => {
    changed.add(name);
    if (name === "model") choose(value);
    if (!["quality", "sampler", "num_steps"].includes(name)) return;
    quality = name === "quality" ? value : null;
    if (quality) changed.add("sampler").add("num_steps");
    applyModel();
  });
  find("#dice").addEventListener("click", () => {
    form.seed.value = newSeed();
    checkSeed();
  });
  find("#advanced-button").addEventListener("click", () => showAdvanced(find("#advanced").hidden));
  find("#generate-reset").addEventListener("click", reset);
  showValue(form.num_steps, find("#num-steps-value"));
  showValue(form.guidance_scale, find("#guidance-value"), guidanceText);
  showValue(form.clip_guidance_scale, find("#clip-guidance-value"), (scale) => (scale ? String(scale) : "off"));
  form.addEventListener("input", applyClip);
  document.addEventListener("keydown", chooseDigit);
  changes.addEventListener("change", () => {
    applyModel();
    applyClip();
  });
  find("#model").addEventListener("change", ({ target }) => {
    choose(target.value);
    if (run && !find("#generate").hidden) generate(bodyOfForm());
  });
  history.start();
}

/**
 * Shows the view and runs the request of the address. Without a complete request, the first visit starts a run of the
 * form, so that visitors see at once what the model does.
 */
export async function open(parameters) {
  const wanted = generateFields(parameters);
  try {
    await loadModels();
  } catch (error) {
    find("#generate-stage").replaceChildren(failureBox(error, () => open(parameters)));
    return;
  }
  if (find("#generate").hidden) return; // the user has opened another view in the meantime
  const note = applyCheckpoint(wanted, parameters.get("checkpoint"));
  const label = modelOf(wanted).labelOf(parameters.get("label") ?? parameters.get("digit"));
  if (modelOf(wanted).isAlphabet) {
    const labels = labelsOf(parameters.get("labels"), modelOf(wanted)) ?? (label === undefined ? null : new Array(wanted.count ?? 1).fill(label));
    if (labels) wanted.labels = labels;
    delete wanted.count;
  } else if (label !== undefined) wanted.label = label;
  const isEmpty = !Object.keys(wanted).length;
  if (isEmpty && run?.isChosen) window.history.replaceState(null, "", generateAddress(run.body));
  if (run && !note && (isEmpty || generateAddress(wanted) === generateAddress(run.body))) {
    showSimilarities();
    return;
  }
  fill(wanted);
  // The form rounds the guidance scale, and offers only values that the service permits. The service checks the others.
  const isComplete = wanted.seed !== undefined && (wanted.label ?? wanted.labels) !== undefined;
  if (isComplete || !run) generate({ ...bodyOfForm(), ...wanted }, { isNew: false, isChosen: isComplete, note });
}

function labelsOf(text, { class_names }) {
  if (!/^[0-9]{1,4}(\.[0-9]{1,4})*$/.test(text)) return null;
  const labels = text.split(".").map(Number);
  return labels.every((label) => label < class_names.length) ? labels : null;
}

/** Chooses the model with the checkpoint of a link, whatever its name is. Returns a note if there is none. */
function applyCheckpoint(wanted, digest) {
  if (!/^[0-9a-f]{12,64}$/.test(digest)) return null;
  const same = models.find(({ sha256 }) => sha256.startsWith(digest));
  wanted.model = (same ?? models[0]).name;
  return same ? null : "This service does not have the model of the link, so the images differ.";
}

/** Aborts the request to /score. The run continues. */
export function close() {
  scoring?.abort();
}

async function loadModels() {
  if (models.length) return;
  ({ models, limits, clip = null } = await about());
  form.count.max = limits.count;
  limitCount();
  find("#model-choice").replaceChildren(...models.map(({ name }) => choice("model", name, name)));
  find("#model-choice").parentNode.hidden = models.length < 2 || !areAlike();
  applyModel();
  applyClip();
  find("#generate-button").disabled = false;
}

function choice(name, value, text, checked = false) {
  const input = element("input", { type: "radio", name, value, checked });
  return element("label", {}, input, element("span", {}, String(text)));
}

/** Shows radio buttons for [value, text] pairs, and keeps the focus. */
function showChoices(name, choices, chosen) {
  const focused = document.activeElement?.name === name;
  const parent = find(`#${name}-choice`);
  parent.replaceChildren(...choices.map(([value, text]) => choice(name, value, text, value === chosen)));
  if (focused) (find(":checked", parent) ?? find("input", parent)).focus();
}

const guidanceText = (scale) => {
  const recommended = model()?.guidance_scale[form.sampler?.value];
  if (scale === 1) return "off";
  return `${scale}${scale === recommended ? " (recommended)" : ""}`;
};

/** Offers the classes of the model. The chosen class stays if the model has the same ones. */
function applyClasses() {
  const { class_names, hasKeys, isDigits, isAlphabet, first } = model();
  if (classes === String(class_names)) return;
  classes = String(class_names);
  const root = find("#label-keys");
  root.className = isAlphabet ? "" : isDigits ? "keypad" : "keypad words";
  root.style.setProperty("--longest", Math.max(...class_names.map((name) => name.length)));
  form.count.parentNode.hidden = isAlphabet;
  if (isAlphabet) {
    root.replaceChildren(wordField());
    return;
  }
  const list = element("select", { name: "label", "aria-label": "Class" });
  showClasses(list, model());
  root.replaceChildren(...(hasKeys ? class_names.map((name, label) => choice("label", label, name, label === first)) : [list]));
}

const firstWord = (alphabet) => alphabet.nameOf({ labels: alphabet.spell(WORD).includes(-1) ? [0, 1, 2] : alphabet.spell(WORD) });

function wordField() {
  const input = element("input", { name: "word", type: "text", value: firstWord(model()), autocomplete: "off", spellcheck: false, "aria-label": "Word", "aria-describedby": "word-hint", input: checkWord });
  return element("div", { class: "field" }, input, element("p", { id: "word-hint", class: "hint" }, WORD_HINT));
}

/** Returns true if the model can write the word. Otherwise says what is wrong. */
function checkWord() {
  if (!form.word) return true;
  const labels = model().spell(form.word.value);
  const unknown = [...form.word.value.replace(/\s/g, "")][labels.indexOf(-1)];
  const problem = !labels.length ? "Enter a word." : unknown ? `The model has no class “${unknown}”.` : labels.length > limits.count ? `Enter at most ${limits.count} letters.` : "";
  form.word.setAttribute("aria-invalid", problem !== "");
  find("#word-hint").classList.toggle("error", problem !== "");
  find("#word-hint").textContent = problem || WORD_HINT;
  if (problem) announce(problem);
  return !problem;
}

/** Offers what the model permits, and sets the fields that the user has not set to its defaults. */
function applyModel() {
  applyClasses();
  if (form.model) form.model.value = model().name;
  const { samplers, steps, max_steps, default_steps, guidable, guidance_scale } = model();
  const setting = model().qualities[quality];
  const sampler = setting?.sampler ?? (changed.has("sampler") && samplers.includes(form.sampler?.value) ? form.sampler.value : samplers[0]);
  showChoices("sampler", Object.entries(SAMPLER_NAMES), sampler);
  for (const input of form.sampler) input.disabled = !samplers.includes(input.value);
  form.num_steps.max = steps.length ? Math.max(...steps) : max_steps;
  form.num_steps.min = steps.length ? Math.min(...steps) : 1;
  form.num_steps.disabled = steps.length === 1;
  const isKept = changed.has("num_steps") && (!steps.length || steps.includes(Number(form.num_steps.value)));
  if (setting || !isKept) form.num_steps.value = setting?.num_steps ?? default_steps;
  showQualities();
  form.guidance_scale.disabled = !guidable;
  if (!guidable) form.guidance_scale.value = 1;
  else if (!changed.has("guidance_scale")) form.guidance_scale.value = guidance_scale[sampler];
  const { name } = model();
  find("#steps-hint").textContent = steps.length ? `The model ${name} was trained for ${steps.join(" or ")} steps.` : STEPS_HINT;
  find("#guidance-hint").textContent = guidable ? GUIDANCE_HINT : `The model ${name} takes no guidance scale.`;
  for (const input of [form.num_steps, form.guidance_scale]) input.dispatchEvent(new Event("input"));
}

/** Offers the qualities of the model, and marks the one that the form has. */
function showQualities() {
  const { qualities, steps } = model();
  const has = ({ sampler, num_steps }) => sampler === form.sampler.value && num_steps === Number(form.num_steps.value);
  const names = Object.keys(qualities);
  const chosen = quality ?? names.findLast((name) => has(qualities[name]));
  showChoices("quality", names.map((name) => [name, name[0].toUpperCase() + name.slice(1)]), chosen);
  find("#quality-choice").parentElement.hidden = steps.length === 1;
}

const hasClip = () => clip !== null && model().isDigits; // CLIP has learned digits only

/** Shows the fields of CLIP if it can be used. An empty prompt means the default prompt. */
function applyClip() {
  find("#clip-fields").hidden = !hasClip();
  find("#generate-stage").classList.toggle("scored", hasClip()); // leaves space for the similarities
  form.clip_prompt.disabled = Number(form.clip_guidance_scale.value) === 0;
  form.clip_prompt.placeholder = hasClip() ? digitPrompt(form.label.value) : "";
}

/** Sets the form to the fields of a request, except the seed: the next run has new images. */
function fill(body) {
  form.seed.value = "";
  changed = new Set(Object.keys(body));
  quality = null;
  choose(body.model);
  applyModel();
  if (body.sampler && model().samplers.includes(body.sampler)) form.sampler.value = body.sampler;
  applyModel();
  for (const name of ["label", "count", "num_steps", "guidance_scale"]) {
    if (body[name] !== undefined && form[name] && !form[name].disabled) form[name].value = body[name];
  }
  if (body.labels && form.word) form.word.value = model().nameOf(body);
  form.clip_guidance_scale.value = body.clip_guidance_scale ?? 0; // an address without CLIP guidance turns it off
  form.clip_prompt.value = body.clip_prompt ?? "";
  for (const input of [form.num_steps, form.guidance_scale, form.clip_guidance_scale]) input.dispatchEvent(new Event("input"));
  showQualities();
  applyClip();
  limitCount();
}

function bodyOfForm() {
  const body = {
    ...(form.word ? { labels: model().spell(form.word.value) } : { label: Number(form.label.value), count: Number(form.count.value) }),
    num_steps: Number(form.num_steps.value),
    sampler: form.sampler.value,
    guidance_scale: Number(form.guidance_scale.value),
    model: model().name,
  };
  const clipScale = hasClip() ? Number(form.clip_guidance_scale.value) : 0;
  if (clipScale) body.clip_guidance_scale = clipScale;
  const prompt = form.clip_prompt.value.trim();
  if (clipScale && prompt) body.clip_prompt = prompt;
  const seed = form.seed.value.trim();
  body.seed = seed ? Number(seed) : newSeed();
  return body;
}

/** Makes the fields valid that a person can have made invalid. */
function limitCount() {
  form.count.value = Math.min(form.count.value, limits.count);
  checkCount();
  checkSeed();
}

/** Returns true if the number of images is permitted. Otherwise says which are. */
function checkCount() {
  const count = Number(form.count.value);
  const isValid = Number.isInteger(count) && count >= 1 && count <= limits.count;
  form.count.setAttribute("aria-invalid", !isValid);
  find("#count-hint").hidden = isValid;
  find("#count-hint").textContent = isValid ? "" : `Choose 1 to ${limits.count} images.`;
  if (!isValid) showField(form.count, find("#count-hint").textContent);
  return isValid;
}

function showAdvanced(isShown) {
  find("#advanced").hidden = !isShown;
  find("#advanced-button").setAttribute("aria-expanded", isShown);
}

/** Shows the advanced fields and moves the focus to one of them, because of a problem. */
function showField(input, problem) {
  showAdvanced(true);
  input.focus();
  announce(problem);
}

/** Returns true if the seed is valid or empty. Otherwise says what is wrong. */
function checkSeed() {
  const seed = form.seed.value.trim();
  const isValid = !seed || (/^[0-9]+$/.test(seed) && Number(seed) <= MAX_SEED);
  form.seed.setAttribute("aria-invalid", !isValid);
  const hint = find("#seed-hint");
  hint.classList.toggle("error", !isValid);
  hint.textContent = isValid ? SEED_HINT : `The seed must be a whole number from 0 to ${MAX_SEED}.`;
  if (!isValid) showField(form.seed, hint.textContent);
  return isValid;
}

/**
 * Sends a request and shows it. If the user has chosen it, the address and the list of earlier runs show it too, and
 * `isNew` adds an entry to the browser's history.
 */
async function generate(body, { isNew = true, isChosen = true, note = null } = {}) {
  run?.cancel();
  scoring?.abort();
  const own = new Run("generate", body);
  run = own;
  Object.assign(own, { note, isChosen });
  const address = generateAddress(body);
  if (isChosen && address !== location.hash) window.history[isNew ? "pushState" : "replaceState"](null, "", address);
  stage.show(own);
  if (isNew) find("#generate-stage").scrollIntoView({ block: "nearest", behavior: moves() ? "smooth" : "auto" });
  await own.start();
  if (own.state !== "done") return;
  if (isChosen) history.remember(own);
  showSimilarities();
}

/** Shows the similarity of the finished images to the prompt, if the service has CLIP. */
async function showSimilarities() {
  if (!clip || !modelOf(run?.body ?? {}).isDigits || find("#generate").hidden || run?.state !== "done" || run.isScored) return;
  scoring?.abort();
  scoring = new AbortController();
  const own = run;
  const { signal } = scoring;
  const { label, clip_prompt: prompt = digitPrompt(label) } = own.body;
  try {
    const { similarities, realDigits } = await score(own.images, prompt, label, signal);
    signal.throwIfAborted();
    stage.showSimilarities(similarities, similarityText(prompt, realDigits));
    own.isScored = true;
  } catch (error) {
    // No error is shown, because the images are complete. Opening the view again repeats the request.
    if (error.status === 501) clip = null;
    applyClip();
  }
}

function similarityText(prompt, realDigits) {
  const hint =
    "Below each image: the cosine similarity of the CLIP embeddings of the image and the prompt. For real digits: its " +
    "mean over MNIST images of the digit. Compare only numbers of the same prompt.";
  return [
    element("p", {}, "CLIP similarity to “", element("bdi", { class: "prompt" }, prompt), "”, real digits: ", element("span", { class: "mono" }, realDigits.toFixed(2))),
    element("p", { class: "hint" }, hint),
  ];
}

function submitAgain() {
  generate(run.body, { note: run.note });
}

/** Returns what is below the images of a finished run: the buttons, and a line for their results. */
function saveButtons(finished) {
  const line = element("span", { class: "hint", role: "status" });
  let isSaving = false;
  const save = async (work) => {
    if (isSaving) return;
    isSaving = true;
    line.textContent = "Saving";
    try {
      await work();
      line.textContent = "Saved.";
    } catch (error) {
      line.textContent = sentence(error);
    }
    isSaving = false;
  };
  const keepSeed = () => {
    form.seed.value = finished.body.seed;
    checkSeed();
    line.textContent = "The next run has the same seed.";
  };
  const animate = element("button", { type: "button", class: "small", click: () => save(() => saveAs(finished, "gif")) }, "Save as animation");
  const more = menu("More", [
    ["Copy link", () => copy(linkOf(finished), "Link", line)],
    ["Animation as WebP", () => save(() => saveAs(finished, "webp"))],
    ["Picture with caption", () => save(() => saveSheet(finished))],
    finished.count > 1 ? ["All images (ZIP)", () => save(() => saveAs(finished, "zip"))] : null,
    ["Keep this seed", keepSeed],
  ]);
  return [element("div", { class: "joined" }, animate, more), line];
}

function reset() {
  changed = new Set();
  quality = null;
  form.reset();
  if (areAlike()) choose(models[0]?.name);
  if (models.length) applyModel();
  form.clip_guidance_scale.dispatchEvent(new Event("input"));
  applyClip();
  limitCount();
}

/** Chooses a digit by its key, unless the user is typing or a dialog is open. */
function chooseDigit(event) {
  const isTyping = event.target.closest('input:not([type="radio"]):not([type="range"]), select, dialog');
  if (isTyping || !model()?.isDigits || find("#generate").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!/^[0-9]$/.test(event.key)) return;
  find(`input[name="label"][value="${event.key}"]`, form).click();
  announce(`Digit ${event.key}`);
}

// Guidance scales and numbers of steps, each compared from the same noise.

import { bar, lineChart } from "./chart.js";
import { announce, duration, element, find, pngUrl, setBusy } from "./dom.js";
import { failureBox } from "./failure.js";
import { about, showClasses } from "./models.js";
import { newSeed } from "./random.js";
import { patientJson } from "./service.js";

const SCALES = [1, 1.5, 2, 3, 5, 8];
const STEPS = [
  { sampler: "ddpm", num_steps: 100, name: "DDPM" },
  { sampler: "dpmpp", num_steps: 20, name: "DPM-Solver++" },
  { sampler: "dpmpp", num_steps: 10, name: "DPM-Solver++" },
  { sampler: "dpmpp", num_steps: 4, name: "DPM-Solver++" },
];

const GUIDED = { sampler: "ddim", num_steps: 50 }; // DDIM adds no noise in its steps, so that only guidance makes a difference

let model;

export function start() {
  find("#guidance-run").addEventListener("click", () => compareGuidance());
  find("#steps-run").addEventListener("click", () => compareSteps());
}

export function show(loaded) {
  model = loaded;
  for (const id of ["#guidance-label", "#steps-label"]) showClasses(find(id), model);
  for (const id of ["#guidance-run", "#steps-run"]) find(id).disabled = false;
  for (const id of ["#guidance-result", "#steps-result"]) find(id).replaceChildren();
  const hasGuidance = model.guidable && !model.steps.length && model.samplers.includes(GUIDED.sampler);
  find("#guidance-section").hidden = !hasGuidance;
  if (hasGuidance) showSchedule();
}

const numberOf = (id) => Number(find(id).value);

/** Shows log-SNR against t with the interval in which guidance acts. */
function showSchedule() {
  const logSnr = (alpha) => Math.max(-10, Math.min(10, Math.log(alpha / (1 - alpha))));
  const interval = model.guidance_interval[GUIDED.sampler];
  find("#guidance-chart").replaceChildren(
    lineChart({
      series: [{ points: model.alpha_bar.map((alpha, t) => [t, logSnr(alpha)]), kind: "main" }],
      x: [0, model.alpha_bar.length - 1],
      y: [-10, 10],
      height: 160,
      bands: [interval],
      xLabel: "timestep t",
      description: `Guidance acts from timestep ${interval[1]} to ${interval[0]}.`,
    }),
    element("p", { class: "legend" }, `Line: log-SNR, the logarithm of the ratio of signal to noise. Marked interval: guidance acts from t = ${interval[1]} down to t = ${interval[0]}.`),
  );
}

/** Runs `work` while the button is disabled. Shows an error in `root`. */
async function withButton(id, root, work) {
  const button = find(id);
  setBusy(button, true);
  try {
    await work();
  } catch (error) {
    root.replaceChildren(failureBox(error, () => withButton(id, root, work)));
  }
  setBusy(button, false);
}

function compareGuidance() {
  const root = find("#guidance-result");
  const own = model;
  const body = { label: numberOf("#guidance-label"), seed: newSeed(), model: model.name, ...GUIDED };
  return withButton("#guidance-run", root, async () => {
    const answers = scalesOf().map((guidance_scale) => ({ guidance_scale }));
    for (const [place, { guidance_scale }] of answers.entries()) {
      answers[place] = await patientJson("generate", { ...body, guidance_scale }, tellWait("#guidance-run"));
      if (model !== own) return; // the user has chosen another one
      showGuidance(answers);
    }
    announce("The comparison of guidance scales is finished");
  });
}

/** Returns a function that shows on a button how long the next request waits, because the service is busy. */
const tellWait = (id) => (seconds) => {
  find(id).textContent = seconds ? `Busy, waiting ${seconds} s` : "Compare";
};

const recommendedScale = () => model.guidance_scale[GUIDED.sampler];
const scalesOf = () => [...new Set([...SCALES, recommendedScale()])].sort((a, b) => a - b);

/** Shows one image for each scale. Answers without images get an empty tile. */
function showGuidance(answers) {
  const figures = answers.map(({ images, guidance_scale }) => {
    const isOwn = guidance_scale === recommendedScale();
    const text = `${guidance_scale === 1 ? "off" : guidance_scale}${isOwn ? " (recommended)" : ""}`;
    return element("figure", {}, tile(images, `Guidance ${text}`), element("figcaption", { class: isOwn ? "recommended" : null }, text));
  });
  find("#guidance-result").replaceChildren(...figures);
}

const tile = (images, alt) =>
  images ? element("img", { src: pngUrl(images[0].png), alt }) : element("div", { class: "tile" });

/** Returns the parts of the compared requests: the model with STEPS, and models like it for few steps. */
async function variants() {
  const { models } = await about();
  const few = models.filter((each) => each.steps.length && each.isLike(model));
  const isPermitted = ({ sampler, num_steps }) => model.samplers.includes(sampler) && num_steps <= model.max_steps;
  return [
    ...(model.steps.length ? [] : STEPS.filter(isPermitted)),
    ...few.flatMap(({ name, samplers, steps }) => steps.map((num_steps) => ({ model: name, sampler: samplers[0], num_steps, name: `model ${name}` }))),
  ];
}

function compareSteps() {
  const root = find("#steps-result");
  const own = model;
  const fixed = { label: numberOf("#steps-label"), seed: newSeed(), model: model.name };
  return withButton("#steps-run", root, async () => {
    const all = await variants();
    const rows = all.map(emptyRow);
    for (const [place, { name, ...body }] of all.entries()) {
      // One request at a time, so that the times can be compared.
      const answer = await patientJson("generate", { ...fixed, ...body }, tellWait("#steps-run"));
      if (model !== own) return;
      rows[place] = { name, answer };
      showSteps(root, rows);
    }
    announce("The comparison of steps is finished");
  });
}

const emptyRow = ({ name, num_steps }) => ({ name, answer: { num_steps } });

/** Shows a table with a row for each variant. Variants without an answer have an empty row. */
function showSteps(root, rows) {
  const slowest = Math.max(...rows.map(({ answer }) => answer.timing?.denoise_seconds ?? 0));
  const heads = [["Image"], ["Sampler"], ["Steps", "number"], ["Evaluations", "number"], ["Time", "number"], [""]];
  root.replaceChildren(
    element(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Images by number of steps" },
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, heads.map(([text, kind]) => element("th", { class: kind, scope: "col" }, text || element("span", { class: "visually-hidden" }, "Time as a bar"))))),
        element("tbody", {}, rows.map(({ name, answer }) => stepsRow(name, answer, slowest))),
      ),
    ),
  );
}

function stepsRow(name, answer, slowest) {
  const seconds = answer.timing?.denoise_seconds;
  return element(
    "tr",
    {},
    element("td", {}, tile(answer.images, `Image in ${answer.num_steps} steps`)),
    element("td", {}, name),
    element("td", { class: "number" }, String(answer.num_steps)),
    element("td", { class: "number" }, String(answer.evaluations ?? "")),
    element("td", { class: "number" }, seconds ? duration(seconds) : ""),
    element("td", { class: "bar" }, seconds ? bar(seconds / slowest) : ""),
  );
}

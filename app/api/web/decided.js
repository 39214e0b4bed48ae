// "When is the digit decided?": the probability of each class at each noise level.

import { lineChart } from "./chart.js";
import { announce, element, find, pngUrl, setBusy } from "./dom.js";
import { failureBox } from "./failure.js";
import { noisyPicture, noiseStd, state } from "./forward.js";
import { base64Of, canvasOf } from "./png.js";
import { patientJson } from "./service.js";

const TIMESTEPS = [10, 20, 30, 40, 45, 50, 55, 60, 64, 68, 72, 76, 80, 83]; // in percent of T
const MOST_LINES = 20; // classes of which each has a line in the chart; of more only the likely ones
const SURE = 0.9;
const LIKELY = 0.15; // a class with at least this probability at some level has a label

let measurement = null; // identifies the running measurement

export function start() {
  find("#decided-run").addEventListener("click", measure);
}

/** Offers the measurement. The first one starts when the section comes into view. */
export function offer() {
  find("#decided-run").disabled = false;
  showEmpty();
  state.onChange = showEmpty;
  first.observe(find("#decided-result"));
}

/** Shows the noisy images and empty axes. Stops a measurement and removes the results of an earlier image. */
function showEmpty() {
  end();
  show(noisyImages());
}

function noisyImages() {
  const times = TIMESTEPS.map((percent) => Math.round((percent * state.model.end) / 100));
  return times.map((t) => ({ t, noisy: base64Of(canvasOf(noisyPicture(t), state.model)) }));
}

const first = new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && measure());

async function measure() {
  first.disconnect();
  const own = {};
  measurement = own;
  const [bar, button] = [find("#decided-progress"), find("#decided-run")];
  setBusy(button, true);
  bar.hidden = false;
  const results = noisyImages();
  try {
    for (const [place, { t, noisy }] of results.entries()) {
      bar.value = place / results.length;
      results[place] = await at(t, noisy);
      if (measurement !== own) return; // the user has chosen another image, model or noise
      show(results);
    }
    announce(summary(results));
  } catch (error) {
    if (measurement === own) find("#decided-result").replaceChildren(failureBox(error, measure));
  } finally {
    if (measurement === own) end();
  }
}

/** Stops a measurement. Its results so far stay. */
export function end() {
  measurement = null;
  setBusy(find("#decided-run"), false);
  find("#decided-progress").hidden = true;
}

async function at(t, noisy) {
  const body = { model: state.model.name, image: noisy, noise_std: noiseStd(t), seed: 1, num_steps: 20, invert: false, fit: "resize" };
  const tell = (seconds) => {
    find("#decided-run").textContent = seconds ? `Busy, waiting ${seconds} s` : "Measure";
  };
  const answer = await patientJson("denoise", body, tell);
  return { t, noisy, probabilities: answer.probabilities, clean: answer.images[0].png };
}

/** Shows the results. Entries without probabilities are not measured yet. */
function show(all) {
  const results = all.filter(({ probabilities }) => probabilities);
  const best = results.length ? mostLikely(results[0]) : null;
  const { class_names: names, num_classes, end: last, isDigits } = state.model;
  const lines = names.map((name, label) => {
    const points = results.map(({ t, probabilities }) => [t, probabilities[label]]);
    // At the end the image is only noise, so all classes have the same probability.
    if (results.length === all.length) points.push([last, 1 / num_classes]);
    const isLikely = label !== best && points.some(([, value]) => value >= LIKELY);
    return { points, kind: label === best ? "main" : "", label: isLikely ? name : "" };
  });
  const series = lines.filter(({ kind, label }) => num_classes <= MOST_LINES || kind || label);
  const text = results.length === all.length ? summary(results) : "A measurement sends 14 short requests.";
  const chart = lineChart({
    series: series.sort((a, b) => a.kind.length - b.kind.length),
    x: [0, last],
    y: [0, 1],
    xLabel: "timestep t",
    yFormat: (value) => `${100 * value}%`,
    description: text,
  });
  const image = (png) => (png ? element("img", { src: pngUrl(png), alt: "" }) : element("div", { class: "tile" }));
  const images = (name) => element("div", {}, all.map((each) => image(each[name])));
  const labels = (textOf) => element("div", { class: "hint" }, all.map((each) => element("span", {}, textOf(each))));
  find("#decided-result").replaceChildren(
    element("div", { class: "chart" }, chart, element("p", { class: "legend" }, text)),
    element(
      "div",
      { class: "decided-scroll", tabindex: 0, role: "region", "aria-label": "Noisy images and results" },
      element(
        "div",
        { class: isDigits ? "decided-rows" : "decided-rows words" },
        labels(({ t }) => `t=${t}`),
        images("noisy"),
        images("clean"),
        labels((each) => (each.probabilities ? `${names[mostLikely(each)]} ${Math.round(100 * Math.max(...each.probabilities))}%` : "")),
      ),
    ),
  );
}

const mostLikely = ({ probabilities }) => probabilities.indexOf(Math.max(...probabilities));

function summary(results) {
  const label = mostLikely(results[0]);
  const { noun, class_names, num_classes, end: last } = state.model;
  const name = `the ${noun} ${class_names[label]}`;
  const firstUnsure = results.findIndex(({ probabilities }) => probabilities[label] < SURE);
  const sure = firstUnsure < 0 ? results : results.slice(0, firstUnsure);
  if (!sure.length) return `No ${noun} has at least 90% at the lowest noise level.`;
  const wrong = results.find((each) => mostLikely(each) !== label);
  const then = wrong ? ` At t = ${wrong.t} another ${noun} is more likely.` : "";
  return `Thick line: probability of ${name}. Thin lines: the others. It has at least 90% up to t = ${sure.at(-1).t}.${then} The values at t = ${last} are not measured: there is only noise, so each ${noun} has ${Number((100 / num_classes).toPrecision(2))}%.`;
}

// "When is the digit decided?": the probability of each digit at each noise level.

import { lineChart } from "./chart.js";
import { announce, element, find, pngUrl, setBusy } from "./dom.js";
import { failureBox } from "./failure.js";
import { noisyPicture, noiseStd, state } from "./forward.js";
import { base64Of, canvasOf } from "./png.js";
import { patientJson } from "./service.js";

const TIMESTEPS = [10, 20, 30, 40, 45, 50, 55, 60, 64, 68, 72, 76, 80, 83]; // for T = 100
const END = 100; // the timestep of pure noise
const SURE = 0.9;
const LIKELY = 0.15; // a digit with at least this probability at some level has a label

let measurement = null; // identifies the running measurement

/** The first measurement starts when the section comes into view. */
export function start() {
  find("#decided-run").disabled = false;
  find("#decided-run").addEventListener("click", measure);
  showEmpty();
  state.onChange = showEmpty;
  first.observe(find("#decided-result"));
}

/** Shows the noisy images and empty axes. Stops a measurement and removes the results of an earlier digit. */
function showEmpty() {
  end();
  show(TIMESTEPS.map((t) => ({ t, noisy: noisyBase64(t) })));
}

const noisyBase64 = (t) => base64Of(canvasOf(noisyPicture(t)));

const first = new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && measure());

async function measure() {
  first.disconnect();
  const own = {};
  measurement = own;
  const [bar, button] = [find("#decided-progress"), find("#decided-run")];
  setBusy(button, true);
  bar.hidden = false;
  const results = TIMESTEPS.map((t) => ({ t, noisy: noisyBase64(t) }));
  try {
    for (const [place, { t, noisy }] of results.entries()) {
      bar.value = place / results.length;
      results[place] = await at(t, noisy);
      if (measurement !== own) return; // the user has chosen another digit or other noise
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
  const body = { image: noisy, noise_std: noiseStd(t), seed: 1, num_steps: 20, invert: false, fit: "resize" };
  const tell = (seconds) => {
    find("#decided-run").textContent = seconds ? `Busy, waiting ${seconds} s` : "Measure";
  };
  const answer = await patientJson("denoise", body, tell);
  return { t, noisy, probabilities: answer.probabilities, digit: answer.digit, clean: answer.images[0].png };
}

/** Shows the results. Entries without probabilities are not measured yet. */
function show(all) {
  const results = all.filter(({ probabilities }) => probabilities);
  const best = results.length ? mostLikely(results[0]) : null;
  const series = Array.from({ length: 10 }, (_, digit) => {
    const points = results.map(({ t, probabilities }) => [t, probabilities[digit]]);
    // At t = 100 the image is only noise, so all digits have the same probability.
    if (results.length === all.length) points.push([END, 1 / 10]);
    const isLikely = digit !== best && points.some(([, value]) => value >= LIKELY);
    return { points, kind: digit === best ? "main" : "", label: isLikely ? String(digit) : "" };
  });
  const text = results.length === all.length ? summary(results) : "A measurement sends 14 short requests.";
  const chart = lineChart({
    series: series.sort((a, b) => a.kind.length - b.kind.length),
    x: [0, END],
    y: [0, 1],
    xLabel: "timestep t",
    yFormat: (value) => `${100 * value}%`,
    description: text,
  });
  const image = (png) => (png ? element("img", { src: pngUrl(png), alt: "", width: 28, height: 28 }) : element("div", { class: "tile" }));
  const images = (name) => element("div", {}, all.map((each) => image(each[name])));
  const labels = (textOf) => element("div", { class: "hint" }, all.map((each) => element("span", {}, textOf(each))));
  find("#decided-result").replaceChildren(
    element("div", { class: "chart" }, chart, element("p", { class: "legend" }, text)),
    element(
      "div",
      { class: "decided-scroll", tabindex: 0, role: "region", "aria-label": "Noisy images and results" },
      element(
        "div",
        { class: "decided-rows" },
        labels(({ t }) => `t=${t}`),
        images("noisy"),
        images("clean"),
        labels(({ digit, probabilities }) => (probabilities ? `${digit} ${Math.round(100 * probabilities[digit])}%` : "")),
      ),
    ),
  );
}

const mostLikely = ({ probabilities }) => probabilities.indexOf(Math.max(...probabilities));

function summary(results) {
  const digit = mostLikely(results[0]);
  const firstUnsure = results.findIndex(({ probabilities }) => probabilities[digit] < SURE);
  const sure = firstUnsure < 0 ? results : results.slice(0, firstUnsure);
  if (!sure.length) return "No digit has at least 90% at the lowest noise level.";
  const wrong = results.find((each) => mostLikely(each) !== digit);
  const then = wrong ? ` At t = ${wrong.t} another digit is more likely.` : "";
  return `Thick line: probability of the digit ${digit}. Thin lines: the other digits. The digit ${digit} has at least 90% up to t = ${sure.at(-1).t}.${then} The values at t = 100 are not measured: there is only noise, so each digit has 10%.`;
}

// The view "Understand": the forward process, when the class is decided, guidance, and fewer steps.

import * as comparisons from "./comparisons.js";
import * as decided from "./decided.js";
import { find } from "./dom.js";
import { failureBox } from "./failure.js";
import * as forward from "./forward.js";
import { about, changes, fullModel } from "./models.js";

let shown = null; // the model that the view shows

export function start() {
  for (const part of [forward, decided, comparisons]) part.start();
  changes.addEventListener("change", () => find("#understand").hidden || open());
}

export async function open() {
  let model = shown;
  try {
    await about();
    model = fullModel();
    if (model === shown) return;
    shown = model;
    decided.end();
    const isMeasured = model.has_picture_tasks && model.guidable && model.hasClasses;
    find("#decided").hidden = !isMeasured;
    find("#predicts").hidden = !model.isDigits;
    for (const each of document.querySelectorAll(".end")) each.textContent = model.end;
    comparisons.show(model);
    await forward.show(model);
    if (model === shown && isMeasured) decided.offer();
  } catch (error) {
    if (model !== shown) return; // the user has chosen another one in the meantime
    shown = null;
    find("#forward-chart").replaceChildren(failureBox(error, open));
  }
}

/** Stops a measurement when the view is left. */
export const close = decided.end;

// The view "Understand": the forward process, when the digit is decided, guidance, and fewer steps.

import * as comparisons from "./comparisons.js";
import * as decided from "./decided.js";
import { find } from "./dom.js";
import { failureBox } from "./failure.js";
import * as forward from "./forward.js";
import { defaultModel } from "./service.js";

let started = null; // the promise of the start, until it fails

/** Connects the parts of the view when it is opened for the first time. */
export async function open() {
  started ??= start();
  try {
    await started;
  } catch (error) {
    started = null;
    find("#forward-chart").replaceChildren(failureBox(error, open));
  }
}

/** Stops a measurement when the view is left. */
export const close = decided.end;

async function start() {
  const model = await defaultModel();
  find("#decided").hidden = !model.has_picture_tasks;
  find("#guidance-section").hidden = !model.guidable;
  await forward.start(model);
  if (model.has_picture_tasks) decided.start();
  comparisons.start(model);
}

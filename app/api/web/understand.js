// The view "Understand": the forward process, when the digit is decided, guidance, and fewer steps.

import { find } from "./dom.js";
import { failureBox } from "./failure.js";
import * as comparisons from "./comparisons.js";
import * as decided from "./decided.js";
import * as forward from "./forward.js";
import { defaultModel } from "./service.js";

let isStarted = false;

/** Connects the parts of the view when it is opened for the first time. */
export async function open() {
  if (isStarted) return;
  try {
    const model = await defaultModel();
    if (isStarted) return;
    isStarted = true;
    await forward.start(model);
    decided.start();
    comparisons.start(model);
  } catch (error) {
    find("#forward-chart").replaceChildren(failureBox(error, open));
  }
}

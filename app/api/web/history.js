// The list of earlier runs. It has the parameters and the first image of each, and stays in this browser.

import { generateAddress } from "./address.js";
import { element, find, plural, pngUrl } from "./dom.js";
import { modelOf } from "./models.js";
import { load, save } from "./storage.js";

const NAME = "unfog-history";
const MOST = 24;

/** Returns the stored entries. Anything else in the storage is ignored. */
function read() {
  try {
    const isEntry = (each) => ["address", "png", "text"].every((name) => typeof each?.[name] === "string");
    return JSON.parse(load("localStorage", NAME)).filter(isEntry);
  } catch {
    return [];
  }
}

const write = (entries) => save("localStorage", NAME, JSON.stringify(entries));

export function remember(run) {
  const address = generateAddress(run.body);
  const entry = { address, png: run.images[0], text: `${modelOf(run.body).nameOf(run.body)}, ${plural(run.count, "image")}, seed ${run.body.seed}` };
  write([entry, ...read().filter((each) => each.address !== address)].slice(0, MOST));
  show();
}

export function show() {
  const entries = read();
  find("#history").hidden = !entries.length;
  const items = entries.map(({ address, png, text }) => {
    const image = element("img", { src: pngUrl(png), alt: "", width: 28, height: 28 });
    const go = () => {
      location.hash = address;
    };
    return element("li", {}, element("button", { type: "button", "aria-label": text, title: text, click: go }, image));
  });
  find("#history-list").replaceChildren(...items);
}

export function start() {
  find("#history-clear").addEventListener("click", () => {
    write([]);
    show();
  });
  show();
}

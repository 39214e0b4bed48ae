// The served models, and the one that the user has chosen.

import { element, find } from "./dom.js";
import { json } from "./service.js";

const MOST_KEYS = 20; // more classes are a list instead of buttons
const LONGEST_KEY = 14; // characters of a name on a button
const SMOOTH = 64; // pixels; larger images are shown without visible pixels

/** A model with the fields of GET /models. A label is the number of a class. */
class Model {
  constructor(facts) {
    Object.assign(this, facts);
    [this.channels, this.height, this.width] = facts.image_shape;
    this.end = facts.alpha_bar.length - 1; // the timestep of pure noise
    this.isDigits = String(facts.class_names) === "0,1,2,3,4,5,6,7,8,9";
    this.hasClasses = facts.num_classes > 1; // otherwise there is nothing to choose or recognise
    this.hasKeys = facts.num_classes <= MOST_KEYS && facts.class_names.every((name) => name.length <= LONGEST_KEY);
    this.first = this.isDigits ? 7 : 0; // the label at first
    this.isAlphabet = !this.isDigits && facts.class_names.every((name) => [...name].length === 1); // the user writes a word
    this.noun = this.isDigits ? "digit" : "class";
    this.thing = this.isDigits ? "a digit" : "an image";
  }

  /** Returns the label of the text of an address, which is a number or a name, or undefined. */
  labelOf(text) {
    const label = /^[0-9]{1,4}$/.test(text) ? Number(text) : this.class_names.indexOf(text);
    return this.class_names[label] === undefined ? undefined : label;
  }

  title(label) {
    return this.isDigits ? `Digit ${label}` : this.class_names[label];
  }

  /** Returns the label of each character of a word, or -1. */
  spell(word) {
    const find = (character) => this.class_names.indexOf(character);
    return [...word.replace(/\s/g, "")].map((each) => [each, each.toUpperCase(), each.toLowerCase()].map(find).find((label) => label >= 0) ?? -1);
  }

  nameOf({ label, labels }) {
    return labels ? labels.map((each) => this.class_names[each]).join("") : this.title(label);
  }

  isLike(other) {
    return ["image_shape", "class_names"].every((name) => String(this[name]) === String(other[name]));
  }
}

/** Has an event "change" for another model. */
export const changes = new EventTarget();

let loaded = null;
let models = [];
let chosen = null;
const names = {}; // digest of a checkpoint -> name of the model

/** Returns the answer of GET /models. It is requested once, and again after a failure. */
export function about() {
  loaded ??= load().catch((error) => {
    loaded = null;
    throw error;
  });
  return loaded;
}

async function load() {
  const answer = await json("models");
  for (const { name, sha256 } of [...answer.models, answer.clip].filter(Boolean)) names[sha256] = name;
  models = answer.models.map((facts) => new Model(facts));
  const select = find("#model");
  select.replaceChildren(...models.map(({ name }) => element("option", {}, name)));
  select.addEventListener("change", () => choose(select.value));
  select.parentNode.hidden = areAlike();
  choose(models[0].name);
  return { ...answer, models };
}

/** Returns true if only the view Generate offers a choice. */
export const areAlike = () => models.every((each) => each.isLike(models[0]));

export function choose(name) {
  const next = models.find((each) => each.name === name);
  if (!next || next === chosen) return;
  const isFirst = chosen === null;
  chosen = next;
  find("#model").value = name;
  document.body.classList.toggle("smooth", chosen.width > SMOOTH);
  document.body.classList.toggle("one-class", !chosen.hasClasses);
  for (const each of document.querySelectorAll("[data-words]")) {
    const [ofDigits, ofOthers, ofLetters = ofOthers] = each.dataset.words.split("|");
    each.textContent = chosen.isDigits ? ofDigits : chosen.isAlphabet ? ofLetters : ofOthers;
  }
  if (!isFirst) changes.dispatchEvent(new Event("change"));
}

export const chosenModel = () => chosen;

/** Returns the chosen model, or a model like it if the chosen one only generates images. */
export const fullModel = () =>
  [chosen, ...models].find((each) => each.has_picture_tasks && each.isLike(chosen)) ?? chosen;

export const modelOf = ({ model }) => models.find(({ name }) => name === model) ?? chosen;

/** Returns the name of a model by the digest of its checkpoint, or undefined. */
export const checkpointName = (sha256) => names[sha256];

/** Offers the classes of a model. `any` is the text of an entry without a class. */
export function showClasses(select, { class_names, first }, any = null) {
  const options = class_names.map((name, label) => element("option", { value: label, selected: !any && label === first }, name));
  select.replaceChildren(...(any ? [element("option", { value: "" }, any)] : []), ...options);
}

/** Returns the class in the text chunks of an image. A name can be a JSON string. */
export function className({ Digit, Label = Digit }) {
  try {
    return /^["[]/.test(Label) ? [JSON.parse(Label)].flat().join(" ") : Label;
  } catch {
    return Label;
  }
}

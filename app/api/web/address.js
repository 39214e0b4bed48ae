// The state of the page in its address: #/<view>?<parameters>.

import { isPrompt } from "./clip.js";

/** Returns {view, parameters} of the address, or null if the hash names no view. */
export function parse(hash) {
  const match = /^#\/([a-z]+)(?:\?(.*))?$/.exec(hash);
  return match ? { view: match[1], parameters: new URLSearchParams(match[2] ?? "") } : null;
}

const NAMES = ["label", "count", "seed", "num_steps", "sampler", "guidance_scale", "clip_guidance_scale", "clip_prompt", "model"];

export function generateAddress(body) {
  const parameters = new URLSearchParams();
  for (const name of NAMES) if (body[name] !== undefined && body[name] !== null) parameters.set(name, body[name]);
  if (body.labels) parameters.set("labels", body.labels.join("."));
  return `#/generate?${parameters}`;
}

/** Returns the fields of /generate in the parameters, without the label. Values that are not valid are left out. */
export function generateFields(parameters) {
  const body = {};
  const integer = (name, least, most) => {
    const text = parameters.get(name);
    if (text && /^[0-9]{1,16}$/.test(text) && text >= least && Number(text) <= most) body[name] = Number(text);
  };
  integer("count", 1, 4096);
  integer("seed", 0, Number.MAX_SAFE_INTEGER);
  integer("num_steps", 1, 100);
  const scale = Number(parameters.get("guidance_scale"));
  if (scale >= 1 && scale <= 10) body.guidance_scale = scale;
  const clipScale = Number(parameters.get("clip_guidance_scale"));
  if (clipScale > 0 && clipScale <= 10) {
    body.clip_guidance_scale = clipScale;
    const prompt = parameters.get("clip_prompt");
    if (prompt && isPrompt(prompt)) body.clip_prompt = prompt;
  }
  for (const name of ["sampler", "model"]) {
    const text = parameters.get(name);
    if (text && /^[\w.-]{1,128}$/.test(text)) body[name] = text;
  }
  return body;
}

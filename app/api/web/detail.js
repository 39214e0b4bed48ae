// The dialog of one image: its parameters, the code that makes it again, and the file.

import { promptOf } from "./clip.js";
import { download, element, find, menu, pngUrl } from "./dom.js";
import { checkpointName, className } from "./models.js";
import { bytesOf, jsonOf, textChunks } from "./png.js";
import { hasKey } from "./service.js";
import { copy, linkOf, nameOf, scaleFor } from "./share.js";

const WIDTH = 224; // pixels of an image that the copied code makes
const LABELS = {
  Digit: "Digit", Label: "Class", Seed: "Seed", Index: "Index", Sampler: "Sampler", Steps: "Steps",
  "Guidance-Scale": "Guidance", "CLIP-Guidance-Scale": "CLIP guidance", "CLIP-Prompt": "Prompt", "CLIP-SHA256": "CLIP model",
  "Model-SHA256": "Model", Software: "Software", Task: "Task", "Noise-Std": "Noise", Mode: "Mode", Strength: "Strength",
};

export const fileName = (run, index) => `${nameOf(run)}-${index}.png`;

/** Returns a list of the text chunks that this service writes. */
export function factList(chunks) {
  const shown = Object.entries(LABELS).filter(([name]) => Object.hasOwn(chunks, name) && !(name === "Label" && chunks.Digit));
  const text = (value) => checkpointName(value) ?? (value.length > 20 ? `${value.slice(0, 16)}…` : value);
  const special = { "CLIP-Prompt": promptOf(chunks), Label: className(chunks) };
  const valueOf = (name) => special[name] ?? text(chunks[name]);
  return element(
    "dl",
    { class: "facts" },
    shown.flatMap(([name, label]) => [element("dt", {}, label), element("dd", {}, element("bdi", {}, valueOf(name)))]),
  );
}

/** Returns the request for /generate that makes the image with this index again. Image i does not depend on `count`. */
function requestOf({ body }, index) {
  const { labels } = body;
  return { ...body, ...(labels ? { labels: labels.slice(0, index + 1) } : { count: index + 1 }), scale: scaleFor(WIDTH, body) };
}

/** Returns the flat object as Python source in printable ASCII. */
function dictOf(body) {
  const escape = (character) => `\\U${character.codePointAt(0).toString(16).padStart(8, "0")}`;
  const items = Object.entries(body).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`);
  return `{${items.join(", ")}}`.replace(/[^ -~]/gu, escape);
}

const serviceUrl = () => new URL("generate", location.href.split("#", 1)[0]).href;

function curlOf(run, index) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $UNFOG_API_KEY"` : "";
  const body = jsonOf(requestOf(run, index));
  const [accept, end] = index
    ? ["application/json", ` \\\n  | jq -r '.images[${index}].png' | base64 -d > image.png`]
    : ["image/png", " -o image.png"];
  return `curl -sS --fail-with-body ${serviceUrl()} \\\n  -H 'Content-Type: application/json' -H 'Accept: ${accept}'${key} \\\n  -d '${body}'${end}`;
}

function pythonOf(run, index) {
  const key = hasKey() ? `headers = {"Authorization": "Bearer " + os.environ["UNFOG_API_KEY"]}\n` : "";
  return `import base64
${key ? "import os\n" : ""}
import httpx

body = ${dictOf(requestOf(run, index))}
${key}response = httpx.post("${serviceUrl()}", json=body, timeout=60${key ? ", headers=headers" : ""})
image = response.raise_for_status().json()["images"][${index}]
open("image.png", "wb").write(base64.b64decode(image["png"]))
`;
}

/** Opens the dialog for a finished image of a run. `focused` is the name of the button that gets the focus. */
export function openDetail(run, index, focused = "Download PNG") {
  const dialog = find("#detail");
  const png = run.images[index];
  const file = bytesOf(png);
  const line = element("p", { class: "hint", role: "status" });
  const save = () => download(fileName(run, index), new Blob([file], { type: "image/png" }));
  const icon = (name, text, click) => element("button", { type: "button", class: "quiet icon", "aria-label": name, click }, text);
  const move = (by, name) => {
    let next = index;
    do next = (next + by + run.count) % run.count;
    while (!run.images[next]);
    openDetail(run, next, name);
  };
  const more = [
    ["Copy link", () => copy(linkOf(run), "Link", line)],
    ["Copy as curl", () => copy(curlOf(run, index), "curl command", line)],
    ["Copy as Python", () => copy(pythonOf(run, index), "Python program", line)],
  ];
  dialog.replaceChildren(
    element(
      "div",
      { class: "run-line" },
      element("h2", { id: "detail-title", class: "grow" }, `Image ${index + 1} of ${run.count}`),
      ...(run.count > 1 ? [icon("Previous", "‹", () => move(-1, "Previous")), icon("Next", "›", () => move(1, "Next"))] : []),
      icon("Close", "×", () => dialog.close()),
    ),
    element(
      "div",
      { class: "detail" },
      element("img", { class: "detail-image", src: pngUrl(png), alt: `Image ${index + 1}` }),
      factList(textChunks(file) ?? {}),
    ),
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", class: "primary", click: save }, "Download PNG"),
      run.path === "generate" ? menu("More", more) : null,
    ),
    line,
  );
  dialog.onkeydown = (event) => {
    if (run.count === 1 || event.target.matches("textarea")) return;
    if (event.key === "ArrowLeft") move(-1, "Previous");
    if (event.key === "ArrowRight") move(1, "Next");
  };
  if (!dialog.open) dialog.showModal();
  [...dialog.querySelectorAll("button")].find((each) => (each.ariaLabel ?? each.textContent) === focused).focus({ preventScroll: true });
  dialog.scrollTop = 0;
}

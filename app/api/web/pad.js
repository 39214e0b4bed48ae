// The drawing area, and the mask over a picture.

import { announce, find } from "./dom.js";
import { base64Of, canvasOf } from "./png.js";

const MOST_UNDO = 20;
const SIDE = 280; // pixels of a canvas, about
const BRUSH = 1 / 14; // pixels around the pointer that the brush of the mask marks, as a share of the width

/** A canvas for strokes on black. Calls `changed()` after each stroke. */
export class Pad {
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, exact: null, undoList: [] });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.fill();
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
  }

  /** Uses the shape of the images of a model. The drawing stays if the shape is the same. */
  use(model) {
    const isSame = String((this.model ?? model).image_shape) === String(model.image_shape);
    this.model = model;
    if (!resize(this.canvas, model) && isSame) return;
    this.fill();
    Object.assign(this, { exact: null, undoList: [] });
  }

  get isEmpty() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    return !data.some((value, place) => place % 4 !== 3 && value > 0);
  }

  /** Returns the fields of a request. A picture in the size of the model is sent without any change. */
  get picture() {
    const { exact, model } = this;
    const fit = exact || !model.normalises_drawings ? "resize" : "digit";
    return { image: base64Of(exact ? canvasOf(exact, model) : this.canvas), fit, invert: false, model: model.name };
  }

  setValues(values) {
    this.save();
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(canvasOf(values, this.model), 0, 0, this.canvas.width, this.canvas.height);
    this.exact = values;
    this.changed();
  }

  clear() {
    this.save();
    this.fill();
    this.exact = null;
    this.changed();
  }

  undo() {
    const last = this.undoList.pop();
    if (!last) return;
    this.context.putImageData(last.image, 0, 0);
    this.exact = last.exact;
    this.changed();
  }

  save() {
    const image = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    this.undoList = [...this.undoList, { image, exact: this.exact }].slice(-MOST_UNDO);
  }

  fill() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  begin(event) {
    if (event.button || !event.isPrimary) return; // a second finger does not draw
    this.canvas.setPointerCapture(event.pointerId);
    this.save();
    this.exact = null;
    this.last = positionOf(event, this.canvas);
    this.line(this.last);
  }

  move(event) {
    if (!this.last || !event.isPrimary) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) this.line(positionOf(each, this.canvas));
  }

  line(to) {
    const { context, model } = this;
    const strokeStyle = model?.channels === 3 ? find("#pad-colour").value : "#fff";
    Object.assign(context, { strokeStyle, lineWidth: find("#pad-width").value, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(...to);
    context.stroke();
    this.last = to;
  }

  end() {
    if (!this.last) return;
    this.last = null;
    this.changed();
  }
}

/** Gives a canvas a multiple of the size of a model's images. Returns true if its size changes. */
function resize(canvas, { width, height }) {
  const scale = Math.max(1, Math.round(SIDE / width));
  if (canvas.width === scale * width && canvas.height === scale * height) return false;
  Object.assign(canvas, { width: scale * width, height: scale * height });
  return true;
}

function positionOf(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

/** A mask over values. The pixels that it marks are filled in. */
export class Mask {
  constructor(canvas) {
    Object.assign(this, { canvas, context: canvas.getContext("2d") });
    this.canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.isPainting = true;
      this.paintAt(event);
    });
    canvas.addEventListener("pointermove", (event) => this.isPainting && this.paintAt(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.isPainting = false));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.show());
  }

  /** Uses the shape of the images of a model. Nothing is marked. */
  use(model) {
    const { width, height } = model;
    resize(this.canvas, model);
    const length = width * height;
    Object.assign(this, { model, marked: new Uint8Array(length), brush: Math.round(width * BRUSH), cursor: [width / 2, height / 2] });
    this.setValues(new Float32Array(length));
  }

  get isEmpty() {
    return !this.marked.includes(1);
  }

  setValues(values) {
    this.values = values;
    this.show();
  }

  /** Marks the pixels for which `isMarked(x, y)` is true, and no other. */
  set(isMarked) {
    const { width } = this.model;
    this.marked = this.marked.map((_, place) => Number(isMarked(place % width, Math.floor(place / width))));
    this.show();
  }

  /** Returns the PNG file of the mask in base64. White pixels are filled in. */
  get base64() {
    return base64Of(canvasOf(Float32Array.from(this.marked, (value) => 255 * value), this.model));
  }

  paintAt(event) {
    this.paint(...positionOf(event, this.canvas).map((each) => Math.floor(each / this.scale)));
  }

  get scale() {
    return this.canvas.width / this.model.width;
  }

  paint(x, y) {
    const { brush, marked, model: { width, height } } = this;
    for (let py = Math.max(0, y - brush); py <= Math.min(height - 1, y + brush); py++) {
      for (let px = Math.max(0, x - brush); px <= Math.min(width - 1, x + brush); px++) marked[py * width + px] = 1;
    }
    this.show();
  }

  onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const { width, height } = this.model;
      const step = Math.ceil(this.brush / 2);
      const to = (axis, size) => Math.min(size - 1, Math.max(0, this.cursor[axis] + step * moves[event.key][axis]));
      this.cursor = [to(0, width), to(1, height)];
    } else if (event.key === " ") {
      this.paint(...this.cursor);
    } else {
      return;
    }
    event.preventDefault();
    this.show();
    announce(`Row ${this.cursor[1] + 1}, column ${this.cursor[0] + 1}${event.key === " " ? ", marked" : ""}`);
  }

  show() {
    const { context, canvas, model, scale, brush } = this;
    context.imageSmoothingEnabled = false;
    const image = canvasOf(this.values, model);
    const marks = image.getContext("2d");
    marks.fillStyle = "rgb(255 179 71 / 75%)";
    this.marked.forEach((value, place) => {
      if (value) marks.fillRect(place % model.width, Math.floor(place / model.width), 1, 1);
    });
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (document.activeElement === canvas) {
      context.strokeStyle = "#fff";
      const [x, y] = this.cursor.map((each) => (each - brush) * scale);
      context.strokeRect(x, y, (2 * brush + 1) * scale, (2 * brush + 1) * scale);
    }
  }
}

// The drawing area, and the mask over a picture of 28 x 28 pixels.

import { announce } from "./dom.js";
import { SIDE, base64Of, canvasOf } from "./png.js";

const MOST_UNDO = 20;
const BRUSH = 2; // pixels around the pointer that the brush of the mask marks

/** A canvas for white strokes on black. Calls `changed()` after each stroke. */
export class Pad {
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, width: 22, exact: null, undoList: [] });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.fill();
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
  }

  get isEmpty() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    return !data.some((value, place) => place % 4 !== 3 && value > 0);
  }

  /** Returns the fields `image` and `fit` of a request. A picture of 28 x 28 pixels is sent without any change. */
  get picture() {
    if (this.exact) return { image: base64Of(canvasOf(this.exact)), fit: "resize", invert: false };
    return { image: base64Of(this.canvas), fit: "digit", invert: false };
  }

  /** Shows 28 x 28 grey values. */
  setGrey(grey) {
    this.save();
    this.fill();
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(canvasOf(grey), 0, 0, this.canvas.width, this.canvas.height);
    this.exact = grey;
    this.changed();
  }

  /** Shows a picture with white strokes on black. A picture with dark strokes on a light ground is inverted. */
  setPicture(bitmap) {
    this.save();
    const { width, height } = this.canvas;
    const scale = Math.min(width / bitmap.width, height / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    this.context.clearRect(0, 0, width, height);
    this.context.imageSmoothingEnabled = scale < 1;
    this.context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
    const image = this.context.getImageData(0, 0, width, height);
    makeStrokesWhite(image, { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h });
    this.context.putImageData(image, 0, 0);
    this.exact = null;
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
    const { context } = this;
    Object.assign(context, { strokeStyle: "#fff", lineWidth: this.width, lineCap: "round", lineJoin: "round" });
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

/** Makes a picture grey, with white strokes on black. `area` is the part of it that is not a margin. */
function makeStrokesWhite({ data, width }, area) {
  let [dark, opaque] = [0, 0];
  for (let i = 0; i < data.length; i += 4) {
    opaque += data[i + 3];
    dark += data[i + 3] * (data[i] + data[i + 1] + data[i + 2] < 382);
  }
  const ground = dark > opaque / 2 && opaque < 255 * area.width * area.height * 0.98 ? 255 : 0; // behind transparent pixels
  let [edge, count] = [0, 0];
  const isInside = (x, y) => x >= area.left && x < area.left + area.width && y >= area.top && y < area.top + area.height;
  const isEdge = (x, y) =>
    x < area.left + 2 || x >= area.left + area.width - 2 || y < area.top + 2 || y >= area.top + area.height - 2;
  for (let i = 0; i < data.length; i += 4) {
    const alpha = data[i + 3] / 255;
    const [x, y] = [(i / 4) % width, Math.floor(i / 4 / width)];
    const grey = alpha * (data[i] + data[i + 1] + data[i + 2]) / 3 + (1 - alpha) * ground;
    data[i] = data[i + 1] = data[i + 2] = grey;
    data[i + 3] = isInside(x, y) ? 255 : 0;
    if (isInside(x, y) && isEdge(x, y)) {
      edge += grey;
      count += 1;
    }
  }
  const isLight = edge / count > 127;
  for (let i = 0; i < data.length; i += 4) {
    const value = data[i + 3] ? (isLight ? 255 - data[i] : data[i]) : 0;
    data[i] = data[i + 1] = data[i + 2] = value;
    data[i + 3] = 255;
  }
}

function positionOf(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

/** A mask over grey values. The pixels that it marks are filled in. */
export class Mask {
  constructor(canvas) {
    Object.assign(this, { canvas, grey: new Float32Array(SIDE * SIDE), marked: new Uint8Array(SIDE * SIDE), cursor: [14, 14] });
    this.context = canvas.getContext("2d");
    this.canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.isPainting = true;
      this.paintAt(event);
    });
    canvas.addEventListener("pointermove", (event) => this.isPainting && this.paintAt(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.isPainting = false));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.show());
    this.show();
  }

  get isEmpty() {
    return !this.marked.includes(1);
  }

  setGrey(grey) {
    this.grey = grey;
    this.show();
  }

  /** Marks the pixels for which `isMarked(x, y)` is true, and no other. */
  set(isMarked) {
    this.marked = this.marked.map((_, place) => Number(isMarked(place % SIDE, Math.floor(place / SIDE))));
    this.show();
  }

  /** Returns the PNG file of the mask in base64. White pixels are filled in. */
  get base64() {
    return base64Of(canvasOf(Float32Array.from(this.marked, (value) => 255 * value)));
  }

  paintAt(event) {
    const [x, y] = positionOf(event, this.canvas).map((each) => Math.floor((each / this.canvas.width) * SIDE));
    this.paint(x, y);
  }

  paint(x, y) {
    for (let dy = -BRUSH; dy <= BRUSH; dy++) {
      for (let dx = -BRUSH; dx <= BRUSH; dx++) {
        const [px, py] = [x + dx, y + dy];
        if (px >= 0 && py >= 0 && px < SIDE && py < SIDE) this.marked[py * SIDE + px] = 1;
      }
    }
    this.show();
  }

  onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      this.cursor = this.cursor.map((each, axis) => Math.min(SIDE - 1, Math.max(0, each + moves[event.key][axis])));
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
    const { context, canvas } = this;
    context.imageSmoothingEnabled = false;
    context.drawImage(canvasOf(this.grey), 0, 0, canvas.width, canvas.height);
    const size = canvas.width / SIDE;
    context.fillStyle = "rgb(255 179 71 / 75%)";
    this.marked.forEach((value, place) => {
      if (value) context.fillRect((place % SIDE) * size, Math.floor(place / SIDE) * size, size, size);
    });
    if (document.activeElement === canvas) {
      context.strokeStyle = "#fff";
      const [x, y] = this.cursor.map((each) => (each - BRUSH) * size);
      context.strokeRect(x, y, (2 * BRUSH + 1) * size, (2 * BRUSH + 1) * size);
    }
  }
}

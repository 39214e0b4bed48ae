// Reads the text chunks of a PNG file, and converts between pictures and the values of their pixels: numbers from 0 to
// 255, by row, column and channel. `shape` is a model, or another object with width, height and channels.

const MAX_CHUNKS = 1000; // more are not read
const HEAD = 33; // bytes of the signature and of the first chunk, IHDR
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** Returns the text chunks (tEXt) of a PNG file as an object, or null if the bytes are not a PNG file. */
export function textChunks(bytes) {
  if (!SIGNATURE.every((byte, place) => bytes[place] === byte)) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const latin = new TextDecoder("latin1");
  const chunks = {};
  let at = 8;
  for (let number = 0; number < MAX_CHUNKS && at + 12 <= bytes.length; number++) {
    const length = view.getUint32(at);
    if (at + 12 + length > bytes.length) break;
    if (latin.decode(bytes.subarray(at + 4, at + 8)) === "tEXt") {
      const [key, value] = latin.decode(bytes.subarray(at + 8, at + 8 + length)).split("\0", 2);
      chunks[key] = value ?? "";
    }
    at += 12 + length;
  }
  return chunks;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** Returns the checksum of PNG chunks and of files in a ZIP archive. */
export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

/** Returns a PNG file with these text chunks after its first chunk. The texts are ASCII. */
export function withText(bytes, chunks) {
  const parts = Object.entries(chunks).map(([key, value]) => {
    const content = new TextEncoder().encode(`tEXt${key}\0${value}`);
    const part = new Uint8Array(content.length + 8);
    part.set(content, 4);
    const view = new DataView(part.buffer);
    view.setUint32(0, content.length - 4);
    view.setUint32(content.length + 4, crc32(content));
    return part;
  });
  return new Blob([bytes.subarray(0, HEAD), ...parts, bytes.subarray(HEAD)]);
}

export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Returns a canvas with these values, which are clipped to 0 to 255. */
export function canvasOf(values, { width, height }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  draw(canvas, values);
  return canvas;
}

export function draw(canvas, values) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const channels = (4 * values.length) / image.data.length;
  for (let i = 0; i < image.data.length; i++) {
    // Clipped and rounded by the array. The fourth channel is the opacity.
    image.data[i] = i % 4 === 3 ? 255 : values[Math.floor(i / 4) * channels + ((i % 4) % channels)];
  }
  context.putImageData(image, 0, 0);
}

export const base64Of = (canvas) => canvas.toDataURL("image/png").split(",", 2)[1];

/** Returns the values of a picture, or of a part of it, in another size. */
export function valuesOf(picture, { width, height, channels }, part = [0, 0, picture.width, picture.height]) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, ...part, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  return Float32Array.from({ length: width * height * channels }, (_, i) => data[4 * Math.floor(i / channels) + (i % channels)]);
}

export const valuesOfPng = async (base64, shape) =>
  valuesOf(await createImageBitmap(new Blob([bytesOf(base64)], { type: "image/png" })), shape);

/**
 * Returns the value as JSON in printable ASCII without apostrophes, which is safe in single quotes of a shell, even if it
 * comes from an address.
 */
export const jsonOf = (value) =>
  JSON.stringify(value).replace(/[^ -&(-~]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);

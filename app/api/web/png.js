// Reads the text chunks of a PNG file, and converts between pictures and 28 x 28 grey values.

export const SIDE = 28;

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

/** Returns a canvas of 28 x 28 pixels with these grey values, which are clipped to 0 to 255. */
export function canvasOf(grey) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  draw(canvas, grey);
  return canvas;
}

/** Draws grey values on a canvas of 28 x 28 pixels. */
export function draw(canvas, grey) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(SIDE, SIDE);
  for (let i = 0; i < grey.length; i++) {
    image.data[4 * i] = image.data[4 * i + 1] = image.data[4 * i + 2] = grey[i]; // clipped and rounded by the array
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** Returns the PNG file of a canvas in base64. */
export const base64Of = (canvas) => canvas.toDataURL("image/png").split(",", 2)[1];

/** Returns the 784 grey values of a PNG file in base64. */
export async function greyOf(base64) {
  const bitmap = await createImageBitmap(new Blob([bytesOf(base64)], { type: "image/png" }));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, SIDE, SIDE);
  const { data } = context.getImageData(0, 0, SIDE, SIDE);
  return Float32Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i]);
}

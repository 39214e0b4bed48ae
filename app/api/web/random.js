// Random numbers: noise and seeds.

export const MAX_SEED = 2 ** 53 - 1; // of the API

const NEW_SEEDS = 1_000_000; // new seeds are below this number, so that people can read and type them

export const newSeed = () => Math.floor(Math.random() * NEW_SEEDS);

/** Returns a sample of the standard normal distribution (Box & Muller 1958). */
export function gaussian() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

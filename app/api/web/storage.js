// Storage of the browser. Reading and writing never fail: the user may have blocked the storage, or it may be full.

function guarded(use) {
  try {
    return use();
  } catch {
    return null;
  }
}

/** Returns a stored text, or null. `area` is "localStorage" or "sessionStorage". */
export const load = (area, name) => guarded(() => window[area].getItem(name));

export const save = (area, name, text) => guarded(() => window[area].setItem(name, text));

// Small helpers for the elements of the page.

export const find = (selector, root = document) => root.querySelector(selector);

/** Creates an element. Attributes whose value is a function become event listeners, and false or null is left out. */
export const element = (name, ...rest) => filled(document.createElement(name), ...rest);
export const svg = (name, ...rest) => filled(document.createElementNS("http://www.w3.org/2000/svg", name), ...rest);

function filled(made, attributes = {}, ...children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** Says a text to screen readers. Use it for results, not for each step. */
export function announce(text) {
  find("#live").textContent = text;
}

export const pngUrl = (base64) => `data:image/png;base64,${base64}`;

export const moves = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}

/** Returns a time in whole seconds, minutes or hours. */
export function period(seconds) {
  if (seconds < 120) return `${Math.ceil(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** Returns a button that opens a menu. `items` are [text, action]. A null is left out. */
export function menu(label, items) {
  const summary = element("summary", { class: "button" }, label);
  const buttons = items.filter(Boolean).map(([text, act]) => {
    const choose = () => {
      close();
      act();
    };
    return element("button", { type: "button", class: "quiet", click: choose }, text);
  });
  // Safari does not focus a clicked button. The list takes the focus instead, so the menu stays open for the click.
  const root = element("details", { class: "menu" }, summary, element("div", { tabindex: -1 }, buttons));
  const close = () => {
    root.open = false;
    summary.focus({ preventScroll: true });
  };
  root.addEventListener("focusout", (event) => {
    if (!root.contains(event.relatedTarget)) root.open = false;
  });
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !root.open) return;
    event.preventDefault(); // a dialog around the menu stays open
    close();
  });
  return root;
}

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Marks a button whose work is running. It stays enabled, because a disabled button loses the focus. */
export const setBusy = (button, isBusy) => button.setAttribute("aria-disabled", isBusy);

/** Shows the value of a range input in an output element, now and after each change. */
export function showValue(input, output, format = String) {
  output.setAttribute("aria-live", "off"); // the slider itself says its value
  const update = () => {
    output.textContent = format(Number(input.value));
  };
  input.addEventListener("input", update);
  update();
  return update;
}

// Starts the page: views by address, the theme, and the dialog for the API key.

import { parse } from "./address.js";
import * as batch from "./batch.js";
import { find } from "./dom.js";
import * as drawView from "./draw.js";
import * as generate from "./generate.js";
import { setKeyPrompt } from "./service.js";
import * as status from "./status.js";
import { load, save } from "./storage.js";
import * as understand from "./understand.js";

const VIEWS = { generate, understand, draw: drawView, batch, status };
const THEME = "unfog-theme";

let current = null;

function route() {
  const address = parse(location.hash);
  const name = address && Object.hasOwn(VIEWS, address.view) ? address.view : "generate";
  for (const each of Object.keys(VIEWS)) find(`#${each}`).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · unfog`;
  if (current && current !== name) {
    VIEWS[current].close?.();
    find("#detail").close();
    const title = find(`#${name} h1`);
    title.tabIndex = -1;
    title.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  current = name;
  VIEWS[name].open(address?.parameters ?? new URLSearchParams());
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const saved = load("localStorage", THEME);
  if (saved) root.dataset.theme = saved; // otherwise the style sheet follows the system
  find("#theme").addEventListener("click", () => {
    const isDark = (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    save("localStorage", THEME, root.dataset.theme);
  });
}

let prompted = null;
/** Asks for an API key. Requests that need one at the same time share the dialog. */
function askForKey(isRefused) {
  prompted ??= new Promise((resolve) => {
    const dialog = find("#key-dialog");
    find("#key-message").textContent = isRefused
      ? "The service refused the key. Check it and enter it again."
      : "This service accepts only requests with an API key.";
    find("#key").value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener(
      "close",
      () => {
        prompted = null;
        resolve(dialog.returnValue === "use" ? find("#key").value.trim() : null);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return prompted;
}

find("#skip").addEventListener("click", (event) => {
  event.preventDefault(); // so that the address keeps its parameters
  find("#main").focus();
});
// A busy button keeps the focus, so it is not disabled.
document.addEventListener("click", (event) => event.target.closest("[aria-disabled=true]") && event.stopPropagation(), true);
startTheme();
setKeyPrompt(askForKey);
for (const view of Object.values(VIEWS)) view.start();
addEventListener("hashchange", route);
route();

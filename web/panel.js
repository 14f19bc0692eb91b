/** The panel "quantwire" in the editor's sidebar: everything that a check found, in words, with ways there and out. */
import { app } from "../../scripts/app.js";
import { findingElement } from "./card.js";
import * as conflicts from "./conflicts.js";
import { addStyle, make } from "./lib/style.js";
import { say } from "./lib/words.js";
import { setting } from "./settings.js";

const ID = "quantwire";
const MOST = 100; // findings that are listed; a graph of thousands of broken nodes has thousands
let holder = null;
let shownAs = "";

export function setup() {
  addStyle();
  app.extensionManager?.registerSidebarTab?.({
    id: ID,
    icon: "pi pi-shield",
    title: "quantwire",
    tooltip: say("check"),
    type: "custom",
    render: (element) => {
      holder = element;
      shownAs = "";
      update();
    },
    destroy: () => {
      holder = null;
    },
  });
}

const isOpen = () => Boolean(holder?.isConnected && holder.querySelector(".qw-panel"));

/** Show the panel, whether it was shown or not. */
export async function open() {
  if (isOpen()) return;
  await app.extensionManager?.command?.execute?.(`Workspace.ToggleSidebarTab.${ID}`);
}

/** Write what is known now. */
export function update() {
  if (!holder) return;
  const state = conflicts.current();
  const key = JSON.stringify([state, setting("quantwire.check"), say("check")]);
  if (key === shownAs && holder.firstChild) return;
  shownAs = key;
  const focused = holder.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  const again = make("button", { class: "qw-button", type: "button", onclick: () => conflicts.check() }, say("again"));
  const list = make("ul", { class: "qw-list", "aria-label": say("list") });
  for (const finding of state.findings.slice(0, MOST)) {
    list.append(make("li", { "data-level": finding.level }, findingElement(finding, { where: true })));
  }
  const more = Math.max(0, state.findings.length - MOST) + state.more;
  const status = make("p", { class: "qw-status", role: "status", "aria-live": "polite" }, ...words(state));
  holder.replaceChildren(
    make(
      "div",
      { class: "qw qw-panel" },
      make("header", {}, make("h2", {}, "quantwire"), again),
      status,
      list,
      more > 0 ? make("p", { class: "qw-status" }, say("more", { n: more })) : null,
    ),
  );
  if (focused) [...holder.querySelectorAll("button")].find((b) => (b.ariaLabel ?? b.textContent) === focused)?.focus();
}

/** The state in a line, and one below that explains it. */
function words(state) {
  const strong = (text) => make("strong", {}, text);
  if (state.status === "checking" && !state.findings.length) return [strong(say("checking"))];
  if (state.status === "failed") return [strong(say("failed")), reason(state)];
  if (state.status === "none") return [strong(say("notChecked")), setting("quantwire.check") ? "" : say("off")];
  const counts = conflicts.LEVELS.map((level) => [level, state.findings.filter((f) => f.level === level).length]);
  const told = counts.filter(([, n]) => n).map(([level, n]) => count(level, n));
  const known = ["comfyui", "standalone"].includes(state.host);
  const host = known ? say(state.host) : state.host;
  const where = state.host ? say(state.mode ? "forMode" : "forHost", { host, mode: state.mode }) : "";
  if (told.length) return [strong(told.join(", ")), where];
  return [strong(say("nothing")), [say("nothingMore"), where && `(${where})`].filter(Boolean).join(" ")];
}

function count(level, n) {
  const name = level[0].toUpperCase() + level.slice(1);
  return n === 1 ? say(`one${name}`) : say(`${level}s`, { n });
}

function reason(state) {
  if (state.reason === "no-route") return say("noRoute");
  return state.reason === "offline" ? say("offline") : state.message;
}

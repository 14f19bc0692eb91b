/** The card beside a mark: what is wrong, and what to do about it. */
import { applyRemedy, LEVELS } from "./conflicts.js";
import { goTo, nodeAt } from "./lib/graph.js";
import { surface } from "./lib/marks.js";
import { icon, make } from "./lib/style.js";
import { say } from "./lib/words.js";
import * as panel from "./panel.js";

const GAP = 10;
const SIDEBAR = 64; // the editor's icons at the left edge
let open = null;

/** A card whose mark is gone tells of what is no longer so. */
export function closeIfGone() {
  if (open && !open.from.isConnected) closeCard();
}

/** @param {boolean} [giveBack] the focus, to what opened the card */
export function closeCard(giveBack = false) {
  if (!open) return;
  const { card, from, stop } = open;
  open = null;
  stop.abort();
  card.remove();
  from.setAttribute("aria-expanded", "false");
  if (giveBack && from.isConnected) from.focus({ preventScroll: true });
}

/**
 * @param {HTMLElement} from the mark
 * @param {string} title
 * @param {any[]} found findings
 */
export function showCard(from, title, found) {
  const again = open?.from === from;
  closeCard();
  if (again) return;
  const worst = LEVELS.find((level) => found.some((finding) => finding.level === level)) ?? "note";
  const close = make("button", { class: "qw-close", type: "button", "aria-label": say("close"), onclick: () => closeCard(true) }, "×");
  const card = make(
    "section",
    { class: "qw-card", role: "dialog", "aria-label": `${title}: ${say(worst)}`, tabindex: "-1" },
    make("header", { "data-level": worst }, icon(worst), make("h2", {}, title), close),
    ...found.map((finding) => findingElement(finding, { onApplied: () => closeCard() })),
    make("footer", {}, make("button", { class: "qw-button", type: "button", onclick: () => showAll() }, say("showAll"))),
  );
  const stop = new AbortController();
  open = { card, from, stop };
  from.setAttribute("aria-expanded", "true");
  surface().append(card);
  put(card, from);
  card.focus({ preventScroll: true });
  const options = { signal: stop.signal, capture: true };
  // The editor's own keys (Escape leaves a subgraph, Delete removes nodes) are not meant while the card has the focus.
  card.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    if (event.key === "Escape") closeCard(true);
  });
  const outside = (event) => !card.contains(event.target) && !from.contains(event.target) && closeCard();
  document.addEventListener("pointerdown", outside, options);
  document.addEventListener("wheel", outside, { ...options, passive: true });
}

function showAll() {
  closeCard();
  panel.open();
}

/** Beside the marked node where there is room, so that its widgets stay in sight; else below the mark. */
function put(card, from) {
  const area = surface().getBoundingClientRect();
  const mark = from.getBoundingClientRect();
  const node = from.quantwireFrame?.getBoundingClientRect() ?? mark;
  const { width, height } = card.getBoundingClientRect();
  const [right, left] = [node.right - area.left + GAP, node.left - area.left - GAP - width];
  const beside = right + width + GAP <= area.width ? right : left >= SIDEBAR ? left : null;
  const x = beside ?? Math.min(mark.left - area.left, area.width - width - GAP);
  const y = beside === null ? mark.bottom - area.top + GAP : mark.top - area.top;
  card.style.left = `${Math.max(GAP, x)}px`;
  card.style.top = `${Math.max(GAP, Math.min(y, area.height - height - GAP))}px`;
}

/**
 * One finding with its remedies, for the card and for the panel.
 *
 * @param {any} finding
 * @param {{where?: boolean, onApplied?: () => void}} [options] `where`: name the node and offer to go there
 */
export function findingElement(finding, { where = false, onApplied } = {}) {
  const place = finding.node === null ? say("workflow") : `${finding.title || finding.class_type} · ${finding.node}`;
  const heading = make("h3", { "data-level": finding.level }, icon(finding.level), say(finding.level));
  if (where) heading.append(make("span", {}, place));
  const item = make("div", { class: "qw-finding", "data-level": finding.level }, heading, make("p", {}, finding.message));
  if (finding.remedies?.length) {
    const list = make("ul", { class: "qw-remedies", "aria-label": say("remedies") });
    finding.remedies.forEach((remedy) => list.append(remedyElement(remedy, onApplied)));
    item.append(list);
  }
  if (where && finding.node !== null && nodeAt(finding.node)) {
    const label = `${say("goTo")}: ${place}`;
    const go = () => goTo(finding.node);
    item.append(make("button", { class: "qw-button qw-go", type: "button", "aria-label": label, onclick: go }, say("goTo")));
  }
  return item;
}

function remedyElement(remedy, onApplied) {
  const text = remedy.text.replaceAll("`", "");
  const [action, ...reasons] = text.split(": ");
  const told = reasons.length ? [make("b", {}, action), reasons.join(": ")] : [text];
  const item = make("li", {}, make("span", {}, ...told));
  if (remedy.changes?.length) {
    const attributes = {
      class: "qw-button qw-apply",
      type: "button",
      title: say("applyTip"),
      "aria-label": `${say("apply")}: ${text}`,
      onclick: () => applyRemedy(remedy) && onApplied?.(),
    };
    item.append(make("button", attributes, say("apply")));
  }
  return item;
}

/**
 * Offload conflicts and other findings while a graph is edited.
 *
 * A change starts a timer; when the graph has rested, it is sent and the answer marked. One question is under way at a
 * time, an answer to an older graph is dropped, and a graph that was answered is not sent again. A change is seen by
 * the events that the editor has for it, and by a look at the graph's values once a second, because scripts and other
 * packs change widgets without an event.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { closeIfGone, showCard } from "./card.js";
import * as graph from "./lib/graph.js";
import { markLinks, markNodes } from "./lib/marks.js";
import { ask, NoAnswer } from "./lib/server.js";
import { say } from "./lib/words.js";
import * as panel from "./panel.js";
import { onSetting, setting } from "./settings.js";

const LOOK_MS = 1000;
export const LEVELS = ["block", "error", "warning", "note"];

/**
 * @typedef {object} Finding
 * @property {string} level
 * @property {string} code
 * @property {string | null} node path of ids, null for the workflow as a whole
 * @property {string} title
 * @property {string} class_type
 * @property {{path: (string | number)[], links: (string | number)[]}[]} links_at
 * @property {string} message
 * @property {{text: string, changes: graph.Change[]}[]} remedies
 */

/**
 * What is known: of which graph, and since when.
 *
 * @type {{status: "none" | "checking" | "done" | "failed", findings: Finding[], host: string, mode: string,
 *   reason: string, message: string, more: number}} `more` findings that the server left out
 */
const state = { status: "none", findings: [], host: "", mode: "", reason: "", message: "", more: 0 };

let answered = ""; // signature of the graph that `state` is about
let noticed = ""; // signature at the last look
let timer = 0;
/** @type {{again: () => Promise<void>} | null} the question that is under way */
let asking = null;

export const current = () => state;
export const findings = () => state.findings;

export function setup() {
  api.addEventListener("graphChanged", look);
  api.addEventListener("reconnected", startOver);
  document.addEventListener("visibilitychange", look);
  app.canvas?.canvas?.addEventListener?.("litegraph:set-graph", () => requestAnimationFrame(mark));
  setInterval(look, LOOK_MS);
  onSetting((id) => {
    if (id === "quantwire.check") startOver();
    if (id === "quantwire.check" && !setting(id)) forget();
    mark();
  });
  look();
}

/** Ask about the graph as if it had just changed. */
function startOver() {
  answered = "";
  noticed = "";
  look();
}

export function afterConfigureGraph() {
  if (state.findings.length && !answered.startsWith(`${graph.root()?.id ?? ""}\u0001`)) forget();
  look();
  mark(); // the same graph again has other node objects
}

/** Nothing is known any more. */
function forget() {
  clearTimeout(timer);
  answered = "";
  Object.assign(state, { status: "none", findings: [], reason: "", message: "", more: 0 });
  show();
}

/** See whether the graph changed; if so, check it once it rests. */
function look() {
  if (document.hidden || !graph.root()) return;
  if (!setting("quantwire.check") && !state.findings.length) return;
  const now = graph.signature();
  if (now === noticed) return;
  noticed = now;
  clearTimeout(timer);
  if (!setting("quantwire.check")) {
    forget(); // marks that nobody keeps up to date would be wrong from here on
    return;
  }
  if (now !== answered) timer = setTimeout(rested, setting("quantwire.check.delay"));
  mark(); // a marked node may be gone
}

function rested() {
  // A slider under the pointer changes without an event: not yet.
  if (graph.signature() !== noticed) return look();
  return check();
}

/**
 * Send the graph as it is now, and show the answer.
 *
 * @returns {Promise<void>} resolves when there is an answer, or a reason why there is none
 */
export async function check() {
  clearTimeout(timer);
  if (asking) return asking.again();
  let repeat = null;
  asking = { again: () => (repeat ??= deferred()).promise };
  state.status = "checking";
  panel.update();
  const of = graph.signature();
  const result = await answer();
  asking = null;
  if (repeat) {
    check().then(repeat.resolve); // asked for again meanwhile: what came is old
    return repeat.promise;
  }
  const now = graph.signature();
  if (now !== of && now === answered) {
    Object.assign(state, { status: "done" }); // undone meanwhile: what is shown holds
    return show();
  }
  if (now !== of) return setting("quantwire.check") ? look() : check();
  Object.assign(state, result);
  answered = of;
  noticed = of;
  return show();
}

/** What the server says of the graph; never throws. */
async function answer() {
  const nothing = { status: "done", findings: [], host: "", mode: "", reason: "", message: "", more: 0 };
  if (!graph.someNode(() => true)) return nothing;
  try {
    const { findings, host, mode, more } = await ask("/quantwire/check", graph.question());
    return { ...nothing, findings: sorted(findings), host, mode, more: more ?? 0 };
  } catch (err) {
    if (err instanceof NoAnswer) return { ...nothing, status: "failed", reason: err.kind, message: err.message };
    console.warn("quantwire: the workflow could not be checked:", err);
    return { ...nothing, status: "failed", reason: "failed", message: String(err) };
  }
}

/** @returns {{promise: Promise<void>, resolve: () => void}} */
function deferred() {
  let resolve;
  const promise = new Promise((done) => (resolve = done));
  return { promise, resolve };
}

const sorted = (found) => [...(found ?? [])].sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level));

// --- marks ------------------------------------------------------------------------------------------------------

function show() {
  mark();
  panel.update();
}

/** The findings that the user wants to see on the graph. */
export function marked() {
  const most = LEVELS.indexOf(setting("quantwire.check.levels"));
  return state.findings.filter((finding) => LEVELS.indexOf(finding.level) <= (most < 0 ? 2 : most));
}

function mark() {
  const byNode = new Map();
  for (const finding of marked()) {
    const at = finding.node === null ? null : graph.standIn(finding.node);
    if (!at || (!at.inside && isAnother(at.node, finding))) continue;
    const entry = byNode.get(at.node) ?? { node: at.node, found: [], inside: true };
    entry.found.push(finding);
    entry.inside &&= at.inside;
    byNode.set(at.node, entry);
  }
  markNodes("conflicts", [...byNode.values()].map(({ node, found, inside }) => nodeMark(node, found, inside)));
  markLinks([...linksOf(marked()).values()]);
  closeIfGone();
}

/** Whether a node that has the id of a finding is of another kind: of another workflow, for as long as that is new. */
const isAnother = (node, finding) =>
  Boolean(finding.class_type && node.type && ![node.comfyClass, node.type].includes(finding.class_type));

function nodeMark(node, found, inside) {
  const level = found[0].level; // sorted, worst first
  const what = inside ? say("inside", { what: say(level) }) : say(level);
  const text = found.length > 1 ? `${what} +${found.length - 1}` : what;
  const title = found.map(sentence).join("\n\n");
  const open = (element) => showCard(element, node.title ?? node.type, found);
  return { node, frame: level, chips: [{ level, text, title, open }] };
}

/** @param {Finding} finding */
const sentence = (finding) =>
  say("marked", { level: say(finding.level), title: finding.title || finding.class_type, message: finding.message });

/** The links of the shown graph that carry a finding; the worst one counts. @param {Finding[]} found */
function linksOf(found) {
  const marks = new Map();
  for (const finding of found) {
    for (const { path, links } of finding.links_at ?? [{ path: finding.path ?? [], links: finding.links ?? [] }]) {
      const holder = path.length ? graph.nodeAt(path.join(":"))?.subgraph : graph.root();
      if (holder !== graph.shown()) continue;
      for (const link of links) {
        const key = String(link);
        const before = marks.get(key);
        if (before) {
          before.found.push(finding);
          continue;
        }
        const entry = { link, level: finding.level, title: sentence(finding), found: [finding] };
        entry.open = (element) => showCard(element, finding.title || finding.class_type, entry.found);
        marks.set(key, entry);
      }
    }
  }
  return marks;
}

// --- remedies ---------------------------------------------------------------------------------------------------

/**
 * Make the changes of a remedy, and check again at once.
 *
 * @param {{text: string, changes: graph.Change[]}} remedy
 * @returns {boolean} whether it was done
 */
export function applyRemedy(remedy) {
  const lost = graph.impossible(remedy.changes);
  const old = !lost && graph.signature() !== answered;
  if (lost || old) {
    const detail = old ? say("changedMeanwhile") : say(lost.widget ? "noWidget" : "noNode", lost);
    app.extensionManager?.toast?.add?.({ severity: "warn", summary: say("notApplied"), detail, life: 8000 });
    if (old) check();
    return false;
  }
  graph.apply(remedy.changes);
  noticed = graph.signature();
  check();
  return true;
}

/** Entries of a node's context menu: one for each remedy that is a click. @param {any} node */
export function menuItems(node) {
  const found = state.findings.filter((f) => f.node !== null && graph.standIn(f.node)?.node === node);
  const entries = found.flatMap((finding) =>
    finding.remedies
      .filter((remedy) => remedy.changes?.length)
      .map((remedy) => ({ content: `quantwire: ${short(remedy)}`, callback: () => void applyRemedy(remedy) })),
  );
  return entries.length ? [null, ...entries] : [];
}

/**
 * What a remedy changes, in a line. Not its text, which quotes titles: some menus take what they show for HTML.
 *
 * @param {{changes: graph.Change[]}} remedy
 */
function short({ changes }) {
  const plain = (value) => String(value).replace(/[<>&]/g, "");
  const settings = changes.map(({ widget, value }) => `${widget} = ${value}`).join(", ");
  const nodes = [...new Set(changes.map(({ node }) => `${kindOf(node)} ${node}`))].join(", ");
  return plain(say("menuSet", { settings, nodes }));
}

/** @param {string | number} path */
const kindOf = (path) => {
  const node = graph.nodeAt(path);
  return node?.subgraph ? say("subgraph") : (node?.comfyClass ?? node?.type ?? "");
};

/**
 * Beside a widget that names a format: what the model's weights will take in it. And only the options that belong to
 * the chosen format or mode: the others are out of sight, and their values stay as they are, in the workflow's file at
 * the same place and in what is queued.
 *
 * An option with a value of its own stays in sight where it would stop the run, so that nobody has to look for it. The
 * rules come from the server (`GET /quantwire/formats`), the sizes too (`POST /quantwire/sizes`); without an answer
 * every widget is shown as the editor makes it.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import * as graph from "./lib/graph.js";
import { ask, lacks } from "./lib/server.js";
import { language, say } from "./lib/words.js";
import { onSetting, setting } from "./settings.js";

const LOOK_MS = 800; // scripts and undo change values without an event
const WAIT_MS = 1500; // for the rules, before the editor goes on
const REST_MS = 300; // that a graph must rest before the server is asked
const BETWEEN = " · ";
/** A size behind a name: what the editor offers as the old name when a user renames the widget. */
const SIZED = /(?: · (?:\S+: )?[\d.]+ [KMGTP]?i?B(?:, \d+ %)?)+$/;

/**
 * @typedef {{widget: string, in: unknown[]}} Condition
 * @typedef {{default: unknown, harmless: boolean, when: Condition[]}} Dependent
 * @typedef {{widget: string | null, depends: Record<string, Dependent>}} Rules of a node class
 * @typedef {{base_nbytes?: number, sizes?: Record<string, number>, text?: Record<string, string>,
 *   refused?: Record<string, string>, reason?: string}} Sizes of a node
 */

/** @type {Record<string, Rules> | null} */
let rules = null;
/** @type {Map<string, Sizes>} by path of ids */
let known = new Map();
let answered = ""; // what the sizes are about
let seen = "";
let timer = 0;
let asking = false;
/** Nodes whose widgets call back here. */
const watched = new WeakSet();
/**
 * What a widget has of its own, and what was last written over that.
 *
 * @type {WeakMap<any, {label?: string, tooltip?: string, wrote: {label?: string, tooltip?: string}}>}
 */
const own = new WeakMap();
/** The pack's texts by language, as the editor reads them. @type {Record<string, any> | null} */
let translations = null;

export async function setup() {
  api.addEventListener("graphChanged", look);
  api.addEventListener("reconnected", () => load().then(() => again()));
  onSetting((id) => id === "quantwire.sizes" && again());
  setInterval(look, LOOK_MS);
  // The first workflow is opened behind this; a server that is slow to answer shall not keep it.
  await Promise.race([load(), new Promise((done) => setTimeout(done, WAIT_MS))]);
  look();
}

/** @param {any} node */
export function nodeCreated(node) {
  if (!rulesOf(node)) return;
  const before = node.onConfigure;
  // Right when values were read from a file: the editor stretches a node for all widgets that it finds after that.
  node.onConfigure = function (...given) {
    const answer = before?.apply(this, given);
    fit(this, false);
    return answer;
  };
  fit(node, true);
}

/** @param {any} node whose values were read from a file */
export function loadedGraphNode(node) {
  fit(node, false);
}

export function afterConfigureGraph() {
  for (const node of ours()) fit(node, false);
  again();
}

/** What is shown, for tests and bug reports: path -> what the server said of it. */
export const sizes = () => Object.fromEntries(known);

async function load() {
  if (lacks("/quantwire/formats")) return;
  try {
    rules = (await ask("/quantwire/formats")).nodes;
    for (const node of ours()) fit(node, false);
  } catch {
    rules = null; // told of by `ask` where the server is an older one; else the server is away
  }
}

/** @param {any} node @returns {Rules | null} */
const rulesOf = (node) => rules?.[node?.comfyClass ?? node?.type] ?? null;

/** @returns {Generator<any>} every node of every graph that has rules */
function* ours() {
  for (const { node } of places()) yield node;
}

/** @returns {Generator<{node: any, path: string}>} */
function* places(holder = graph.root(), prefix = "", around = new Set()) {
  if (!holder || around.has(holder)) return;
  for (const node of holder.nodes ?? holder._nodes ?? []) {
    if (rulesOf(node)) yield { node, path: `${prefix}${node.id}` };
    if (node.subgraph) yield* places(node.subgraph, `${prefix}${node.id}:`, new Set([...around, holder]));
  }
}

/** Whether something here may have changed: cheap, for it is asked often. */
function look() {
  if (!rules) return;
  const now = [...places()]
    .map(({ node, path }) => `${path}=${(node.widgets ?? []).map((w) => String(w.value)).join("\u0002")}`)
    .join("\u0001");
  if (now !== seen) {
    seen = now;
    for (const { node } of places()) fit(node, true);
    label();
  }
  clearTimeout(timer);
  if (now && setting("quantwire.sizes")) timer = setTimeout(rested, REST_MS);
}

function again() {
  seen = "";
  answered = "";
  known = new Map(); // they were another graph's, or another server's
  label();
  look();
}

/** Ask for sizes, unless the graph is as it was. */
async function rested() {
  const of = graph.signature();
  if (asking || of === answered || lacks("/quantwire/sizes")) return;
  const wanted = [...places()].filter(({ node }) => rulesOf(node).widget).map(({ path }) => path);
  if (!wanted.length) return;
  asking = true;
  try {
    const found = await ask("/quantwire/sizes", { workflow: graph.question().workflow, nodes: wanted });
    known = new Map(Object.entries(found.nodes));
  } catch {
    known = new Map(); // no answer, no sizes: nothing that a user asked for has failed
  } finally {
    asking = false;
    answered = of;
  }
  label();
  translate();
  if (graph.signature() !== of) look();
}

// --- sizes -----------------------------------------------------------------------------------------------------------

/** Write the sizes beside the formats. */
function label() {
  for (const { node, path } of places()) {
    const widget = graph.widgetOf(node, rulesOf(node).widget ?? "");
    if (!widget) continue;
    const mine = ownOf(node, widget);
    const [text, why] = said(known.get(path), String(widget.value));
    const name = mine.label || widget.name;
    mine.wrote.label = text ? `${name}${BETWEEN}${text}` : mine.label;
    mine.wrote.tooltip = why ? `${mine.tooltip ?? declared(node, widget) ?? ""}\n\n${why}`.trim() : mine.tooltip;
    if (widget.label !== mine.wrote.label) widget.label = mine.wrote.label;
    if (widget.tooltip !== mine.wrote.tooltip) widget.tooltip = mine.wrote.tooltip;
  }
  app.canvas?.setDirty?.(true, true);
}

/** Label and tooltip without what was written here; a user may have renamed the widget since. */
function ownOf(node, widget) {
  const mine = own.get(widget) ?? { wrote: {} };
  own.set(widget, mine);
  if (widget.label !== mine.wrote.label) mine.label = plain(widget.label);
  if (widget.tooltip !== mine.wrote.tooltip) mine.tooltip = widget.tooltip;
  // Where a new name is kept in the workflow's file.
  const slot = (node.inputs ?? []).find((input) => input.widget?.name === widget.name);
  if (slot?.label && plain(slot.label) !== slot.label) slot.label = plain(slot.label);
  return mine;
}

/** A label without a size. @param {string | undefined} text */
function plain(text) {
  if (typeof text !== "string") return text;
  const refused = `${BETWEEN}${say("sizeRefused")}`;
  return text.endsWith(refused) ? text.slice(0, -refused.length) : text.replace(SIZED, "");
}

/** The tooltip of the node's definition, which the editor shows, translated, where the widget has none of its own. */
function declared(node, widget) {
  const name = node.comfyClass ?? node.type;
  const translated = translations?.[language()]?.nodeDefs?.[name]?.inputs?.[widget.name]?.tooltip;
  if (translated) return translated;
  const inputs = node.constructor?.nodeData?.input ?? {};
  return (inputs.required?.[widget.name] ?? inputs.optional?.[widget.name])?.[1]?.tooltip;
}

/** Read the translations once; a language without any has English. */
async function translate() {
  if (translations || language() === "en") return;
  translations = {};
  try {
    const answer = await api.fetchApi("/i18n");
    if (answer.ok) translations = await answer.json();
  } catch {
    return; // the server is away, and English is read by everybody who can choose a format
  }
  label();
}

/** @param {Sizes | undefined} found @param {string} format @returns {[string, string]} text, and what it means */
function said(found, format) {
  if (!found || !setting("quantwire.sizes")) return ["", ""];
  if (found.reason) return ["", say("sizeUnknown", { reason: found.reason })];
  if (found.text?.[format]) return [found.text[format], say("sizeMeans", { size: found.text[format] })];
  if (found.refused?.[format]) return [say("sizeRefused"), found.refused[format]];
  return ["", ""];
}

// --- options ---------------------------------------------------------------------------------------------------------

/**
 * Show the widgets that have an effect.
 *
 * @param {any} node
 * @param {boolean} resize whether its height follows; a node from a file has its height from there
 */
function fit(node, resize) {
  const found = rulesOf(node);
  if (!found || !node.widgets) return;
  watch(node, found);
  const changed = Object.entries(found.depends).filter(([name, dependent]) => {
    const widget = graph.widgetOf(node, name);
    const hide = Boolean(widget) && !applies(node, widget, dependent);
    if (!widget || hide === isHidden(widget)) return false;
    return true;
  });
  if (!changed.length) return;
  const before = resize ? node.computeSize?.()[1] : 0;
  for (const [name] of changed) {
    const widget = graph.widgetOf(node, name);
    setHidden(node, widget, !isHidden(widget));
  }
  if (resize && before) {
    const least = node.computeSize()[1];
    node.setSize?.([node.size[0], Math.max(least, node.size[1] + least - before)]);
  }
  node.setDirtyCanvas?.(true, true);
}

/** @param {any} node @param {any} widget @param {Dependent} dependent */
function applies(node, widget, dependent) {
  if (!dependent.harmless && widget.value !== dependent.default) return true;
  const slots = [widget.name, ...dependent.when.map((condition) => condition.widget)];
  // What a link brings is known when the graph runs.
  if ((node.inputs ?? []).some((slot) => slot.link != null && slots.includes(slot.widget?.name))) return true;
  return dependent.when.every((condition) => {
    const by = graph.widgetOf(node, condition.widget);
    return !by || condition.in.includes(by.value);
  });
}

const isHidden = (widget) => widget.hidden === true;

/** Canvas nodes look at the widget, Vue nodes at its options. */
function setHidden(node, widget, hidden) {
  widget.hidden = hidden;
  if (widget.options) widget.options.hidden = hidden;
}

/** Look again as soon as one of the widgets that decide was changed. @param {any} node @param {Rules} found */
function watch(node, found) {
  if (watched.has(node)) return;
  watched.add(node);
  const deciding = new Set([found.widget, ...Object.values(found.depends).flatMap((d) => d.when.map((c) => c.widget))]);
  for (const widget of node.widgets.filter((w) => deciding.has(w.name) || w.name in found.depends)) {
    const before = widget.callback;
    widget.callback = function (...given) {
      const answer = before?.apply(this, given);
      look(); // now: older Vue nodes see that a widget was hidden only while they take in its new value
      return answer;
    };
  }
}

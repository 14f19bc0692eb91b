/**
 * Badges after a run: what quantizing did to the size, and what it kept of the quality, on the node that did it.
 *
 * An `executed` message says that there are numbers, but not for which of the open workflows, nor for which values: a
 * run may have waited long in the queue. So both are read from the history when the run has ended, as after a reload of
 * the page. A node whose own values have changed since keeps its badge, dimmed: it tells of a run that was, and not of
 * what the next one will give.
 */
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import * as graph from "./lib/graph.js";
import { markNodes } from "./lib/marks.js";
import { say } from "./lib/words.js";
import { onSetting, setting } from "./settings.js";

const WAITS_MS = [50, 150, 400, 1000, 3000];
const LATEST = 8; // runs of the history that are looked through
const MOST = 1000; // badges kept of all workflows that were open

/**
 * @typedef {object} Numbers of a report
 * @property {number} [nbytes_before]
 * @property {number} [nbytes_after]
 * @property {number | null} [sqnr_db]
 * @property {string | null} [verdict]
 *
 * @typedef {object} Badge
 * @property {string} workflow id of the workflow
 * @property {string} node path of ids
 * @property {string} kind class of the node
 * @property {Numbers} numbers
 * @property {Record<string, unknown>} values of the node's widgets when it ran
 */

/** @type {Map<string, Badge>} by workflow and node */
const known = new Map();
/** @type {Set<string>} workflows whose history was read */
const read = new Set();
/** @type {Set<string>} runs under way that made a report */
const reporting = new Set();

const workflow = () => String(graph.root()?.id ?? "");

export function setup() {
  api.addEventListener("executed", ({ detail }) => detail?.output?.quantwire && reporting.add(detail.prompt_id));
  for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(end, ({ detail }) => reporting.delete(detail?.prompt_id) && ended(detail.prompt_id));
  }
  api.addEventListener("graphChanged", mark);
  app.canvas?.canvas?.addEventListener?.("litegraph:set-graph", () => requestAnimationFrame(mark));
  onSetting((id) => id === "quantwire.badges" && afterConfigureGraph());
  afterConfigureGraph();
}

export function afterConfigureGraph() {
  mark();
  fromHistory();
}

/** What is shown, for tests and bug reports. */
export const badges = () =>
  [...known.values()]
    .filter((badge) => badge.workflow === workflow() && chipOf(badge))
    .map((badge) => ({ node: badge.node, ...badge.numbers, stale: isStale(badge) }));

/** @param {Badge} badge */
function keep(badge) {
  const key = `${badge.workflow} ${badge.node}`;
  known.delete(key); // the newest stands last
  known.set(key, badge);
  for (const old of known.keys()) {
    if (known.size <= MOST) break;
    known.delete(old);
  }
}

/** @param {string} path */
function valuesOf(path) {
  const widgets = graph.nodeAt(path)?.widgets ?? [];
  return Object.fromEntries(widgets.map((widget) => [widget.name, widget.value]));
}

/** @param {Badge} badge */
function isStale(badge) {
  const now = valuesOf(badge.node);
  return Object.entries(badge.values).some(([name, value]) => name in now && String(now[name]) !== String(value));
}

/** Runs of the history, oldest first; none where the server has no history: nothing that was asked for has failed. */
async function history(path) {
  try {
    const answer = await api.fetchApi(path);
    const runs = answer.ok ? Object.values(await answer.json()) : [];
    return runs.sort((a, b) => a.prompt?.[0] - b.prompt?.[0]);
  } catch {
    return [];
  }
}

/** @param {string} id of a prompt; its end is told before it stands in the history */
async function ended(id) {
  for (const wait_ms of WAITS_MS) {
    await new Promise((done) => setTimeout(done, wait_ms));
    const runs = await history(`/history/${id}`);
    runs.forEach((run) => keepRun(run));
    if (runs.length) break;
  }
  mark();
}

/** After a reload of the page. */
async function fromHistory() {
  const id = workflow();
  const made = (node) => (node.outputs ?? []).some((output) => output.type === "REPORT");
  if (!id || read.has(id) || !setting("quantwire.badges") || !graph.someNode(made)) return;
  read.add(id);
  const fresh = new Set(known.keys());
  const runs = await history(`/history?max_items=${LATEST}`);
  runs.forEach((run) => keepRun(run, id, fresh));
  mark();
}

/** @param {any} run @param {string} [only] this workflow @param {Set<string>} [but] badges that are newer */
function keepRun({ prompt, outputs }, only, but) {
  const of = prompt?.[3]?.extra_pnginfo?.workflow?.id;
  if (!of || (typeof only === "string" && of !== only)) return;
  for (const [node, output] of Object.entries(outputs ?? {})) {
    const numbers = Array.isArray(output?.quantwire) ? output.quantwire[0] : null;
    const sent = prompt[2]?.[node];
    if (!numbers || !sent || but?.has?.(`${of} ${node}`)) continue;
    keep({ workflow: String(of), node, kind: sent.class_type, numbers, values: literals(sent.inputs) });
  }
}

/** The inputs that are values and not links. @param {Record<string, unknown>} inputs */
const literals = (inputs) => Object.fromEntries(Object.entries(inputs ?? {}).filter(([, value]) => !Array.isArray(value)));

function mark() {
  if (!setting("quantwire.badges")) return markNodes("badges", []);
  const marks = [];
  for (const badge of known.values()) {
    const at = badge.workflow === workflow() ? graph.standIn(badge.node) : null;
    const same = at && !at.inside && (at.node.comfyClass ?? at.node.type) === badge.kind;
    const chip = same ? chipOf(badge) : null;
    if (chip) marks.push({ node: at.node, frame: null, chips: [chip] });
  }
  return markNodes("badges", marks);
}

/** @param {Badge} badge */
function chipOf(badge) {
  const { nbytes_before: before, nbytes_after: after, sqnr_db: db, verdict } = badge.numbers;
  const size = sizes(before, after);
  const quality = typeof db === "number" && Number.isFinite(db) ? `${db.toFixed(1)} dB` : "";
  const text = size || (verdict ?? "");
  if (!text && !quality) return null;
  const stale = isStale(badge);
  const told = [
    size && `${say("weights")}: ${size}${before && after ? ` (${Math.round((100 * after) / before)} %)` : ""}.`,
    quality && `${say("quality")}: ${say("sqnr", { db: db.toFixed(1) })}.`,
    verdict,
    stale && say("stale"),
  ];
  const title = told.filter(Boolean).join(" ");
  return { level: "badge", text: text && quality ? `${text} · ` : text, strong: quality, title, stale };
}

/** `6.7 → 1.9 GiB`, or one size where there is no other. */
function sizes(before, after) {
  if (!(after > 0)) return "";
  if (!(before > 0) || before === after) return inUnits(after).join(" ");
  const [from, to] = [inUnits(before), inUnits(after)];
  return from[1] === to[1] ? `${from[0]} → ${to.join(" ")}` : `${from.join(" ")} → ${to.join(" ")}`;
}

/** @param {number} nbytes @returns {[string, string]} */
function inUnits(nbytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(nbytes) / 10)));
  const value = nbytes / 1024 ** power;
  return [value.toFixed(power && value < 100 ? 1 : 0), units[power]];
}

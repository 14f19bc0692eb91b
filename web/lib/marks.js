/**
 * Marks over the graph: a frame and chips on a node, a dot and a halo on a link.
 *
 * They are HTML over the canvas rather than drawings in it, for three reasons: they are real buttons with names for
 * screen readers and a place in the tab order, they look the same whether nodes are drawn or are HTML themselves, and
 * no node object of this or another pack is touched. The halo alone is drawn, below the link, so that the link keeps
 * the colour of its type. A frame's work is a few numbers compared per marked node; without marks there is none.
 */
import { app } from "../../../scripts/app.js";
import { linkOf, shown } from "./graph.js";
import { addStyle, icon, make } from "./style.js";

/**
 * @typedef {object} Chip
 * @property {string} level block, error, warning, note or badge
 * @property {string} text
 * @property {string} title tooltip, and name for screen readers
 * @property {string} [strong] the part of the text that matters most, shown last
 * @property {boolean} [stale]
 * @property {(element: HTMLElement) => void} [open]
 *
 * @typedef {object} NodeMark
 * @property {any} node
 * @property {string | null} frame level of the frame
 * @property {Chip[]} chips
 *
 * @typedef {object} LinkMark
 * @property {number | string} link id in the shown graph
 * @property {string} level
 * @property {string} title
 * @property {(element: HTMLElement) => void} open
 */

const SMALLEST = 0.62; // of its size on the screen, so that a chip can be read and hit at any zoom
const FAR = 0.34; // below this zoom a chip is its sign alone

/** @type {Map<string, {mark: NodeMark[], signature: string, frame: HTMLElement | null, row: HTMLElement, at: string}>} */
let onNodes = new Map();
/** @type {Map<string, {mark: LinkMark, signature: string, dot: HTMLElement, at: string}>} */
let onLinks = new Map();
/** @type {Map<string, NodeMark[]>} */
const nodeMarks = new Map();
/** @type {LinkMark[]} */
let linkMarks = [];
let layer = null;
let plane = null;
let running = 0;
let seen = "";

/** The element that marks are put in, over the canvas and below the editor's own panels. */
export function surface() {
  if (layer?.isConnected) return layer;
  const holder = app.canvas?.canvas?.parentElement;
  if (!holder) return null;
  addStyle();
  plane = make("div", { class: "qw-plane" });
  layer = make("div", { class: "qw qw-layer" }, plane);
  // A chip shall not stop the wheel from zooming.
  layer.addEventListener("wheel", (event) => {
    if (event.target.closest(".qw-card")) return;
    event.preventDefault();
    app.canvas.canvas.dispatchEvent(new WheelEvent("wheel", event));
  });
  holder.append(layer);
  onNodes = new Map();
  onLinks = new Map();
  seen = "";
  return layer;
}

/**
 * Set the marks of one owner on nodes; those of other owners stay.
 *
 * @param {string} owner
 * @param {NodeMark[]} marks nodes of the shown graph
 */
export function markNodes(owner, marks) {
  nodeMarks.set(owner, marks);
  refresh();
}

/** @param {LinkMark[]} marks links of the shown graph */
export function markLinks(marks) {
  linkMarks = marks;
  drawHalos();
  refresh();
}

function refresh() {
  if (!surface()) return;
  const nodes = new Map();
  for (const mark of [...nodeMarks.values()].flat()) {
    const key = String(mark.node.id);
    nodes.set(key, [...(nodes.get(key) ?? []), mark]);
  }
  sync(onNodes, nodes, signatureOfNode, makeNode, (entry) => [entry.frame, entry.row]);
  const links = new Map(linkMarks.map((mark) => [String(mark.link), mark]));
  sync(onLinks, links, (mark) => `${mark.level} ${mark.title}`, makeLink, (entry) => [entry.dot]);
  if (!running && (onNodes.size || onLinks.size)) running = requestAnimationFrame(place);
  app.canvas?.setDirty?.(false, true);
}

/** Make, remake and remove elements, and leave alone what did not change: a button keeps its focus. */
function sync(present, wanted, signatureOf, makeOne, elementsOf) {
  for (const [key, entry] of present) {
    const mark = wanted.get(key);
    if (mark && entry.signature === signatureOf(mark)) {
      entry.mark = mark;
    } else {
      elementsOf(entry).forEach((element) => element?.remove());
      present.delete(key);
    }
  }
  for (const [key, mark] of wanted) {
    if (present.has(key)) continue;
    const entry = { mark, signature: signatureOf(mark), at: "", ...makeOne(mark, () => present.get(key)?.mark) };
    elementsOf(entry).forEach((element) => element && plane.append(element));
    present.set(key, entry);
  }
}

const signatureOfNode = (marks) =>
  JSON.stringify(marks.map((mark) => [mark.frame, mark.chips.map((c) => [c.level, c.text, c.title, c.strong, c.stale])]));

function makeNode(marks, current) {
  const level = marks.find((mark) => mark.frame)?.frame;
  const chips = marks.flatMap((mark, i) => mark.chips.map((chip, k) => makeChip(chip, () => current()?.[i]?.chips[k])));
  const frame = level ? make("div", { class: "qw-frame", "data-level": level }) : null;
  for (const chip of chips) chip.quantwireFrame = frame; // what a card is put beside
  return { frame, row: make("div", { class: "qw-row" }, ...chips) };
}

/** @param {Chip} chip @param {() => Chip | undefined} current */
function makeChip(chip, current) {
  const text = make("span", {}, chip.text, chip.strong ? make("b", {}, chip.strong) : null);
  const attributes = {
    class: chip.stale ? "qw-chip qw-stale" : "qw-chip",
    "data-level": chip.level,
    title: chip.title,
    "aria-label": chip.title,
  };
  if (!chip.open) return make("div", { ...attributes, role: "note" }, text);
  const open = (event) => current()?.open(event.currentTarget);
  return make("button", { ...attributes, type: "button", "aria-haspopup": "dialog", onclick: open }, icon(chip.level), text);
}

function makeLink(mark, current) {
  const attributes = {
    class: "qw-dot",
    type: "button",
    "data-level": mark.level,
    title: mark.title,
    "aria-label": mark.title,
    "aria-haspopup": "dialog",
    onclick: (event) => current()?.open(event.currentTarget),
  };
  return { dot: make("button", attributes, icon(mark.level)) };
}

// --- where they are ---------------------------------------------------------------------------------------------

function place() {
  running = 0;
  const canvas = app.canvas;
  if (!layer?.isConnected || !(onNodes.size || onLinks.size)) return;
  const { scale, offset } = canvas.ds;
  const at = `scale(${scale}) translate(${offset[0]}px, ${offset[1]}px)`;
  const grow = Math.max(1, SMALLEST / scale);
  if (at !== seen) {
    seen = at;
    plane.style.transform = at;
    plane.classList.toggle("qw-far", scale < FAR);
  }
  for (const entry of onNodes.values()) placeNode(entry, grow);
  for (const entry of onLinks.values()) placeLink(entry, grow);
  running = requestAnimationFrame(place);
}

const LOOK_AT_SIZE = 15; // frames

/**
 * Where a node is. One that is HTML may be taller than the graph has it, for as long as the graph was not told.
 *
 * @param {any} node
 * @param {{html?: HTMLElement | null, since?: number, tall?: number}} entry
 * @returns {[number, number, number, number]} x, y, width and height with the title
 */
function boundsOf(node, entry) {
  const [x, y, width, height] = graphBounds(node);
  entry.since = (entry.since ?? 0) - 1;
  if (entry.since <= 0) {
    entry.since = LOOK_AT_SIZE;
    if (!entry.html?.isConnected) entry.html = document.querySelector(`.lg-node[data-node-id="${CSS.escape(node.id)}"]`);
    entry.tall = entry.html?.offsetHeight ?? 0;
  }
  return [x, y, width, entry.tall || height];
}

/** @param {any} node */
function graphBounds(node) {
  const bounds = node.boundingRect;
  if (bounds && bounds[2] > 0) return [bounds[0], bounds[1], bounds[2], bounds[3]];
  const title = window.LiteGraph?.NODE_TITLE_HEIGHT ?? 30;
  return [node.pos[0], node.pos[1] - title, node.size[0], node.size[1] + title];
}

function placeNode(entry, grow) {
  const { node } = entry.mark[0];
  const gone = node.graph !== shown();
  const [x, y, width, height] = gone ? [0, 0, 0, 0] : boundsOf(node, entry);
  const at = `${gone} ${x} ${y} ${width} ${height} ${grow}`;
  if (at === entry.at) return;
  entry.at = at;
  entry.row.style.display = gone ? "none" : "";
  entry.row.style.transform = `translate(${x}px, ${y - 28}px) scale(${grow})`;
  if (!entry.frame) return;
  entry.frame.style.display = gone ? "none" : "";
  entry.frame.style.transform = `translate(${x - 3}px, ${y - 3}px)`;
  entry.frame.style.width = `${width + 6}px`;
  entry.frame.style.height = `${height + 6}px`;
}

const hidden = () => app.canvas?.links_render_mode === (window.LiteGraph?.HIDDEN_LINK ?? -1);

function placeLink(entry, grow) {
  const link = linkOf(shown(), entry.mark.link);
  const middle = hidden() ? null : link?._pos;
  const at = middle ? `${middle[0]} ${middle[1]} ${grow}` : "";
  if (at === entry.at && entry.dot.style.transform) return;
  entry.at = at;
  entry.dot.style.display = middle ? "" : "none";
  if (middle) entry.dot.style.transform = `translate(${middle[0]}px, ${middle[1]}px) scale(${grow})`;
}

// --- the halo of a link -----------------------------------------------------------------------------------------

let haloed = null;

/** Draw below the links from now on, after whatever else draws there. */
function drawHalos() {
  const canvas = app.canvas;
  if (!canvas || haloed === canvas || !linkMarks.length) return;
  haloed = canvas;
  const before = canvas.onDrawBackground;
  canvas.onDrawBackground = function (context, area) {
    before?.call(this, context, area);
    if (linkMarks.length && !hidden()) paint(context);
  };
}

/** @param {CanvasRenderingContext2D} context in the graph's coordinates */
function paint(context) {
  const graph = shown();
  const colours = getComputedStyle(layer);
  context.save();
  context.lineCap = "round";
  context.lineWidth = 11;
  context.globalAlpha = 0.4;
  for (const mark of linkMarks) {
    context.strokeStyle = colours.getPropertyValue(`--qw-${mark.level}`).trim() || "#ff8a85";
    for (const path of pathsOf(graph, linkOf(graph, mark.link))) context.stroke(path);
  }
  context.restore();
}

/** The drawn curves of a link: its last part, and one to each reroute on it. */
function pathsOf(graph, link) {
  const paths = link?.path ? [link.path] : [];
  const seenReroutes = new Set();
  let id = link?.parentId;
  while (id !== undefined && id !== null && !seenReroutes.has(id)) {
    seenReroutes.add(id);
    const reroute = graph.reroutes?.get?.(id);
    if (reroute?.path) paths.push(reroute.path);
    id = reroute?.parentId;
  }
  return paths;
}

/**
 * The graph of the editor, read and changed: paths through subgraphs, what a check depends on, changes with undo.
 * A path is the id that a node has when the graph is queued: `7`, or `12:3` for node 3 in the subgraph node 12.
 */
import { app } from "../../../scripts/app.js";

/** @typedef {{node: string | number, widget: string, value: unknown}} Change */

/** The outermost graph; undefined before the editor has one. (`app.rootGraph` writes an error to the console then.) */
export const root = () => app.graph;
export const shown = () => app.canvas?.graph ?? root();
const NEVER = 2;
const BYPASS = 4;
const idOf = (id) => (/^-?\d+$/.test(String(id)) ? Number(id) : id);

/** @param {any} graph @param {string | number} id */
const nodeOf = (graph, id) => graph?.getNodeById?.(idOf(id)) ?? graph?.getNodeById?.(String(id)) ?? null;

/**
 * The nodes on a path, from the outermost subgraph node to the node itself; empty when one of them is gone.
 *
 * @param {string | number} path
 * @returns {any[]}
 */
export function chain(path) {
  const found = [];
  let graph = root();
  for (const id of String(path).split(":")) {
    const node = nodeOf(graph, id);
    if (!node) return [];
    found.push(node);
    graph = node.subgraph;
  }
  return found;
}

/** @param {string | number} path */
export const nodeAt = (path) => chain(path).at(-1) ?? null;

/**
 * The node of the shown graph that stands for a path: the node, or the subgraph node that holds it.
 *
 * @param {string | number} path
 * @returns {{node: any, inside: boolean} | null}
 */
export function standIn(path) {
  const nodes = chain(path);
  for (let k = nodes.length - 1; k >= 0; k--) {
    if (nodes[k].graph === shown()) return { node: nodes[k], inside: k < nodes.length - 1 };
  }
  return null;
}

/** @param {any} graph @param {number | string} id */
export function linkOf(graph, id) {
  const links = graph?.links;
  return links?.get?.(idOf(id)) ?? links?.[id] ?? null;
}

/** Every graph once: the workflow, and each subgraph that a node of it stands for. */
function* graphs() {
  const seen = new Set([root()]);
  for (const graph of seen) {
    yield graph;
    for (const node of graph?.nodes ?? graph?._nodes ?? []) {
      if (node.subgraph) seen.add(node.subgraph); // grows while it is read
    }
  }
}

/** @param {(node: any) => boolean} test */
export function someNode(test) {
  for (const graph of graphs()) {
    if ((graph?.nodes ?? graph?._nodes ?? []).some(test)) return true;
  }
  return false;
}

/**
 * The workflow as the editor saves it, and the ids of the nodes that it would send: those of its own kinds, which no
 * server knows, are not among them. `graphToPrompt` would tell too, but it makes widgets upload what they hold.
 *
 * @returns {{workflow: any, prompt: Record<string, {class_type: string}>}}
 */
export function question() {
  const prompt = {};
  const walk = (graph, prefix) => {
    for (const node of graph?.nodes ?? graph?._nodes ?? []) {
      if (node.mode === NEVER || node.mode === BYPASS) continue;
      // A subgraph's node counts as virtual, for it is not sent; what is inside is.
      if (node.subgraph) walk(node.subgraph, `${prefix}${node.id}:`);
      else if (!node.isVirtualNode) prompt[`${prefix}${node.id}`] = { class_type: node.comfyClass ?? node.type };
    }
  };
  walk(root(), "");
  return { workflow: root().serialize(), prompt };
}

/**
 * What a check depends on, as text: nodes, modes, titles, values and links, but no place, size or colour.
 * Reads no deprecated field, so that it is silent in every front end.
 */
export function signature() {
  const parts = [root()?.id ?? ""];
  for (const graph of graphs()) {
    for (const node of graph?.nodes ?? graph?._nodes ?? []) {
      parts.push(node.id, node.type, node.mode ?? 0, node.title ?? "");
      for (const widget of node.widgets ?? []) parts.push(widget.name, plain(widget.value));
    }
    for (const link of graph?.links?.values?.() ?? Object.values(graph?.links ?? {})) {
      parts.push(link.id, link.origin_id, link.origin_slot, link.target_id, link.target_slot);
    }
    parts.push("|");
  }
  return parts.join("\u0001");
}

/** @param {unknown} value */
function plain(value) {
  if (value === null || typeof value !== "object") return String(value);
  try {
    return JSON.stringify(value);
  } catch {
    return "object"; // some packs keep elements or whole objects in a widget
  }
}

/** @param {any} node @param {string} name */
export const widgetOf = (node, name) => (node?.widgets ?? []).find((widget) => widget.name === name) ?? null;

/**
 * Which of these changes cannot be made.
 *
 * @param {Change[]} changes
 * @returns {{node: string | number, widget?: string} | null} the first of them
 */
export function impossible(changes) {
  for (const { node, widget } of changes) {
    const found = nodeAt(node);
    if (!found) return { node };
    if (!widgetOf(found, widget)) return { node, widget };
  }
  return null;
}

/**
 * Make changes as one step of undo. Nothing is changed unless all of them can be made.
 *
 * @param {Change[]} changes
 */
export function apply(changes) {
  const graph = shown();
  app.canvas?.emitBeforeChange?.();
  graph?.beforeChange?.();
  for (const { node: path, widget: name, value } of changes) {
    const node = nodeAt(path);
    const widget = widgetOf(node, name);
    const old = widget.value;
    widget.value = value;
    widget.callback?.(value, app.canvas, node, node.pos, undefined);
    node.onWidgetChanged?.(name, value, old, widget);
  }
  graph?.afterChange?.();
  app.canvas?.emitAfterChange?.();
  app.canvas?.setDirty?.(true, true);
}

/**
 * Show a node in the middle, in its own graph, and select it.
 *
 * @param {string | number} path
 */
export function goTo(path) {
  const nodes = chain(path);
  const node = nodes.at(-1);
  const canvas = app.canvas;
  if (!node || !canvas) return;
  if (canvas.graph !== node.graph) {
    if (canvas.graph !== root()) canvas.setGraph?.(root());
    for (const holder of nodes.slice(0, -1)) canvas.openSubgraph?.(holder.subgraph, holder);
  }
  // The graph that was opened is drawn before a place in it can be shown.
  requestAnimationFrame(() => {
    canvas.centerOnNode?.(node);
    canvas.deselectAll?.();
    (canvas.select ?? canvas.selectNode)?.call(canvas, node);
    canvas.setDirty?.(true, true);
  });
}

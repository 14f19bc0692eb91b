/**
 * The pack's routes on the server. A server without them (the pack was updated and the server not yet restarted) is
 * told of once in the console and then left alone; a server that is away is asked again at the next change.
 */
import { api } from "../../../scripts/api.js";

/** Why there is no answer: "no-route", "offline", "aborted", or "refused" with the server's reason as message. */
export class NoAnswer extends Error {
  /** @param {string} kind @param {string} message */
  constructor(kind, message) {
    super(message);
    this.name = "NoAnswer";
    this.kind = kind;
  }
}

/** @type {Set<string>} routes that this server lacks */
const missing = new Set();

/** A server that came back may be another one. */
api.addEventListener("reconnected", () => missing.clear());

/** @param {string} path */
export const lacks = (path) => missing.has(path.split("?")[0]);

/**
 * Ask one of the pack's routes: GET, or POST with a body.
 *
 * @param {string} path such as `/quantwire/check`
 * @param {unknown} [body] sent as JSON
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>} the JSON that came
 * @throws {NoAnswer}
 */
export async function ask(path, body, signal) {
  if (lacks(path)) throw new NoAnswer("no-route", path);
  const options = { cache: "no-store", signal };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await api.fetchApi(path, options);
  } catch (err) {
    throw new NoAnswer(signal?.aborted ? "aborted" : "offline", String(err));
  }
  const found = await answer.json().catch(() => null);
  if (answer.ok && found !== null) return found;
  if (found?.error) throw new NoAnswer("refused", String(found.error.message ?? found.error));
  // ComfyUI answers an unknown POST with 405, for its static files take GET under any path.
  if (answer.status === 404 || answer.status === 405) {
    missing.add(path.split("?")[0]);
    console.warn(`quantwire: this server has no ${path.split("?")[0]}; restart it to load the installed version.`);
    throw new NoAnswer("no-route", path);
  }
  throw new NoAnswer("refused", `${path}: ${answer.status} ${answer.statusText}`.trim());
}

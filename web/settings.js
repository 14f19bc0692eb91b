/** The pack's settings: their ids, defaults and values. Shown by the editor under "quantwire". */
import { app } from "../../scripts/app.js";
import { say } from "./lib/words.js";

export const DEFAULTS = Object.freeze({
  "quantwire.check": true,
  "quantwire.check.delay": 400,
  "quantwire.check.levels": "warning",
  "quantwire.sizes": true,
  "quantwire.badges": true,
});

/** @type {Set<(id: string) => void>} */
const listeners = new Set();

/** Call back whenever a setting of the pack changes. @param {(id: string) => void} listener */
export const onSetting = (listener) => listeners.add(listener);

/** A setting that is changing: an older editor tells of it before it gives the new value. */
let changing = null;

/** @param {string} id @param {unknown} value */
function changed(id, value) {
  changing = { id, value: value ?? DEFAULTS[id] };
  try {
    listeners.forEach((listener) => listener(id));
  } finally {
    changing = null;
  }
}

/** @param {keyof typeof DEFAULTS} id */
export function setting(id) {
  if (changing?.id === id) return changing.value;
  return app.extensionManager?.setting?.get?.(id) ?? DEFAULTS[id];
}

/** @param {string} id @param {string} group @param {string} words @param {object} more */
function entry(id, group, words, more) {
  return {
    id,
    name: say(words),
    tooltip: say(`${words}Tip`),
    category: ["quantwire", say(group), id],
    defaultValue: DEFAULTS[id],
    onChange: (value) => changed(id, value),
    ...more,
  };
}

/** For registerExtension; made when it is called, because the words depend on the language. The editor sorts a group
 * by `sortOrder`, highest first. */
export function settings() {
  const levels = ["block", "error", "warning", "note"].map((level) => ({
    value: level,
    text: say(`level${level[0].toUpperCase()}${level.slice(1)}`),
  }));
  return [
    entry("quantwire.check", "groupCheck", "setCheck", { type: "boolean", sortOrder: 30 }),
    entry("quantwire.check.levels", "groupCheck", "setLevels", { type: "combo", options: levels, sortOrder: 20 }),
    entry("quantwire.check.delay", "groupCheck", "setDelay", {
      type: "slider",
      attrs: { min: 100, max: 3000, step: 100 },
      sortOrder: 10,
    }),
    entry("quantwire.sizes", "groupShown", "setSizes", { type: "boolean", sortOrder: 20 }),
    entry("quantwire.badges", "groupShown", "setBadges", { type: "boolean", sortOrder: 10 }),
  ];
}

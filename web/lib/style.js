/**
 * The look of the marks, the card and the panel. Surfaces and text take the colours of the editor's theme; the four
 * level colours have a contrast of at least 4.5 to the surface in the dark and in the light themes.
 */

const STYLE = `
.qw {
  --qw-block: #c92a2a; --qw-error: #b3440c; --qw-warning: #8a5a00; --qw-note: #2b63b0; --qw-good: #1c7c3c;
  --qw-surface: var(--comfy-menu-bg, #fff); --qw-text: var(--fg-color, #222); --qw-soft: color-mix(in srgb, var(--qw-text) 74%, var(--qw-surface));
  --qw-line: var(--border-color, #ddd); --qw-raised: var(--comfy-input-bg, #eee);
}
.qw-dark .qw {
  --qw-block: #ff8a85; --qw-error: #ffa06b; --qw-warning: #f2c14e; --qw-note: #8ab8ff; --qw-good: #79d694;
}
.qw[data-level], .qw [data-level] { --qw-level: var(--qw-note); }
.qw [data-level="block"] { --qw-level: var(--qw-block); }
.qw [data-level="error"] { --qw-level: var(--qw-error); }
.qw [data-level="warning"] { --qw-level: var(--qw-warning); }
.qw [data-level="badge"] { --qw-level: var(--qw-line); }
.qw button { font: inherit; color: inherit; cursor: pointer; }
.qw button:focus-visible { outline: 2px solid var(--qw-note); outline-offset: 2px; }
.qw-icon { flex: none; width: 1em; height: 1em; color: var(--qw-level); }

.qw-layer { position: absolute; inset: 0; overflow: hidden; pointer-events: none; z-index: 20; }
.qw-plane { position: absolute; left: 0; top: 0; transform-origin: 0 0; }
.qw-frame, .qw-row, .qw-dot { position: absolute; left: 0; top: 0; }
.qw-frame { border: 2px solid var(--qw-level); border-radius: 10px; opacity: .75; box-sizing: border-box; }
.qw-row { display: flex; gap: 6px; transform-origin: 0 100%; }
.qw-chip {
  pointer-events: auto; display: inline-flex; align-items: center; gap: 6px; height: 22px; padding: 0 9px 0 7px;
  border: 1px solid var(--qw-level); border-radius: 11px; background: var(--qw-surface); color: var(--qw-text);
  font: 500 12px/1 Inter, system-ui, sans-serif; white-space: nowrap; box-sizing: border-box;
}
.qw button.qw-chip { font: 500 12px/1 Inter, system-ui, sans-serif; }
.qw-chip:hover { background: var(--qw-raised); }
.qw-chip[data-level="badge"] { color: var(--qw-text); cursor: default; }
.qw-chip[data-level="badge"] b { color: var(--qw-good); font-weight: 600; }
.qw-chip > span { max-width: 280px; overflow: hidden; text-overflow: ellipsis; line-height: 20px; }
.qw-chip.qw-stale { opacity: .6; }
.qw-chip.qw-stale b { color: inherit; }
.qw-far .qw-chip { padding: 0 4px; }
.qw-far .qw-chip > span { display: none; }
.qw-far .qw-chip[data-level="badge"] { display: none; }
.qw-dot {
  pointer-events: auto; width: 22px; height: 22px; margin: -11px 0 0 -11px; padding: 0; display: grid;
  place-items: center; border: 1px solid var(--qw-level); border-radius: 50%; background: var(--qw-surface);
  font-size: 13px; box-sizing: border-box;
}
.qw-dot:hover { background: var(--qw-raised); }

.qw-card {
  position: absolute; z-index: 21; pointer-events: auto; width: 340px; max-width: calc(100% - 16px);
  max-height: calc(100% - 16px); overflow: auto; box-sizing: border-box; padding: 12px 14px 12px;
  border: 1px solid var(--qw-line); border-radius: 10px; background: var(--qw-surface); color: var(--qw-text);
  box-shadow: 0 8px 28px rgb(0 0 0 / 35%); font: 400 13px/1.45 Inter, system-ui, sans-serif;
}
.qw-card > header { display: flex; align-items: center; gap: 8px; margin: -4px -6px 4px 0; }
.qw-card > header h2 { flex: 1; margin: 0; font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
.qw-close { border: 0; background: none; padding: 4px 8px; border-radius: 6px; font-size: 16px; line-height: 1; }
.qw-card > footer { margin-top: 10px; display: flex; gap: 6px; }
.qw-finding + .qw-finding { margin-top: 12px; padding-top: 12px; border-top: 1px solid var(--qw-line); }
.qw-finding h3 {
  display: flex; align-items: center; gap: 6px; margin: 0 0 4px; font-size: 12px; font-weight: 600;
  color: var(--qw-level);
}
.qw-finding h3 span { color: var(--qw-soft); font-weight: 400; overflow-wrap: anywhere; }
.qw-finding p { margin: 0; overflow-wrap: anywhere; }
.qw-remedies { list-style: none; margin: 8px 0 0; padding: 0; display: grid; gap: 6px; }
.qw-remedies li { display: flex; align-items: flex-start; gap: 8px; overflow-wrap: anywhere; color: var(--qw-soft); }
.qw-remedies li > span { flex: 1; min-width: 0; }
.qw-remedies b { display: block; font-weight: 500; color: var(--qw-text); }
.qw-button {
  flex: none; padding: 3px 10px; border: 1px solid var(--qw-line); border-radius: 6px; background: var(--qw-raised);
  font-size: 12px; line-height: 1.4;
}
.qw button.qw-button { font-size: 12px; color: var(--qw-text); }
.qw-button:hover { border-color: var(--qw-soft); }

.qw-panel { height: 100%; overflow: auto; padding: 12px; box-sizing: border-box; color: var(--qw-text);
  font: 400 13px/1.45 Inter, system-ui, sans-serif; }
.qw-panel > header { display: flex; align-items: center; gap: 8px; margin-bottom: 10px; }
.qw-panel > header h2 { flex: 1; margin: 0; font-size: 14px; font-weight: 600; }
.qw-status { margin: 0 0 12px; color: var(--qw-soft); }
.qw-status strong { display: block; color: var(--qw-text); font-weight: 600; }
.qw-list { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
.qw-list > li { padding: 10px 12px; border: 1px solid var(--qw-line); border-left: 3px solid var(--qw-level);
  border-radius: 8px; }
.qw-list .qw-go { margin-top: 8px; }
@media (prefers-reduced-motion: no-preference) {
  .qw-frame, .qw-chip, .qw-dot { animation: qw-appear .18s ease-out; }
  @keyframes qw-appear { from { opacity: 0; } }
}
`;

/** Put the style into the page, once. */
export function addStyle() {
  if (document.getElementById("quantwire-style")) return;
  const style = document.createElement("style");
  style.id = "quantwire-style";
  style.textContent = STYLE;
  document.head.append(style);
  const probe = make("div", { class: "qw", style: "position:absolute;width:0;height:0;background:var(--comfy-menu-bg,#fff)" });
  document.body.append(probe);
  // Front ends name their dark theme differently; the colour of a surface is there in all of them.
  const look = () => document.documentElement.classList.toggle("qw-dark", isDark(getComputedStyle(probe).backgroundColor));
  look();
  new MutationObserver(look).observe(document.documentElement, { attributes: true, attributeFilter: ["style", "class"] });
}

/** @param {string} colour as `rgb(23, 23, 24)` */
function isDark(colour) {
  const [red, green, blue] = (colour.match(/[\d.]+/g) ?? [255, 255, 255]).map(Number);
  return 0.299 * red + 0.587 * green + 0.114 * blue < 128;
}

const SHAPES = {
  block: '<circle cx="8" cy="8" r="6.25"/><path d="M3.8 12.2l8.4-8.4"/>',
  error: '<circle cx="8" cy="8" r="6.25"/><path d="M8 4.6v4.1M8 11.2v.2"/>',
  warning: '<path d="M8 2.2l6.2 11.2H1.8z"/><path d="M8 6.4v3.3M8 11.6v.2"/>',
  note: '<circle cx="8" cy="8" r="6.25"/><path d="M8 7.4v4M8 4.7v.2"/>',
  good: '<circle cx="8" cy="8" r="6.25"/><path d="M5.2 8.2l2 2 3.6-4"/>',
};

/**
 * The sign of a level; the shape differs too, so that nobody has to tell colours apart.
 *
 * @param {keyof typeof SHAPES} level
 */
export function icon(level) {
  const holder = document.createElement("template");
  holder.innerHTML =
    '<svg class="qw-icon" viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.7" ' +
    `stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">${SHAPES[level] ?? SHAPES.note}</svg>`;
  return holder.content.firstElementChild;
}

/**
 * An element with attributes and children; text is always set as text.
 *
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `class`, `on...` listeners, or attributes; null leaves one out
 * @param {...(Node | string | null)} children
 * @returns {HTMLElement}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

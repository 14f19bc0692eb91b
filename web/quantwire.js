/**
 * The pack in the editor: one extension with its settings, commands, menu and panel, and a look at what it knows for
 * bug reports and tests (`window.quantwire`). The parts are in the modules that it imports; every one of them is
 * served as an extension too, so none of them does anything when it is imported.
 */
import { app } from "../../scripts/app.js";
import * as badges from "./badges.js";
import * as conflicts from "./conflicts.js";
import * as formats from "./formats.js";
import * as panel from "./panel.js";
import { VERSION } from "./lib/version.js";
import { say } from "./lib/words.js";
import { settings } from "./settings.js";

const NAME = "quantwire";
const CHECK = "quantwire.check";

/** Find out what a run would meet, and show it. */
async function checkNow() {
  await panel.open();
  await conflicts.check();
}

function register() {
  app.registerExtension({
    name: NAME,
    settings: settings(),
    commands: [{ id: CHECK, label: say("check"), tooltip: say("checkTip"), icon: "pi pi-shield", function: checkNow }],
    menuCommands: [{ path: ["Extensions", NAME], commands: [CHECK] }],
    async setup() {
      panel.setup();
      conflicts.setup();
      badges.setup();
      await formats.setup?.(app);
    },
    nodeCreated(node) {
      formats.nodeCreated?.(node, app);
    },
    loadedGraphNode(node) {
      formats.loadedGraphNode?.(node, app);
    },
    async afterConfigureGraph(missing) {
      conflicts.afterConfigureGraph();
      badges.afterConfigureGraph();
      await formats.afterConfigureGraph?.(missing, app);
    },
    getNodeMenuItems: (node) => conflicts.menuItems(node),
  });
  window.quantwire = Object.freeze({
    version: VERSION,
    findings: () => structuredClone(conflicts.findings()),
    badges: () => structuredClone(badges.badges()),
    sizes: () => structuredClone(formats.sizes?.() ?? {}),
  });
}

// A page with two copies of the pack, which a rename leaves behind, shall not say everything twice.
if (!window.quantwire) register();

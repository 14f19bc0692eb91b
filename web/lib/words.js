/**
 * What the extension says, in the editor's language: English, or Chinese where `Comfy.Locale` is zh or zh-TW.
 * What the server says of a graph (messages, remedies) is English and shown as it came.
 */
import { app } from "../../../scripts/app.js";

/** @type {Record<string, [string, string]>} */
const WORDS = {
  block: ["Conflict", "冲突"],
  error: ["Error", "错误"],
  warning: ["Warning", "警告"],
  note: ["Note", "提示"],
  blocks: ["{n} conflicts", "{n} 个冲突"],
  errors: ["{n} errors", "{n} 个错误"],
  warnings: ["{n} warnings", "{n} 个警告"],
  notes: ["{n} notes", "{n} 条提示"],
  oneBlock: ["1 conflict", "1 个冲突"],
  oneError: ["1 error", "1 个错误"],
  oneWarning: ["1 warning", "1 个警告"],
  oneNote: ["1 note", "1 条提示"],
  inside: ["{what} inside", "内部{what}"],
  workflow: ["The workflow", "整个工作流"],
  apply: ["Apply", "应用"],
  applyTip: ["Change the graph so. Undo brings the old value back.", "按此修改工作流；撤销可恢复原值。"],
  notApplied: ["Nothing was changed", "未作任何修改"],
  noNode: ["Node {node} is no longer in the graph.", "节点 {node} 已不在工作流中。"],
  noWidget: ["Node {node} has no widget {widget}, or a link sets it.", "节点 {node} 没有控件 {widget}，或其值由连线提供。"],
  changedMeanwhile: [
    "The workflow has changed since this was found. It is checked again now.",
    "发现此问题之后工作流已被修改，现在重新检查。",
  ],
  menuSet: ["Set {settings} ({nodes})", "设置 {settings}（{nodes}）"],
  subgraph: ["subgraph", "子图"],
  goTo: ["Go to node", "定位节点"],
  showAll: ["Show all", "查看全部"],
  close: ["Close", "关闭"],
  remedies: ["What to do", "解决办法"],
  check: ["Check this workflow", "检查此工作流"],
  checkTip: ["Offload conflicts, missing files and other things that would stop a run", "卸载冲突、缺失文件以及其他会中断运行的问题"],
  again: ["Check again", "重新检查"],
  checking: ["Checking…", "检查中…"],
  nothing: ["Nothing found", "未发现问题"],
  nothingMore: ["This workflow has no conflict that is known before it runs.", "运行前未发现此工作流存在冲突。"],
  notChecked: ["Not checked yet", "尚未检查"],
  off: ["Checking while you edit is off. It can be turned on in the settings.", "编辑时检查已关闭，可在设置中开启。"],
  noRoute: [
    "This server has no /quantwire/check. Restart it, so that it loads the installed version of quantwire.",
    "服务器没有 /quantwire/check。请重启服务器以加载已安装的 quantwire 版本。",
  ],
  offline: ["The server does not answer.", "服务器没有响应。"],
  failed: ["The workflow could not be checked", "无法检查此工作流"],
  forHost: ["checked for {host}", "检查对象：{host}"],
  forMode: ["checked for {host}, offload mode {mode}", "检查对象：{host}，卸载模式 {mode}"],
  comfyui: ["ComfyUI", "ComfyUI"],
  standalone: ["the embedded host", "内置运行环境"],
  list: ["Findings", "检查结果"],
  more: ["{n} more", "另有 {n} 项"],
  marked: ["{level}: {title}. {message}", "{level}：{title}。{message}"],
  weights: ["Weights", "权重"],
  quality: ["Quality", "质量"],
  sqnr: ["signal to quantization noise {db} dB", "信号量化噪声比 {db} dB"],
  stale: ["From a run before the last change of this node.", "结果来自此节点上次修改之前的运行。"],
  setCheck: ["Check while editing", "编辑时检查"],
  setCheckTip: ["Mark offload conflicts on nodes and links as you edit.", "编辑时在节点和连线上标出卸载冲突。"],
  setDelay: ["Wait after an edit (ms)", "编辑后等待（毫秒）"],
  setDelayTip: ["How long the graph must rest before it is checked.", "停止编辑多久后开始检查。"],
  setLevels: ["Marked on the graph", "在画布上标出"],
  setLevelsTip: ["The panel always lists everything.", "面板始终列出全部结果。"],
  levelBlock: ["Conflicts only", "仅冲突"],
  levelError: ["Conflicts and errors", "冲突和错误"],
  levelWarning: ["Conflicts, errors and warnings", "冲突、错误和警告"],
  levelNote: ["Everything", "全部"],
  setSizes: ["Predicted sizes", "预测大小"],
  setSizesTip: ["Show beside a format what the model's weights will take.", "在格式旁显示模型权重预计占用的大小。"],
  sizeMeans: ["Predicted weights in this format: {size} of full precision.", "此格式下权重的预计大小：{size}（相对全精度）。"],
  sizeRefused: ["not for this model", "不适用于此模型"],
  sizeUnknown: ["Predicted size: {reason}", "预计大小：{reason}"],
  setBadges: ["Badges after a run", "运行后徽标"],
  setBadgesTip: ["Show size and quality on the node that quantized.", "在量化节点上显示大小和质量。"],
  groupCheck: ["Checks", "检查"],
  groupShown: ["Shown on nodes", "节点显示"],
};

/** The language that the editor is set to, as it calls it: en, zh, zh-TW, ... */
export function language() {
  const set = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale");
  return String(set ?? navigator.language);
}

/** @returns {"en" | "zh"} */
export const locale = () => (language().toLowerCase().startsWith("zh") ? "zh" : "en");

/**
 * @param {string} key
 * @param {Record<string, string | number>} [values] for the places in braces
 */
export function say(key, values = {}) {
  const entry = WORDS[key];
  const text = entry ? entry[locale() === "zh" ? 1 : 0] : key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

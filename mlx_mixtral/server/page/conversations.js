"use strict";
// Conversations and where they are kept: the browser's storage, one entry each. A conversation is a tree of messages, so that an edit
// or a further answer loses nothing; its `leaf` says which branch is shown.

const PREFIX = "mlx-mixtral.conversation.";
const SETTINGS_NAME = "mlx-mixtral.settings";
const MAX_TITLE = 60;

/** @type {Map<string, object>} all of them, by id */
const conversations = new Map();

function newId() {
  return crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** One that has no messages and is not kept yet. */
function makeConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, changed: now, settings: latestSettings(), nodes: [], leaf: null };
}

/** A kept entry, or null when it is none of ours or broken; it is left as it is then. */
function parseConversation(text) {
  try {
    const found = JSON.parse(text);
    const isNode = (node) => typeof node?.id === "string" && typeof node.text === "string" && ["user", "assistant"].includes(node.role);
    if (typeof found?.id !== "string" || !Array.isArray(found.nodes) || !found.nodes.every(isNode)) return null;
    const settings = found.settings && typeof found.settings === "object" ? found.settings : {};
    return { ...found, title: String(found.title ?? ""), changed: Number(found.changed) || 0, settings };
  } catch {
    return null;
  }
}

/** @returns {boolean} whether the browser keeps anything for this page */
function readConversations() {
  try {
    for (const key of Object.keys(localStorage)) {
      if (!key.startsWith(PREFIX)) continue;
      const found = parseConversation(localStorage.getItem(key));
      if (found && PREFIX + found.id === key) conversations.set(found.id, found);
    }
    return true;
  } catch {
    return false;
  }
}

/** Take over messages that another tab has added to the same conversation, or written further. */
function mergeKept(conversation, kept) {
  const own = new Map(conversation.nodes.map((node) => [node.id, node]));
  for (const node of kept.nodes) {
    if (!own.has(node.id)) conversation.nodes.push(node);
    else if (node.at > own.get(node.id).at) Object.assign(own.get(node.id), node);
  }
}

/** @returns {string} why it is not kept, "" when it is */
function keepConversation(conversation) {
  conversations.set(conversation.id, conversation);
  try {
    const kept = parseConversation(localStorage.getItem(PREFIX + conversation.id));
    if (kept) mergeKept(conversation, kept);
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return "";
  } catch (error) {
    return isFull(error)
      ? "The browser's storage for this page is full: the latest messages are not kept. Delete conversations to make room."
      : "The browser keeps nothing for this page: conversations are gone when it is closed.";
  }
}

function isFull(error) {
  return error.name === "QuotaExceededError" || error.name === "NS_ERROR_DOM_QUOTA_REACHED";
}

function deleteConversation(id) {
  conversations.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // It was not kept.
  }
}

function byLatest() {
  return [...conversations.values()].sort((one, other) => other.changed - one.changed);
}

function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.nodes.find((node) => node.role === "user")?.text.trim().replace(/\s+/g, " ") ?? "";
  const letters = [...first];
  return letters.length > MAX_TITLE ? `${letters.slice(0, MAX_TITLE).join("")}…` : first || "New conversation";
}

/** What a new conversation begins with: the settings that were saved last. */
function latestSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS_NAME)) ?? {};
  } catch {
    return {};
  }
}

function keepSettings(settings) {
  try {
    localStorage.setItem(SETTINGS_NAME, JSON.stringify(settings));
  } catch {
    // They stay with their conversation.
  }
}

function addNode(conversation, parent, role, text) {
  const node = { id: newId(), parent, role, text, at: Date.now() };
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  conversation.changed = node.at;
  return node;
}

/** Messages from the first to `leaf`, the branch that is shown by default. */
function branch(conversation, leaf = conversation.leaf) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const found = [];
  for (let node = byId.get(leaf); node && found.length < byId.size; node = byId.get(node.parent)) found.unshift(node);
  return found;
}

/** Messages in the same place, the oldest first. */
function siblings(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

/** Show `node`, and below it what was said last. */
function choose(conversation, node) {
  let leaf = node;
  for (let seen = 0; seen < conversation.nodes.length; seen++) {
    const next = conversation.nodes.filter((other) => other.parent === leaf.id).at(-1);
    if (!next) break;
    leaf = next;
  }
  conversation.leaf = leaf.id;
}

/** As /v1/chat/completions takes it: what an answer to the branch that ends at `leaf` is asked with. */
function requestBody(conversation, leaf, model) {
  const { system, stop, ...numbers } = conversation.settings;
  const messages = branch(conversation, leaf).filter((node) => node.text || node.role === "user");
  const body = { messages: messages.map(({ role, text }) => ({ role, content: text })) };
  if (model) body.model = model;
  if (system) body.messages.unshift({ role: "system", content: system });
  if (stop?.length) body.stop = stop;
  for (const { name } of NUMBERS) if (Number.isFinite(numbers[name])) body[name] = numbers[name];
  return body;
}

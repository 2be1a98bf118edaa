"use strict";
// The page put together: which conversation is shown, and what keys and buttons do.

const scroll = byId("scroll");
const draft = byId("draft");
const isNarrow = matchMedia("(max-width: 760px)");
const drafts = new Map();
let current = makeConversation();
let isFollowing = true;
let spokenBlocks = 0;

function notice(text, retry = null, about = "") {
  const place = byId("notice");
  place.dataset.about = about;
  place.hidden = !text;
  const buttons = retry ? [smallButton("Try again", retry)] : [];
  place.replaceChildren(text, ...buttons, smallButton("✕", () => notice(""), { "aria-label": "Dismiss" }));
}

function keep(conversation) {
  const said = keepConversation(conversation);
  if (said) notice(said);
  drawList();
}

// What is drawn

function drawList() {
  const entries = byLatest().map((conversation) => {
    const title = titleOf(conversation);
    const open = element("button", { type: "button", className: "entry", title, textContent: title });
    if (conversation === current) open.setAttribute("aria-current", "true");
    if (running.has(conversation.id)) open.append(element("span", { className: "unseen", textContent: ", an answer is being written" }));
    open.classList.toggle("running", running.has(conversation.id));
    open.addEventListener("click", () => {
      show(conversation);
      closeSidebar();
    });
    const remove = smallButton("✕", () => removeConversation(conversation), { className: "icon", title: "Delete", "aria-label": `Delete ${title}` });
    return element("li", {}, open, remove);
  });
  const focused = [...byId("conversations").querySelectorAll("button")].indexOf(document.activeElement);
  byId("conversations").replaceChildren(...entries);
  if (focused >= 0) byId("conversations").querySelectorAll("button")[focused]?.focus();
  byId("delete-all").hidden = conversations.size === 0;
  byId("title").textContent = titleOf(current);
  document.title = current.nodes.length ? `${titleOf(current)} - mlx-mixtral` : "mlx-mixtral";
}

function draw() {
  const nodes = branch(current);
  const open = running.get(current.id)?.node;
  byId("messages").replaceChildren(...nodes.map((node) => messageElement(current, node, actions, node === open)));
  byId("empty").hidden = nodes.length > 0;
  drawRunning();
  drawList();
}

function drawRunning() {
  const isRunning = running.has(current.id);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("messages").classList.toggle("busy", isRunning);
  byId("messages").setAttribute("aria-busy", isRunning);
}

function show(conversation) {
  drafts.set(current.id, draft.value);
  current = conversation;
  draft.value = drafts.get(current.id) ?? "";
  fitDraft();
  try {
    sessionStorage.setItem("mlx-mixtral.shown", current.id);
  } catch {
    // A reload begins with a new conversation then.
  }
  spokenBlocks = Infinity;
  draw();
  toEnd();
}

function itemOf(node) {
  return byId("messages").querySelector(`[data-node="${CSS.escape(node.id)}"]`);
}

function follow() {
  if (isFollowing) scroll.scrollTop = scroll.scrollHeight;
}

function toEnd() {
  isFollowing = true;
  follow();
}

/** Blocks that are whole go to the screen reader, once each: letter by letter nobody could listen. */
function speak(item, blocks, isWhole) {
  const body = item.querySelector(".body");
  const end = isWhole ? blocks.length : blocks.length - 1;
  for (; spokenBlocks < end; spokenBlocks++) {
    const { kind, language } = blocks[spokenBlocks];
    const text = kind === "code" ? `Code${language ? ` in ${language}` : ""}.` : body.children[spokenBlocks].textContent;
    byId("spoken").append(element("p", { textContent: text }));
  }
}

const view = {
  keep(conversation) {
    // One that was deleted meanwhile stays deleted.
    if (conversations.has(conversation.id)) keep(conversation);
  },
  began(conversation, node) {
    if (conversation !== current) return;
    draw();
    toEnd();
    spokenBlocks = node.text ? markdownBlocks(node.text).length : 0;
    byId("spoken").replaceChildren();
    say("An answer is being written");
  },
  grew(conversation, node) {
    const item = conversation === current && itemOf(node);
    if (!item) return;
    speak(item, drawText(item, node), false);
    drawFoot(item, conversation, node, actions, true);
    follow();
  },
  ended(conversation, node) {
    drawList();
    if (conversation !== current) return;
    drawRunning();
    const item = itemOf(node);
    if (!item) return;
    speak(item, drawText(item, node), true);
    drawFoot(item, conversation, node, actions, false);
    follow();
    say(node.error ? "" : node.reason === "stopped" ? "The answer was stopped" : "The answer is complete");
  },
};

// What is done

function answer(parent) {
  const node = addNode(current, parent, "assistant", "");
  keep(current);
  writeAnswer(current, node, byId("model").value, view);
  focusDraft();
}

const actions = {
  choose(node, by) {
    choose(current, node);
    keep(current);
    draw();
    const item = itemOf(node);
    (item.querySelector(`[data-step="${by}"]:not(:disabled)`) ?? item.querySelector("[data-step]:not(:disabled)"))?.focus();
  },
  regenerate(node) {
    if (!running.has(current.id)) answer(node.parent);
  },
  proceed(node) {
    if (running.has(current.id)) return;
    writeAnswer(current, node, byId("model").value, view);
    focusDraft();
  },
  edit(node, text) {
    if (running.has(current.id)) return;
    answer(text === node.text ? node.id : addNode(current, node.parent, "user", wellFormed(text)).id);
  },
};

function send() {
  const text = wellFormed(draft.value);
  if (!text.trim()) return;
  if (running.has(current.id)) {
    say("An answer is being written; Escape stops it");
    return;
  }
  draft.value = "";
  drafts.delete(current.id);
  fitDraft();
  answer(addNode(current, current.leaf, "user", text).id);
}

function focusDraft() {
  // A keyboard of glass would cover the answer.
  if (!matchMedia("(pointer: coarse)").matches) draft.focus();
}

function fitDraft() {
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight + 2}px`;
}

async function removeConversation(conversation) {
  const isSure = await askToDelete("Delete this conversation?", `“${titleOf(conversation)}” is removed from this browser for good.`);
  if (!isSure) return;
  stopAnswer(conversation);
  running.delete(conversation.id);
  deleteConversation(conversation.id);
  if (conversation === current) current = makeConversation();
  show(current);
  byId("new").focus();
}

async function removeAll() {
  const count = conversations.size;
  const isSure = await askToDelete(count === 1 ? "Delete the conversation?" : `Delete all ${count} conversations?`, "They are removed from this browser for good.");
  if (!isSure) return;
  for (const conversation of [...conversations.values()]) {
    stopAnswer(conversation);
    running.delete(conversation.id);
    deleteConversation(conversation.id);
  }
  show(makeConversation());
  byId("new").focus();
}

async function loadModels() {
  try {
    const models = await listModels();
    byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id, textContent: id })));
    byId("model").toggleAttribute("data-single", models.length === 1);
    const room = models[0]?.max_model_len;
    byId("model-facts").textContent = room ? `${models[0].id} has room for ${room.toLocaleString("en")} tokens.` : "";
    if (byId("notice").dataset.about === "models") notice("");
  } catch (error) {
    if (error.needsKey && (await askForKey(error.message))) await loadModels();
    else notice(error.message, loadModels, "models");
  }
}

function openSidebar() {
  document.body.classList.add("with-sidebar");
  byId("veil").hidden = false;
  document.querySelector("main").inert = true;
  byId("open-sidebar").setAttribute("aria-expanded", "true");
  byId("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("with-sidebar")) return;
  document.body.classList.remove("with-sidebar");
  byId("veil").hidden = true;
  document.querySelector("main").inert = false;
  byId("open-sidebar").setAttribute("aria-expanded", "false");
  byId("open-sidebar").focus();
}

// Keys, buttons, other tabs

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
draft.addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  send();
});
draft.addEventListener("input", fitDraft);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("with-sidebar")) closeSidebar();
  else stopAnswer(current);
});
byId("stop").addEventListener("click", () => {
  stopAnswer(current);
  focusDraft();
});
byId("new").addEventListener("click", () => {
  show(makeConversation());
  closeSidebar();
  focusDraft();
});
byId("delete-all").addEventListener("click", removeAll);
byId("open-settings").addEventListener("click", async () => {
  const conversation = current;
  if ((await editSettings(conversation)) && conversation.nodes.length) keep(conversation);
  drawList();
  if (!byId("model").options.length) loadModels();
});
byId("open-sidebar").addEventListener("click", openSidebar);
byId("close-sidebar").addEventListener("click", closeSidebar);
byId("veil").addEventListener("click", closeSidebar);
isNarrow.addEventListener("change", closeSidebar);
byId("to-end").addEventListener("click", toEnd);
scroll.addEventListener("scroll", () => {
  isFollowing = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
  byId("to-end").hidden = isFollowing;
});
byId("theme").value = chosenTheme();
byId("theme").addEventListener("change", () => chooseTheme(byId("theme").value));
window.addEventListener("pagehide", () => {
  for (const id of running.keys()) if (conversations.has(id)) keepConversation(conversations.get(id));
});
window.addEventListener("storage", ({ key, newValue }) => {
  if (!key?.startsWith(PREFIX)) return;
  const kept = newValue && parseConversation(newValue);
  const known = conversations.get(key.slice(PREFIX.length));
  if (kept && known) {
    mergeKept(known, kept);
    Object.assign(known, { title: kept.title, settings: kept.settings, changed: kept.changed });
  } else if (kept) conversations.set(kept.id, kept);
  else if (known && !running.has(known.id)) {
    conversations.delete(known.id);
    if (known === current) show(makeConversation());
  }
  if (known === current && !running.has(current.id) && !document.querySelector(".edited")) draw();
  else drawList();
});

makeNumberFields();
if (!readConversations()) notice("The browser keeps nothing for this page: conversations are gone when it is closed.");
try {
  current = conversations.get(sessionStorage.getItem("mlx-mixtral.shown")) ?? current;
} catch {
  // The new one stays.
}
show(current);
loadModels();
focusDraft();

"use strict";
// How messages are drawn. What their buttons do is given as `actions`.

const REASONS = {
  length: "ended at the limit of tokens",
  stopped: "stopped",
  content_filter: "filtered",
};

function say(text) {
  byId("status").textContent = text;
}

async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  // Pages of plain http on another machine have no clipboard; a selection can be copied all the same.
  const field = element("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (!isCopied) throw new Error("not copied");
}

function copyButton(label, description, text) {
  const button = element("button", { type: "button", className: "small", textContent: label, "aria-label": description, "data-copy": "" });
  button.addEventListener("click", async () => {
    try {
      await copyText(text());
      button.textContent = "Copied";
      say("Copied");
    } catch {
      button.textContent = "Not copied";
      say("The browser does not let this page copy");
    }
    button.focus();
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

function smallButton(label, action, attributes = {}) {
  const button = element("button", { type: "button", className: "small", textContent: label, ...attributes });
  button.addEventListener("click", action);
  return button;
}

function decimals(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 1 });
}

/** What is known of an answer, in a line. */
function factsOf(node) {
  const { tokens, isExact, perSecond, firstS, promptTokens, cachedTokens } = node.stats ?? {};
  const about = isExact ? "" : "about ";
  const parts = [];
  if (tokens) parts.push(`${about}${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`);
  if (perSecond) parts.push(`${about}${decimals(perSecond)} tokens/s`);
  if (firstS !== undefined) parts.push(`first after ${decimals(firstS)} s`);
  if (promptTokens) parts.push(`prompt of ${promptTokens.toLocaleString("en")}${cachedTokens ? `, ${cachedTokens.toLocaleString("en")} cached` : ""}`);
  if (REASONS[node.reason]) parts.push(REASONS[node.reason]);
  return parts.join(" · ");
}

/** The buttons ‹ and › between messages in one place. */
function variants(conversation, node, actions) {
  const all = siblings(conversation, node);
  if (all.length < 2) return [];
  const at = all.indexOf(node);
  const kind = node.role === "user" ? "version" : "answer";
  const step = (label, by, description) => smallButton(label, () => actions.choose(all[at + by], by),
    { "aria-label": description, disabled: !all[at + by], "data-step": by });
  const count = element("span", { className: "count", textContent: `${at + 1}/${all.length}` });
  count.append(element("span", { className: "unseen", textContent: ` ${kind}s` }));
  return [step("‹", -1, `Previous ${kind}`), count, step("›", 1, `Next ${kind}`)];
}

function drawText(item, node) {
  const body = item.querySelector(".body");
  if (node.role === "user") {
    body.textContent = node.text;
    return [];
  }
  return showMarkdown(body, node.text);
}

/** The lines below a message: what went wrong, facts, buttons. */
function drawFoot(item, conversation, node, actions, isRunning) {
  const foot = item.querySelector(".foot");
  const children = [];
  if (node.error) children.push(element("p", { className: "wrong", role: "alert", textContent: node.error }));
  const facts = factsOf(node);
  if (isRunning && !node.text) children.push(element("p", { className: "waiting", textContent: "Waiting for the first word" }));
  else if (!isRunning && node.role === "assistant" && !node.text.trim() && !node.error) {
    children.push(element("p", { className: "muted", textContent: "The answer is empty." }));
  }
  if (facts) children.push(element("p", { className: "facts muted", textContent: facts }));
  if (!isRunning) {
    const tools = element("div", { className: "tools" }, ...variants(conversation, node, actions));
    if (node.text) tools.append(copyButton("Copy", node.role === "user" ? "Copy this message" : "Copy this answer", () => node.text));
    if (node.role === "user") tools.append(smallButton("Edit", () => editMessage(item, node, actions), { "data-edit": "" }));
    else {
      tools.append(smallButton(node.error ? "Try again" : "Regenerate", () => actions.regenerate(node)));
      if (node.text && (node.error || node.reason === "length" || node.reason === "stopped")) {
        tools.append(smallButton("Continue", () => actions.proceed(node), { "aria-label": "Continue this answer" }));
      }
    }
    children.push(tools);
  }
  foot.replaceChildren(...children);
}

function messageElement(conversation, node, actions, isRunning = false) {
  const item = element("li", { className: `message ${node.role}` },
    element("h2", { className: "unseen", textContent: node.role === "user" ? "You" : "Answer" }),
    element("div", { className: "body" }), element("div", { className: "foot" }));
  item.dataset.node = node.id;
  drawText(item, node);
  drawFoot(item, conversation, node, actions, isRunning);
  return item;
}

/** A field in place of the message; what is saved is a new version of it, with an answer of its own. */
function editMessage(item, node, actions) {
  const body = item.querySelector(".body");
  const foot = item.querySelector(".foot");
  const field = element("textarea", { value: node.text, rows: Math.min(12, node.text.split("\n").length + 1), "aria-label": "Edit your message" });
  const end = () => {
    body.textContent = node.text;
    foot.hidden = false;
    item.classList.remove("edited");
    item.querySelector("[data-edit]").focus();
  };
  const save = () => {
    if (field.value.trim()) actions.edit(node, field.value);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      end();
    } else if (isSendKey(event)) {
      event.preventDefault();
      save();
    }
  });
  const buttons = element("div", { className: "actions" }, smallButton("Cancel", end), smallButton("Send", save, { className: "small primary" }));
  foot.hidden = true;
  item.classList.add("edited");
  body.replaceChildren(field, buttons);
  field.focus();
}

/** Enter, but not the Enter that ends the composition of a character; where keys are drawn on glass it begins a new line. */
function isSendKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.altKey || event.isComposing || event.keyCode === 229) return false;
  return event.ctrlKey || event.metaKey || !matchMedia("(pointer: coarse) and (hover: none)").matches;
}

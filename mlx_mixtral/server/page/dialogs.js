"use strict";
// The three dialogs: settings of a conversation, the server's key, and whether to delete. The browser keeps the focus within.

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 0, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 100, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1 },
  { name: "seed", label: "Seed", min: -Number.MAX_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1 },
];
const MAX_STOPS = 16;

const byId = (id) => document.getElementById(id);

/**
 * Open a dialog until it is closed.
 * @param {() => string} accept called at the submit button; what it returns is shown as wrong, "" closes
 * @returns {Promise<boolean>} whether it was accepted
 */
function openDialog(dialog, accept = () => "") {
  const form = dialog.querySelector("form");
  const wrong = dialog.querySelector(".wrong");
  if (wrong) wrong.textContent = "";
  const closers = dialog.querySelectorAll("[data-close]");
  return new Promise((resolve) => {
    const finish = (isAccepted) => {
      form.removeEventListener("submit", submit);
      closers.forEach((button) => button.removeEventListener("click", refuse));
      dialog.removeEventListener("close", closed);
      dialog.close();
      resolve(isAccepted);
    };
    const refuse = () => finish(false);
    const submit = (event) => {
      event.preventDefault();
      const said = accept();
      if (wrong) wrong.textContent = said;
      if (!said) finish(true);
    };
    const closed = () => {
      // Escape; the event comes late, and may be that of an earlier opening.
      if (!dialog.open) finish(false);
    };
    form.addEventListener("submit", submit);
    closers.forEach((button) => button.addEventListener("click", refuse));
    dialog.addEventListener("close", closed);
    dialog.showModal();
  });
}

function makeNumberFields() {
  for (const { name, label, ...limits } of NUMBERS) {
    const input = element("input", { id: `number-${name}`, type: "number", inputMode: "decimal", placeholder: "server's choice" });
    for (const [limit, value] of Object.entries(limits)) input.setAttribute(limit, limit === "step" && value < 1 ? "any" : value);
    byId("numbers").append(element("div", {}, element("label", { htmlFor: input.id, textContent: label }), input));
  }
}

/** @returns {Promise<boolean>} whether the conversation was changed */
async function editSettings(conversation) {
  const { settings } = conversation;
  byId("name").value = conversation.title;
  byId("name").placeholder = titleOf(conversation);
  byId("system").value = settings.system ?? "";
  byId("stops").value = (settings.stop ?? []).join("\n");
  byId("own-key").value = apiKey();
  for (const { name } of NUMBERS) byId(`number-${name}`).value = settings[name] ?? "";
  return openDialog(byId("settings"), () => {
    const stop = byId("stops").value.split("\n").filter((line) => line !== "");
    if (stop.length > MAX_STOPS) return `There are ${stop.length} stop texts; the server takes ${MAX_STOPS} at most.`;
    const said = useApiKey(byId("own-key").value.trim());
    if (said) return said;
    const changed = { system: byId("system").value.trim(), stop };
    for (const { name } of NUMBERS) {
      const value = byId(`number-${name}`).valueAsNumber;
      if (Number.isFinite(value)) changed[name] = value;
    }
    conversation.title = byId("name").value.trim();
    conversation.settings = changed;
    keepSettings(changed);
    return "";
  });
}

let openKeyDialog = null;

/** Ask for the server's key, once however many requests want it. @returns {Promise<boolean>} whether there is a new one */
function askForKey(message) {
  if (openKeyDialog) return openKeyDialog;
  byId("key").value = "";
  byId("ask-key-text").textContent = message;
  openKeyDialog = openDialog(byId("ask-key"), () => useApiKey(byId("key").value.trim()));
  openKeyDialog.then(() => (openKeyDialog = null));
  return openKeyDialog;
}

/** @returns {Promise<boolean>} */
function askToDelete(title, text) {
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  return openDialog(byId("confirm"));
}

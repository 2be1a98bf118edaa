"use strict";
// Answers that are being written, one a conversation at most; they go on while another conversation is looked at.

const DRAW_EVERY_MS = 50;
const KEEP_EVERY_MS = 2000;

/** @type {Map<string, {node: object, controller: AbortController}>} by the conversation's id */
const running = new Map();

function stopAnswer(conversation) {
  running.get(conversation.id)?.controller.abort();
}

/** Text without halves of surrogate pairs, which no encoding of the network can carry. */
function wellFormed(text) {
  return text.toWellFormed?.() ?? text.replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
}

/**
 * Let the model answer.
 * @param {object} node the answer, empty or to be continued; it gets text, stats, reason or error
 * @param {{began: Function, grew: Function, ended: Function, keep: Function}} view told of it
 */
async function writeAnswer(conversation, node, model, view) {
  const controller = new AbortController();
  const begun = node.text;
  const leaf = begun ? node.id : node.parent;
  running.set(conversation.id, { node, controller });
  view.began(conversation, node);
  let isAgain = true;
  while (isAgain) {
    isAgain = false;
    Object.assign(node, { text: begun, stats: undefined, reason: undefined, error: undefined });
    try {
      await readAnswer(conversation, node, requestBody(conversation, leaf, model), controller.signal, view);
    } catch (error) {
      if (error.name === "AbortError") node.reason = "stopped";
      else {
        node.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
        isAgain = Boolean(error.needsKey) && (await askForKey(error.message));
      }
    }
  }
  running.delete(conversation.id);
  node.at = Date.now();
  view.keep(conversation);
  view.ended(conversation, node);
}

async function readAnswer(conversation, node, body, signal, view) {
  const asked = performance.now();
  let first = 0;
  let latest = 0;
  let parts = 0;
  let timer = 0;
  let kept = asked;
  const draw = () => {
    timer = 0;
    view.grew(conversation, node);
  };
  try {
    for await (const { text, reason, usage } of streamAnswer(body, signal)) {
      const now = performance.now();
      if (reason) node.reason = reason;
      if (text) {
        first ||= now;
        latest = now;
        parts++;
        node.text += text;
        node.stats = statsOf({ asked, first, latest, tokens: parts, isExact: false });
        timer ||= setTimeout(draw, DRAW_EVERY_MS);
      }
      if (usage) {
        node.stats = {
          ...statsOf({ asked, first: first || now, latest: latest || now, tokens: usage.completion_tokens, isExact: true }),
          promptTokens: usage.prompt_tokens,
          cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
        };
      }
      if (now - kept > KEEP_EVERY_MS) {
        kept = now;
        node.at = Date.now();
        view.keep(conversation);
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

/** Times are of the first and the latest text; the first token's own time is that of the prompt, so it does not count as speed. */
function statsOf({ asked, first, latest, tokens, isExact }) {
  const perSecond = latest > first && tokens > 1 ? (1000 * (tokens - 1)) / (latest - first) : undefined;
  return { tokens, isExact, firstS: (first - asked) / 1000, perSecond };
}

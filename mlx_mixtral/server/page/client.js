"use strict";
// The server as the page asks it: models, streamed answers, errors in words, the key. Every address is relative to the page's own.

const KEY_NAME = "mlx-mixtral.key";
let keyOfTab = "";

function apiKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? keyOfTab;
  } catch {
    return keyOfTab; // the browser keeps nothing: until the page is closed
  }
}

/** @returns {string} what is wrong with it, "" when nothing is */
function useApiKey(key) {
  if (!/^[\x21-\x7e]*$/.test(key)) return "A key has letters, digits and signs of ASCII only, without spaces.";
  keyOfTab = key;
  try {
    if (key) sessionStorage.setItem(KEY_NAME, key);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // As above.
  }
  return "";
}

/** What went wrong, in words; `needsKey` when a key would help. */
class ServerError extends Error {
  constructor(message, { needsKey = false } = {}) {
    super(message);
    this.needsKey = needsKey;
  }
}

const WORDS = {
  400: "The server refused the request",
  401: "The server asks for a key",
  403: "The server does not answer this page",
  404: "The server does not have what was asked for",
  408: "The request did not reach the server in time",
  413: "The conversation is too long for one request",
  429: "The server is busy",
  500: "The server failed",
  503: "The server cannot answer now",
};

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

async function errorOf(reply) {
  let said = "";
  try {
    said = (await reply.json()).error?.message ?? "";
  } catch {
    // Not of this server: a proxy between, perhaps.
  }
  const words = WORDS[reply.status] ?? `The server answered with status ${reply.status}`;
  const wait = Number(reply.headers.get("retry-after"));
  const again = wait > 0 ? ` Try again in ${wait} s.` : "";
  return new ServerError(`${words}${said ? `: ${sentence(said)}` : "."}${again}`, { needsKey: reply.status === 401 });
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`The server at ${location.host} cannot be reached. Is it still running?`);
  }
  if (!reply.ok) throw await errorOf(reply);
  return reply;
}

/** @returns {Promise<{id: string, max_model_len?: number}[]>} */
async function listModels() {
  const reply = await ask("v1/models");
  try {
    return (await reply.json()).data;
  } catch {
    throw new ServerError("The server's list of models cannot be read.");
  }
}

/**
 * Data of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), from pieces of bytes that may end
 * anywhere: within a character, between CR and LF.
 */
class EventReader {
  #decoder = new TextDecoder("utf-8");
  #line = "";
  #data = [];
  #isAfterReturn = false;

  /** @returns {string[]} data of the events that this piece completes */
  read(bytes) {
    const events = [];
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text && this.#isAfterReturn) {
      this.#isAfterReturn = false;
      if (text[0] === "\n") text = text.slice(1);
    }
    if (text.endsWith("\r")) this.#isAfterReturn = true;
    const lines = text.split(/\r\n|\n|\r/);
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "data") this.#data.push("");
    }
    return events;
  }
}

/**
 * One answer as it is generated.
 * @yields {{text?: string, reason?: string, usage?: object}}
 */
async function* streamAnswer(body, signal) {
  const reply = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = reply.body.getReader();
  const events = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of events.read(value)) {
        if (data === "[DONE]") return;
        const part = JSON.parse(data);
        if (part.error) throw new ServerError(sentence(part.error.message));
        const choice = part.choices?.[0];
        yield { text: choice?.delta?.content || undefined, reason: choice?.finish_reason || undefined, usage: part.usage || undefined };
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    if (error instanceof SyntaxError) throw new ServerError("The server sent something that cannot be read.");
    throw new ServerError("The connection broke before the answer was whole.");
  } finally {
    reader.cancel().catch(() => {}); // also what a reader leaves early is not generated further
  }
  throw new ServerError("The connection ended before the answer was whole.");
}

"use strict";
// Markdown within a line, as DOM nodes: code, emphasis, links, line breaks. Text stays text: HTML is not read.

const MAX_INLINE_DEPTH = 12;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ENTITY = /&(?:(amp|lt|gt|quot|apos|nbsp)|#(\d{1,7})|#[xX]([\da-fA-F]{1,6}));/y;
const NAMED_ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const WEB_ADDRESS = /https?:\/\/[^\s<>"`]+/y;

/** The address if it is one of the web, else null: no other scheme becomes a link. */
function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** @returns {Node[]} */
function inlineNodes(text, depth = 0, isLink = false) {
  const nodes = [];
  const hopeless = new Map(); // a closer that is not there from some place on is not looked for again
  let plain = "";
  let at = 0;

  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const put = (node, end) => {
    flush();
    nodes.push(node);
    at = end;
  };

  while (at < text.length) {
    const mark = text[at];
    let found = null;
    if (mark === "\\" && at + 1 < text.length) {
      if (text[at + 1] === "\n") {
        put(element("br"), at + 2);
      } else {
        plain += PUNCTUATION.test(text[at + 1]) ? text[at + 1] : text.slice(at, at + 2);
        at += 2;
      }
      continue;
    }
    if (mark === "\n") {
      plain = plain.replace(/ +$/, "");
      put(element("br"), at + 1);
      while (text[at] === " ") at++;
      continue;
    }
    if (mark === "&") {
      const [letter, end] = entity(text, at);
      plain += letter;
      at = end;
      continue;
    }
    if (mark === "`") found = codeSpan(text, at, hopeless);
    else if (depth < MAX_INLINE_DEPTH) {
      if (mark === "*" || mark === "_" || mark === "~") found = emphasis(text, at, hopeless, depth, isLink);
      else if (!isLink && (mark === "[" || (mark === "!" && text[at + 1] === "["))) found = link(text, at, hopeless, depth);
      else if (!isLink && mark === "<") found = angleLink(text, at);
      else if (!isLink && mark === "h" && !/[\p{L}\p{N}_]/u.test(text[at - 1] ?? " ")) found = bareLink(text, at);
    }
    if (found?.node) {
      put(found.node, found.end);
    } else {
      // A whole run of one mark is taken at once: its parts mean nothing on their own.
      const end = found?.end ?? at + 1;
      plain += text.slice(at, end);
      at = end;
    }
  }
  flush();
  return nodes;
}

/** The character that &lt; and its like stand for, as text. @returns {[string, number]} and where it ends */
function entity(text, at) {
  ENTITY.lastIndex = at;
  const found = ENTITY.exec(text);
  if (!found) return ["&", at + 1];
  const [, name, decimal, hex] = found;
  const code = decimal ? parseInt(decimal, 10) : parseInt(hex, 16);
  const isLetter = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return [name ? NAMED_ENTITIES[name] : isLetter ? String.fromCodePoint(code) : "\ufffd", ENTITY.lastIndex];
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

/** Where `isCloser` holds first at or after `from`, -1 where nowhere; remembered by `key`. */
function seek(text, from, key, hopeless, mark, isCloser) {
  if ((hopeless.get(key) ?? Infinity) <= from) return -1;
  for (let at = text.indexOf(mark, from); at !== -1; at = text.indexOf(mark, at)) {
    const length = runLength(text, at);
    if (isCloser(at, length)) return at;
    at += length;
  }
  hopeless.set(key, from);
  return -1;
}

function codeSpan(text, at, hopeless) {
  const length = runLength(text, at);
  const end = seek(text, at + length, "`" + length, hopeless, "`", (_, found) => found === length);
  if (end === -1) return { end: at + length };
  let inside = text.slice(at + length, end).replaceAll("\n", " ");
  if (/^ .*[^ ].* $|^ [^ ] $/.test(inside)) inside = inside.slice(1, -1);
  return { node: element("code", { textContent: inside }), end: end + length };
}

function emphasis(text, at, hopeless, depth, isLink) {
  const mark = text[at];
  const run = runLength(text, at);
  const before = text[at - 1] ?? " ";
  const after = text[at + run] ?? " ";
  const isOpener = /\S/.test(after) && (mark !== "_" || !/[\p{L}\p{N}]/u.test(before))
    && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
  if (!isOpener || run > 3 || (mark === "~" && run !== 2)) return { end: at + run };
  const isCloser = (end, length) => length >= run && end > at + run && !isEscaped(text, end)
    && /\S/.test(text[end - 1]) && (mark !== "_" || !/[\p{L}\p{N}]/u.test(text[end + length] ?? " "))
    && (length === run || length >= 3 || run === 3) && !isInCode(text, at + run, end);
  const end = seek(text, at + run, mark + run, hopeless, mark, isCloser);
  if (end === -1) return { end: at + run };
  // Of a longer run at the end the inner part closes what is inside: **a *b***.
  const close = end + runLength(text, end) - run;
  const inside = inlineNodes(text.slice(at + run, close), depth + 1, isLink);
  const tags = mark === "~" ? ["del"] : { 1: ["em"], 2: ["strong"], 3: ["em", "strong"] }[run];
  const node = tags.reduceRight((children, tag) => [element(tag, {}, ...children)], inside)[0];
  return { node, end: close + run };
}

function isEscaped(text, at) {
  let slashes = 0;
  while (text[at - 1 - slashes] === "\\") slashes++;
  return slashes % 2 === 1;
}

/** Whether a code span is open at `end`, of those that begin after `from`. */
function isInCode(text, from, end) {
  let open = 0;
  for (let at = text.indexOf("`", from); at !== -1 && at < end; at = text.indexOf("`", at)) {
    const length = runLength(text, at);
    if (open === 0) open = length;
    else if (open === length) open = 0;
    at += length;
  }
  return open !== 0 && text.indexOf("`".repeat(open), end) !== -1;
}

function anchor(href, children) {
  return element("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** [text](address "title"), and ![text](address), which becomes a link: nothing is fetched for what an answer says. */
function link(text, at, hopeless, depth) {
  const isImage = text[at] === "!";
  const start = at + (isImage ? 2 : 1);
  const middle = seekBracket(text, start, hopeless);
  if (middle === -1 || text[middle + 1] !== "(") return null;
  const target = /\(\s*(?:<([^<>\n]*)>|([^\s()<]*(?:\([^\s()]*\)[^\s()<]*)*))(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;
  target.lastIndex = middle + 1;
  const found = target.exec(text);
  if (!found) return null;
  const label = text.slice(start, middle);
  const href = webAddress((found[1] ?? found[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
  const end = target.lastIndex;
  if (href === null) {
    return { node: element("span", {}, ...inlineNodes(label, depth + 1), ` (${found[1] ?? found[2]})`), end };
  }
  return { node: anchor(href, isImage ? [`image: ${label || href}`] : inlineNodes(label, depth + 1, true)), end };
}

/** The bracket that closes one open since before `from`, at most a thousand characters on. */
function seekBracket(text, from, hopeless) {
  if ((hopeless.get("]") ?? Infinity) <= from) return -1;
  if (text.indexOf("](", from) === -1) {
    hopeless.set("]", from);
    return -1;
  }
  let depth = 0;
  for (let at = from; at < Math.min(text.length, from + 1000); at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "[") depth++;
    else if (text[at] === "]" && depth-- === 0) return at;
  }
  return -1;
}

function angleLink(text, at) {
  const found = /<(https?:\/\/[^\s<>]+)>/y;
  found.lastIndex = at;
  const match = found.exec(text);
  const href = match && webAddress(match[1]);
  return href ? { node: anchor(href, [match[1]]), end: found.lastIndex } : null;
}

/** An address in running text; marks behind it, and a bracket that it did not open, are not part of it. */
function bareLink(text, at) {
  WEB_ADDRESS.lastIndex = at;
  let found = WEB_ADDRESS.exec(text)?.[0];
  if (!found) return null;
  for (let length = -1; length !== found.length; ) {
    length = found.length;
    found = found.replace(/[?!.,:;*_~'"]+$/, "");
    if (found.endsWith(")") && found.split(")").length > found.split("(").length) found = found.slice(0, -1);
  }
  const href = webAddress(found);
  return href ? { node: anchor(href, [found]), end: at + found.length } : null;
}

"use strict";
// Markdown as models write it: paragraphs, headings, lists, quotes, code, rules and tables (https://spec.commonmark.org/0.31.2/).
// Blocks are plain objects first, so that while an answer grows only the blocks that changed are drawn again.

const MAX_BLOCK_DEPTH = 8;
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4}(?! )| (?= {4}))(.*)|[ \t]*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const INDENTED = /^ {4,}\S/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/**
 * The blocks of a text, each with the lines it is made of.
 * @param {string} text
 * @returns {{kind: string, source: string}[]}
 */
function markdownBlocks(text, depth = 0) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [block, end] = readBlock(lines, at, depth);
    block.source = lines.slice(at, end).join("\n");
    block.isAfterBlank = at > 0 && !lines[at - 1].trim();
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  if (INDENTED.test(line)) return readIndented(lines, at);
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_BLOCK_DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, at);
    if (ITEM.test(line)) return readList(lines, at, depth);
  }
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at, [, indent, mark, info]) {
  const close = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},} *$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent.length}}`), ""));
  const isWhole = end < lines.length;
  return [{ kind: "code", language: info.trim().split(/\s/)[0], text: code.join("\n"), isWhole }, isWhole ? end + 1 : end];
}

function readIndented(lines, at) {
  let end = at;
  for (let next = at; next < lines.length && (!lines[next].trim() || INDENTED.test(lines[next])); next++) {
    if (lines[next].trim()) end = next + 1;
  }
  const text = lines.slice(at, end).map((line) => line.slice(4)).join("\n");
  return [{ kind: "code", language: "", text, isWhole: end < lines.length }, end];
}

function readQuote(lines, at) {
  const inner = [];
  let end = at;
  for (; end < lines.length; end++) {
    const found = QUOTE.exec(lines[end]);
    // A line without the mark goes on a paragraph that has begun.
    if (!found && (!lines[end].trim() || !inner.at(-1)?.trim() || beginsBlock(lines, end))) break;
    inner.push(found ? found[1] : lines[end]);
  }
  return [{ kind: "quote", text: inner.join("\n") }, end];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const type = first[2].at(-1);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || found[2].at(-1) !== type || RULE.test(lines[end])) break;
    const indent = found[1].length + found[2].length + (found[3]?.length ?? 1);
    const inner = [found[4] ?? ""];
    let blank = false;
    for (end++; end < lines.length; end++) {
      const line = lines[end];
      if (!line.trim()) {
        blank = true;
        inner.push("");
      } else if (line.search(/\S/) >= indent) {
        blank = false;
        inner.push(line.slice(indent));
      } else if (!blank && inner.at(-1).trim() && !ITEM.test(line) && !beginsBlock(lines, end) && !isInFence(inner)) {
        inner.push(line.trimStart());
      } else break;
    }
    const blocks = markdownBlocks(inner.join("\n"), depth + 1);
    isLoose ||= blocks.some((block, index) => index > 0 && block.isAfterBlank);
    isLoose ||= blank && end < lines.length && ITEM.exec(lines[end])?.[2].at(-1) === type && !RULE.test(lines[end]);
    items.push(blocks);
  }
  const isOrdered = /\d/.test(first[2]);
  return [{ kind: "list", isOrdered, start: isOrdered ? parseInt(first[2], 10) : 1, items, isLoose }, end];
}

function isInFence(lines) {
  let open = null;
  for (const line of lines) {
    const found = FENCE.exec(line);
    if (open === null) open = found?.[2] ?? null;
    else if (found && !found[3] && found[2][0] === open[0] && found[2].length >= open.length) open = null;
  }
  return open !== null;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && DELIMITERS.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].trim() && !beginsBlock(lines, end); end++) {
    const row = cells(lines[end]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
  }
  return [{ kind: "table", head, sides, rows }, end];
}

/** A bar that is escaped divides nothing. */
function cells(line) {
  const found = [""];
  const inside = line.trim().replace(/^\|/, "");
  for (let at = 0; at < inside.length; at++) {
    if (inside[at] === "\\" && inside[at + 1] === "|") {
      found[found.length - 1] += "|";
      at++;
    } else if (inside[at] === "|") found.push("");
    else found[found.length - 1] += inside[at];
  }
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    const under = /^ {0,3}(=+|-+) *$/.exec(lines[end]);
    if (under) {
      const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
      return [{ kind: "heading", level: under[1][0] === "=" ? 1 : 2, text }, end + 1];
    }
    if (beginsBlock(lines, end)) break;
    end++;
  }
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd();
  return [{ kind: "paragraph", text }, end];
}

/** Whether a line ends the paragraph before it: a number only when it is 1, an item only when it is not empty. */
function beginsBlock(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || (item !== null && Boolean(item[4]?.trim()) && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1))
    || isTable(lines, at);
}

function blockElement(block, depth = 0) {
  switch (block.kind) {
    case "heading":
      // Below the page's own headings, for who reads by headings.
      return element(`h${Math.min(6, block.level + 2)}`, { className: `level-${block.level}` }, ...inlineNodes(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...markdownElements(block.text, depth + 1));
    case "code":
      return codeBlock(block);
    case "list":
      return listElement(block, depth);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, ...inlineNodes(block.text));
  }
}

function listElement(block, depth) {
  const items = block.items.map((blocks) => {
    const children = blocks.flatMap((inner) =>
      inner.kind === "paragraph" && !block.isLoose ? inlineNodes(inner.text) : [blockElement(inner, depth + 1)]);
    return element("li", {}, ...children);
  });
  return block.isOrdered ? element("ol", { start: block.start }, ...items) : element("ul", {}, ...items);
}

function tableElement(block) {
  const row = (tag, texts) => element("tr", {}, ...texts.map((text, column) => {
    const cell = element(tag, {}, ...inlineNodes(text));
    if (block.sides[column]) cell.className = block.sides[column];
    return cell;
  }));
  const table = element("table", {}, element("thead", {}, row("th", block.head)));
  if (block.rows.length) table.append(element("tbody", {}, ...block.rows.map((texts) => row("td", texts))));
  return element("div", { className: "wide-content", tabIndex: 0, role: "region", "aria-label": "Table" }, table);
}

function codeBlock(block) {
  const head = element("div", { className: "code-head" }, element("span", { textContent: block.language || "text" }),
    copyButton("Copy", "Copy this code", () => block.text));
  const code = element("code", { textContent: block.text });
  const pre = element("pre", { tabIndex: 0, role: "region", "aria-label": `Code, ${block.language || "text"}` }, code);
  return element("div", { className: "code" }, head, pre);
}

function markdownElements(text, depth = 0) {
  return markdownBlocks(text, depth).map((block) => blockElement(block, depth));
}

/** Draw `text` in `place`; children that show what they must stay, with what is selected in them. */
function showMarkdown(place, text) {
  const blocks = markdownBlocks(text);
  const drawn = place.drawnBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < drawn.length && blocks[same].source === drawn[same].source
    && blocks[same].isWhole === drawn[same].isWhole) same++;
  while (place.children.length > same) place.lastElementChild.remove();
  place.append(...blocks.slice(same).map((block) => blockElement(block)));
  place.drawnBlocks = blocks;
  return blocks;
}

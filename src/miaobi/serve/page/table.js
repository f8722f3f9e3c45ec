// Tables of texts, read in the browser: encoding, CSV (RFC 4180), and back.
import { Failure } from "./api.js";

const LARGEST = 200 * 2 ** 20;

function decoded(bytes, name) {
  const [a, b] = bytes;
  const marked = a === 0xff && b === 0xfe ? "utf-16le" : a === 0xfe && b === 0xff ? "utf-16be" : null;
  if (!marked && bytes.subarray(0, 65536).includes(0)) throw new Failure("file.binary", { name });
  for (const encoding of marked ? [marked] : ["utf-8", "gb18030"]) {
    try {
      return { text: new TextDecoder(encoding, { fatal: true }).decode(bytes), encoding: encoding.toUpperCase() };
    } catch { /* the next */ }
  }
  throw new Failure("file.encoding", { name });
}

/** Rows of fields; a blank line is one empty field. Throws Failure where a quote is never closed. */
export function parse(text, delimiter) {
  const rows = [];
  let row = [], field = "", at = 0;
  const end = text.length;
  const endField = () => { row.push(field); field = ""; };
  const endRow = () => { endField(); rows.push(row); row = []; };
  while (at < end) {
    const c = text[at];
    if (c === '"' && field === "") {
      const opened = rows.length + 1;
      for (at += 1; ; at += 1) {
        const close = text.indexOf('"', at);
        if (close < 0) throw new Failure("file.quote", { row: opened });
        field += text.slice(at, close);
        at = close + 1;
        if (text[at] !== '"') break;
        field += '"'; // two quotes are one
      }
    } else if (c === delimiter) {
      endField();
      at += 1;
    } else if (c === "\n" || c === "\r") {
      endRow();
      at += c === "\r" && text[at + 1] === "\n" ? 2 : 1;
    } else {
      let stop = at + 1;
      while (stop < end && text[stop] !== delimiter && text[stop] !== "\n" && text[stop] !== "\r") stop += 1;
      field += text.slice(at, stop);
      at = stop;
    }
  }
  if (field !== "" || row.length) endRow();
  while (rows.length && rows.at(-1).length === 1 && rows.at(-1)[0] === "") rows.pop(); // blank lines at the end
  return rows;
}

const unquoted = (text) => text.slice(0, 65536).replace(/"[^"]*"/g, "").split(/\r?\n|\r/, 1)[0];

/** {rows, encoding, isTable} of a chosen file; a text file has one field a line. Throws Failure. */
export async function read(file) {
  const name = file.name;
  if (file.size > LARGEST) throw new Failure("file.big", { name });
  const { text, encoding } = decoded(new Uint8Array(await file.arrayBuffer()), name);
  if (name.toLowerCase().endsWith(".txt")) {
    const lines = text.trimEnd().split(/\r?\n|\r/);
    return { rows: lines[0] || lines.length > 1 ? lines.map((line) => [line]) : [], encoding, isTable: false };
  }
  const first = unquoted(text), count = (c) => first.split(c).length;
  const delimiter = name.toLowerCase().endsWith(".tsv") ? "\t" : [",", "\t", ";"].sort((a, b) => count(b) - count(a))[0];
  return { rows: parse(text, delimiter), encoding, isTable: true };
}

const quoted = (field, _, row) => (/[",\r\n]/.test(field) || (row.length === 1 && field === "") ? `"${field.replaceAll('"', '""')}"` : field);

/** The rows as CSV that Excel opens with its Chinese: a byte order mark, CRLF. */
export const csv = (rows) => `\ufeff${rows.map((row) => row.map(String).map(quoted).join(",")).join("\r\n")}\r\n`;

const NAMES = ["text", "review", "comment", "content", "sentence", "文本", "内容", "评论", "正文", "句子"];

/** Which column most likely holds the texts: by its name, else the longest. */
export function textColumn(header, rows) {
  const named = header.findIndex((name) => NAMES.includes(name.trim().toLowerCase()));
  if (named >= 0) return named;
  const length = header.map((_, i) => rows.slice(0, 50).reduce((sum, row) => sum + (row[i]?.length ?? 0), 0));
  return length.indexOf(Math.max(...length));
}

// Tables of texts, read in the browser: encoding, CSV (RFC 4180), and back.
import { Failure } from "./api.js";

const LARGEST = 200 * 2 ** 20;
// In common use, simplified and traditional. Big5 is mostly valid GB18030 too, but the wrong reading has few of these.
const COMMON = new Set(
  "的是一了在不有我人中个这大国为你以来年上和会时要用发可到能出们多生下他行也好就对于分家作成后道过地日新得方现说业都进开天还动面如前全么自学等同经部高去体主公本子最里看小加之将月比而没其实长那心机与工文" +
  "力化理场者定合点很重所关间些因第内性当事但平数使更通入两果提美表起法并外展电三度建量着球务此次系应然产只目名常区代队手种想安从正件员市今及赛样明制相它问物医军已保知期意特设位水程被斯网做东北利品持统民" +
  "西打或总管海二情示科近头回运式无什元题信资强见联政门据太病哈司路接至金解战推基服十台老吃计由身车少需别给记马又任色增共便個這國爲來會時發們對於後過現說業進開還動麼學經體裏將沒實長機與場點關間內當數兩並" +
  "電務應產區隊種從員賽樣問醫軍設網東統總頭運無題資強見聯門據戰臺喫計車別給記馬結話線兒嗎報萬該創氣領讓變單議導帶項達調選稱處認爾遊類質術習費幾專標邊視組亞傳決節戶級廣號裝規際續風華價藥書張樂營備聽覺顯較" +
  "連確試約參復論準請難寶羅獲條義則轉團衆構辦師語維權億療況護環態濟愛狀謝圖幹證紅歡熱許觀擊黨終雙預驗斷響隨舉優協養歷館評細衛幫僅勢夠羣錯錄卻軟編遠黃適堅蘭識鐵錢勝極買離龍險測劃興職輕碼聲積輸壓爭寫層獎園" +
  "負換滿簡親農屬傷擇賈絡剛檢減監陽雲盡紀採歲圍腦雖講載戲啓飛魚繼責塊屆鍾願歐庫補範織銷奧飯執嚴銀訴購頻穩須畫納練擔島誰灣訪讀緊漢劇獨佔烏縣鍵劉額臨溫輪寧盤腳陸蘇談財殺薦飲蓋藝礎餘衝聞"
  + "，。、！？：；「」“”");

/** Which share of a text's characters beyond ASCII are in common use. */
function common(text) {
  const characters = [...text.slice(0, 50000)].filter((c) => c > "\x7f");
  return characters.filter((c) => COMMON.has(c)).length / Math.max(1, characters.length);
}

function decoded(bytes, name) {
  const [a, b] = bytes;
  const marked = a === 0xff && b === 0xfe ? "utf-16le" : a === 0xfe && b === 0xff ? "utf-16be" : null;
  if (!marked && bytes.subarray(0, 65536).includes(0)) throw new Failure("file.binary", { name });
  const read = (encoding) => {
    try {
      return { text: new TextDecoder(encoding, { fatal: true }).decode(bytes), encoding: encoding.toUpperCase() };
    } catch { return null; }
  };
  const sure = read(marked ?? "utf-8");
  if (sure) return sure;
  const [gb, big5] = marked ? [] : [read("gb18030"), read("big5")];
  if (!gb && !big5) throw new Failure("file.encoding", { name });
  return !gb || (big5 && common(big5.text) > common(gb.text)) ? big5 : gb;
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

// Tokens to characters: a cell is what a person sees, however many byte pieces the model wrote it in.

const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const encoder = new TextEncoder();

/** How many bytes at the end belong to a character that is not whole yet. */
function unfinished(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back += 1) {
    const byte = bytes[bytes.length - back];
    if (byte < 0x80) return 0;
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) ? back : 0;
  }
  return 0;
}

const PIECE = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // as OpenAI names bytes that are no whole character

/** The bytes that the name of a token stands for; `bytes` where the server said them. */
function bytesOf(token, bytes) {
  if (bytes?.length) return bytes;
  const piece = PIECE.exec(token);
  return piece ? piece[1].slice(2).split("\\x").map((hex) => parseInt(hex, 16)) : [...encoder.encode(token)];
}

/** Whether these bytes are characters, whole ones only. */
export function whole(bytes) {
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes));
    return true;
  } catch {
    return false;
  }
}

export const decode = (bytes) => decoder.decode(new Uint8Array(bytes));

/** Joins tokens into cells as they come: {text, logprob, pieces: [{logprob, alternatives}]}. */
export class Joiner {
  constructor() {
    this.bytes = [];
    this.pieces = [];
  }

  /** One token more; the cell that it finishes, or null. */
  add(token, bytes, logprob, top) {
    this.bytes.push(...bytesOf(token, bytes));
    const alternatives = Object.entries(top ?? {}).map(([name, value]) => ({ name, bytes: bytesOf(name), logprob: value }));
    this.pieces.push({ logprob, alternatives: alternatives.sort((a, b) => b.logprob - a.logprob) });
    return unfinished(this.bytes) ? null : this.end();
  }

  /** The cell of what is there, whole or not; null where nothing is. */
  end() {
    if (!this.pieces.length) return null;
    const cell = { text: decode(this.bytes), pieces: this.pieces,
                   logprob: this.pieces.reduce((sum, piece) => sum + (piece.logprob ?? 0), 0) };
    this.bytes = [];
    this.pieces = [];
    return cell;
  }
}

/** How dark a cell is, 0 to 1: nothing at probability 1, all of it at 1 in 1,000. */
export const surprise = (logprob) => Math.min(1, Math.max(0, -logprob / Math.log(1000)));

// Byte-pair encoding as tiktoken does it, from the bundle's ranks. Special tokens inside a text are plain text.

const NO_TOKEN = new Uint8Array([0xef, 0xbf, 0xbd]); // U+FFFD: ids of a padded vocabulary that stand for nothing

export class Tokenizer {
  // `spec` is the manifest's tokenizer; `file` the text of its ranks, one "base64 rank" a line.
  constructor({ pattern, special_tokens }, file) {
    this.tokens = file.trimEnd().split("\n").map((line) => atob(line.split(" ")[0])); // one letter a byte
    this.ranks = new Map(this.tokens.map((token, rank) => [token, rank]));
    this.special = new Map(Object.entries(special_tokens).map(([text, id]) => [id, new TextEncoder().encode(text)]));
    this.pattern = new RegExp(toJavaScript(pattern), "gu");
  }

  encode(text) {
    const pieces = text.match(this.pattern) ?? [];
    return pieces.flatMap((piece) => this.merge(binary(new TextEncoder().encode(piece))));
  }

  // Join the pair of lowest rank until no pair is a token.
  merge(piece) {
    if (this.ranks.has(piece)) return [this.ranks.get(piece)];
    const parts = [...piece];
    const rankAt = (i) => this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
    const pairs = parts.slice(1).map((_, i) => rankAt(i));
    for (;;) {
      const rank = pairs.reduce((least, rank) => Math.min(least, rank), Infinity);
      if (rank === Infinity) return parts.map((part) => this.ranks.get(part));
      const at = pairs.indexOf(rank);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
      pairs.splice(at, 1);
      if (at > 0) pairs[at - 1] = rankAt(at - 1);
      if (at < pairs.length) pairs[at] = rankAt(at);
    }
  }

  bytes(id) {
    if (id < this.tokens.length) return Uint8Array.from(this.tokens[id], (letter) => letter.charCodeAt(0));
    return this.special.get(id) ?? NO_TOKEN;
  }
}

// JavaScript has no possessive quantifiers, and its \s is not Unicode's white space (U+0085, U+FEFF).
function toJavaScript(pattern) {
  const greedy = pattern.replace(/([+*?}])\+/g, "$1");
  return greedy.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
}

function binary(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

#!/usr/bin/env python3
"""Writes small_neox.json, a tokenizer.json like 20B_tokenizer.json but small, and small_neox_cases.json, texts and their ids.

Usage: make_small_neox.py FOLDER

The ids come from a plain encoder below that shares nothing with the C++ one; `unicodedata` is its Unicode. The same encoder
gives, for the published 20B_tokenizer.json, the ids of Hugging Face's tokenizers.
"""
import collections
import json
import sys
import unicodedata

# What merges are learned from; repeats make longer tokens.
TEXT = (
    "the old man said that there is a house by the river, and the river is old. The house is there. "
    "it's what they'll say, don't you think? we've 12 and 30 and 2024. for (int i = 0; i < 10; ++i) { sum += i; }\n\n"
    "der Fluß ist groß und schön. где старый дом? в доме живёт старик. 在小房子里，老人说：你好，世界。日本語のテキスト。 हिन्दी में। 👍🏽😀 é ü ñ\n"
)
MERGES = 260

SPACES = set("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def alphabet():
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    return {**{byte: chr(byte) for byte in prints}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


ALPHABET = alphabet()


def spell(word):
    return "".join(ALPHABET[byte] for byte in word.encode())


def kind(character):
    if character in SPACES:
        return "s"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "o"


def words(text):
    """GPT-2's pattern, one match after the other."""
    at = 0
    while at < len(text):
        contraction = next((c for c in CONTRACTIONS if text.startswith(c, at)), None)
        first = at + (text[at] == " ")
        if contraction:
            end = at + len(contraction)
        elif first < len(text) and kind(text[first]) != "s":
            end = first
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
        else:
            end = at
            while end < len(text) and kind(text[end]) == "s":
                end += 1
            if end < len(text) and end - at > 1:
                end -= 1
        yield text[at:end]
        at = end


def merge(parts, pair):
    merged, i = [], 0
    while i < len(parts):
        if tuple(parts[i:i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


def learn(text):
    counts = collections.Counter(spell(word) for word in words(text))
    pieces = {word: list(word) for word in counts}
    merges = []
    for _ in range(MERGES):
        pairs = collections.Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break  # Every word is one piece.
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: merge(parts, best) for word, parts in pieces.items()}
    return merges


def cut(text, needles):
    """[(is_needle, piece)], leftmost and longest."""
    pieces, begin, at = [], 0, 0
    while at < len(text):
        hit = max((n for n in needles if text.startswith(n, at)), key=len, default=None)
        if hit is None:
            at += 1
            continue
        pieces += [(False, text[begin:at]), (True, hit)]
        begin = at = at + len(hit)
    return [piece for piece in pieces + [(False, text[begin:])] if piece[1]]


class Encoder:
    def __init__(self, tokenizer):
        self.vocab = tokenizer["model"]["vocab"]
        self.merges = [tuple(m.split(" ")) for m in tokenizer["model"]["merges"]]
        self.added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        self.raw = [token["content"] for token in tokenizer["added_tokens"] if not token["normalized"]]
        self.normalized = [token["content"] for token in tokenizer["added_tokens"] if token["normalized"]]

    def word(self, word):
        parts = list(spell(word))
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        while True:
            ranked = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
            if not ranked:
                return [self.vocab[part] for part in parts]
            i = min(ranked)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

    def encode(self, text):
        ids = []
        for is_added, piece in cut(text, self.raw):
            if is_added:
                ids.append(self.added[piece])
                continue
            for is_added, part in cut(unicodedata.normalize("NFC", piece), self.normalized):
                ids += [self.added[part]] if is_added else [i for word in words(part) for i in self.word(word)]
        return ids


def make_tokenizer():
    specials = ["<|endoftext|>", "<|padding|>"]
    unused = {0xC0, 0xC1, *range(0xF5, 0x100)}  # As there: bytes that UTF-8 does not use have no token.
    merges = learn(TEXT)
    entries = specials + [ALPHABET[byte] for byte in range(256) if byte not in unused]
    entries += sorted({left + right for left, right in merges} - set(entries), key=lambda e: (len(e), e))
    blanks = [" " * n for n in range(24, 1, -1)]
    added = [(i, text, True) for i, text in enumerate(specials)]
    added += [(len(entries) + i, text, False) for i, text in enumerate(blanks)]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "special": special, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": not special} for i, text, special in added],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False,
            "vocab": {entry: i for i, entry in enumerate(entries)},
            "merges": [" ".join(pair) for pair in merges]},
    }


CASES = [
    "", "a", " ", "\n", "\n\n", "the house", "The  house", "the" * 9, "thethe there river's", "  two   three    four",
    " " * 23, " " * 24 + "x", " " * 50, "x" + " " * 49 + "y", "\t \t\tx", "a \n b\n\n\n c", "a\r\nb\r\n\r\n", " \u00a0 \u3000 x",
    "it's they'll don't WE'LL 'S 's'sup y'all we've I'm he'd you're ''s '", "12 and 30, 2024; x²½ Ⅷ ١٢٣", "for (int i = 0; i < 10; ++i) {",
    "    sum += i;\n        // deep\n", "Fluß GROSS schön naïve café", "cafe\u0301 n\u0303 A\u030a\u0327 e\u0327\u0301 q\u0307\u0323", "\u1e9b\u0323 \u0344 \u212b \u2126 \u0958",
    "\u1100\u1161\u11a8 가\u11a8 \uac00", "где старый дом", "и\u0306 е\u0308", "在小房子里，老人说：你好，世界。", "日本語のテキスト か\u3099 ガ", "हिन्दी में ज़\u093c", "👍🏽😀 👨‍👩‍👧 🇩🇪",
    "a\u200bb\ufeffc\u0085d\u2028e\u180ef", "\u0000\u0001\u001f\u007f", "<|endoftext|>a<|padding|><|endoftext|> b", "<|endoftext", "e<|endoftext|>\u0301",
    "\ufffd\ufffe\U0010ffff\U000e0001", "_-_ __init__ a.b.c http://x.y/z?q=1", "ǅ ʰ ª º ⅰ", "x" * 40, "ab" * 30, "aaaa" + "the" * 20 + "zzz",
]


def main():
    folder = sys.argv[1]
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer)
    with open(f"{folder}/small_neox.json", "w", encoding="utf-8") as f:
        json.dump(tokenizer, f, ensure_ascii=False, indent=0, separators=(",", ":"))
        f.write("\n")
    with open(f"{folder}/small_neox_cases.json", "w", encoding="ascii") as f:
        cases = [{"text": text, "nfc": unicodedata.normalize("NFC", text), "ids": encoder.encode(text)} for text in CASES]
        f.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()

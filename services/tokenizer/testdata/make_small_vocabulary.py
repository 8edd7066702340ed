#!/usr/bin/env python3
"""Writes small_vocabulary.txt: a vocabulary in World format with every kind of literal that the published one has.

Usage: make_small_vocabulary.py > small_vocabulary.txt
"""
import sys

WORDS = [
    # Plain text, and prefixes of each other, so that the longest has to win.
    "th", "the", "there", "therefore", " the", " there", "User", ":", "Assistant", "abc", "abcd", "bcdefg", "aa", "aaaa",
    # Blanks, line ends, quotes, backslashes: what repr() escapes or changes its quotes for.
    "  ", "    ", " " * 128, "\n\n", "\r\n", "\t\t", "'s", "''", '""', "'\"", "\\n", "\\\\", " '", '" ',
    # Code points below 256 that repr() writes as \\xHH in a str, others as \\uHHHH, CJK and emoji as themselves.
    "\x80", "\x9f", "\xa0", "\xad", "\u200b", "\u2028", "\u3000", "\ufeff", "é", "ü", "你", "你好", "世界", "日本語", "😀", "👍🏽",
]
# Pieces of characters: not UTF-8 alone.
PIECES = [b"\xe4\xbd", b"\xbd\xa0", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xc3\xa9\xc3", b"a\xe4", b" \xe4\xb8"]

single = [bytes([byte]) for byte in range(256)]
longer = sorted({word.encode() for word in WORDS + ["\x85"]} | set(PIECES), key=lambda token: (len(token), token))
for token_id, token in enumerate(single + [token for token in longer if len(token) > 1], start=1):
    try:
        literal = repr(token.decode())
    except UnicodeDecodeError:
        literal = repr(token)
    sys.stdout.buffer.write(f"{token_id} {literal} {len(token)}\n".encode())

#!/usr/bin/env python3
"""Makes a vocabulary in the World file format for the demo model.

  make_vocabulary.py --text DIR --out FILE [--size 4096]

Lines are `<id> <Python literal> <bytes>`: ids 1..256 are the single bytes 0x00..0xFF, then longer tokens by length.
Candidates come from byte-pair merges over words (with their leading blank); what a merge order favours is not what
greedy longest match uses, so the list is made half as long again, the sample is tokenised by longest match, the least
used tokens are dropped, and that is repeated until the size is right. Only training text is read.
"""

import argparse
import collections
import heapq
import os
import re

# Always there: turns of a chat, paragraph ends as prose has them.
FIXED = [b"\n\n", b"User:", b"Assistant:", b"\n\nUser:", b".\n\n", b'."\n\n']
WORD = re.compile(rb" ?[A-Za-z]+(?:'(?:s|t|ll|re|ve|d|m)\b)?| ?[0-9]| ?[^A-Za-z0-9\s]+| +|\n+|[^\S \n]+")
SAMPLE_BYTES = {"books": 24_000_000, "reference": 2_000_000, "chat": 4_000_000}


def read_sample(folder):
    """Evenly spaced pieces of the training text, so that every book has a say."""
    pieces = []
    for part, size in SAMPLE_BYTES.items():
        with open(os.path.join(folder, part + ".train.txt"), "rb") as f:
            data = f.read()
        step = max(1, len(data) // max(1, size // 20_000))
        pieces += [data[i:i + min(20_000, step)] for i in range(0, len(data), step)]
    return pieces


def byte_pair_tokens(counts, merges):
    """The tokens of the first merges, each a byte string; words are merged apart from each other."""
    words = [[bytes([b]) for b in word] for word in counts]
    weight = list(counts.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for i, parts in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += weight[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = []
    while len(tokens) < merges and heap:
        negative, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:
            continue  # an old entry; a newer one is in the heap
        if pairs[pair] < 2:
            break
        joined = pair[0] + pair[1]
        tokens.append(joined)
        changed = set()
        for i in where.pop(pair):
            old = words[i]
            for p in zip(old, old[1:]):
                pairs[p] -= weight[i]
                changed.add(p)
            new, j = [], 0
            while j < len(old):
                if j + 1 < len(old) and (old[j], old[j + 1]) == pair:
                    new.append(joined)
                    j += 2
                else:
                    new.append(old[j])
                    j += 1
            words[i] = new
            for p in zip(new, new[1:]):
                pairs[p] += weight[i]
                where[p].add(i)
                changed.add(p)
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
        if len(tokens) % 1000 == 0:
            print(len(tokens), "merges", flush=True)
    return tokens


def longest_match(word, vocabulary, longest):
    start = 0
    while start < len(word):
        for end in range(min(len(word), start + longest), start, -1):
            if word[start:end] in vocabulary or end == start + 1:
                yield word[start:end]
                start = end
                break


def literal(token):
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder that fetch_text.py wrote")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", type=int, default=4096, help="ids in all, document end and the 256 bytes included")
    options = parser.parse_args()
    wanted = options.size - 257
    counts = collections.Counter()
    for piece in read_sample(options.text):
        counts.update(WORD.findall(piece))
    counts = collections.Counter({w: n for w, n in counts.items() if n > 1})
    print(len(counts), "different words in the sample", flush=True)
    tokens = set(t for t in byte_pair_tokens(counts, wanted * 3 // 2) if len(t) <= 24) | set(FIXED)
    # Words end where the pattern says, while longest match may run across: " a" + "." is one word here, "." + "\n\n"
    # two. The fixed tokens are the only ones that cross, so counting word by word is exact but for those.
    while len(tokens) > wanted:
        longest = max(map(len, tokens))
        used = collections.Counter()
        for word, n in counts.items():
            for token in longest_match(word, tokens, longest):
                used[token] += n
        spare = sorted((t for t in tokens if t not in FIXED), key=lambda t: (used[t] * (len(t) - 1), t))
        drop = min(len(tokens) - wanted, max(1, len(tokens) // 20))
        print(
            f"{len(tokens)} tokens, {sum(len(w) * n for w, n in counts.items()) / sum(used.values()):.3f} bytes a token",
            flush=True)
        tokens -= set(spare[:drop])
    rows = [bytes([b]) for b in range(256)] + sorted(tokens, key=lambda t: (len(t), t))
    with open(options.out, "w", encoding="utf-8", newline="\n") as f:
        for i, token in enumerate(rows, 1):
            f.write(f"{i} {literal(token) if len(token) > 1 or token[0] < 128 else repr(token)} {len(token)}\n")
    print(options.out, len(rows) + 1, "ids")


if __name__ == "__main__":
    main()

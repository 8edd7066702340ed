#!/usr/bin/env python3
"""Measures the demo model as it is shipped: numpy only, no PyTorch; pyppmd (PyPI) for the PPM line.

  evaluate.py heldout     --text DIR   bits per byte of held-out text, by part and by position up to 8,192 tokens
  evaluate.py file FILE                bits per byte of any text, fed as one document after id 0
  evaluate.py compressors --text DIR --training FILE
                                       xz -9e and PPMd on the same held-out bytes, alone and after the training text
  evaluate.py needle      --text DIR   a fact hidden in 480 tokens of held-out prose, asked for at the end
  evaluate.py sample                   answers and continuations

DIR is what fetch_text.py wrote. Each line printed is one JSON object. The model is the recurrence of RWKV-7 with its
state in fp32, many sequences side by side.
"""

import argparse
import ast
import json
import lzma
import math
import os
import random
import struct
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
PIECES = {"books": 16, "reference": 2, "chat": 4}


def read_safetensors(path):
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        data = f.read()
    weights = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            blob = data[slice(*tensor["data_offsets"])]
            if tensor["dtype"] == "BF16":
                values = (np.frombuffer(blob, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(blob, {"F16": np.float16, "F32": np.float32}[tensor["dtype"]]).astype(np.float32)
            weights[name] = values.reshape(tensor["shape"])
    return weights


class Tokenizer:
    """Greedy longest match; a vocabulary file in the World format."""

    def __init__(self, path):
        self.tokens = [b""]
        with open(path, "rb") as f:
            for line in f.read().decode("utf-8").split("\n"):
                if line:
                    value = ast.literal_eval(line[line.index(" ") + 1:line.rindex(" ")])
                    self.tokens.append(value.encode("utf-8") if isinstance(value, str) else value)
        self.ids = {token: i for i, token in enumerate(self.tokens) if token}
        self.longest = max(map(len, self.tokens))

    def encode(self, data):
        result, at = [], 0
        while at < len(data):
            size = min(self.longest, len(data) - at)
            while data[at:at + size] not in self.ids:
                size -= 1
            result.append(self.ids[data[at:at + size]])
            at += size
        return result

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, w, b):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * w + b


class Model:
    """RWKV-7, one token of every sequence at a time."""

    def __init__(self, path):
        w = self.weights = {k: v.reshape(-1) if v.ndim == 3 else v for k, v in read_safetensors(path).items()}
        self.layers = 1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks."))
        self.table = layer_norm(w["emb.weight"], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
        self.heads, self.head = w["blocks.0.att.r_k"].shape

    def zero_state(self, batch):
        width = self.heads * self.head
        return [[
            np.zeros((batch, width), np.float32),
            np.zeros((batch, self.heads, self.head, self.head), np.float32),
            np.zeros((batch, width), np.float32)
        ] for _ in range(self.layers)]

    def step(self, ids, state):
        """ids [B] -> logits [B, V]; changes state."""
        w, x, v_first = self.weights, self.table[ids], None
        by_head = (len(ids), self.heads, self.head)
        for layer in range(self.layers):
            p = f"blocks.{layer}."
            a = p + "att."
            h = layer_norm(x, w[p + "ln1.weight"], w[p + "ln1.bias"])
            delta = state[layer][0] - h
            state[layer][0] = h
            at = {m: h + delta * w[a + "x_" + m] for m in "rwkvag"}
            r, k, v = (at[m] @ w[a + n + ".weight"].T for m, n in (("r", "receptance"), ("k", "key"), ("v", "value")))
            decay = np.exp(-math.exp(-0.5) * sigmoid(w[a + "w0"] + np.tanh(at["w"] @ w[a + "w1"]) @ w[a + "w2"]))
            iclr = sigmoid(w[a + "a0"] + at["a"] @ w[a + "a1"] @ w[a + "a2"])
            gate = sigmoid(at["g"] @ w[a + "g1"]) @ w[a + "g2"]
            if layer == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(w[a + "v0"] + at["v"] @ w[a + "v1"] @ w[a + "v2"])
            kappa = (k * w[a + "k_k"]).reshape(by_head)
            kappa = kappa / np.maximum(np.sqrt(np.square(kappa).sum(-1, keepdims=True)), 1e-12)
            k = (k * (1 + (iclr - 1) * w[a + "k_a"])).reshape(by_head)
            r, v_head, decay, iclr = (t.reshape(by_head) for t in (r, v, decay, iclr))
            s = state[layer][1]
            recall = s @ -kappa[..., None]
            s = s * decay[:, :, None, :] + recall * (kappa * iclr)[:, :, None, :] + v_head[..., None] * k[:, :, None, :]
            state[layer][1] = s
            y = (s @ r[..., None])[..., 0]
            y = y - y.mean(-1, keepdims=True)
            y = (y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 64e-5)).reshape(x.shape)
            y = y * w[a + "ln_x.weight"] + w[a + "ln_x.bias"]
            y = y + ((r * k * w[a + "r_k"]).sum(-1, keepdims=True) * v_head).reshape(x.shape)
            x = x + (y * gate) @ w[a + "output.weight"].T
            h = layer_norm(x, w[p + "ln2.weight"], w[p + "ln2.bias"])
            mixed = h + (state[layer][2] - h) * w[p + "ffn.x_k"]
            state[layer][2] = h
            x = x + np.square(np.maximum(mixed @ w[p + "ffn.key.weight"].T, 0)) @ w[p + "ffn.value.weight"].T
        return layer_norm(x, w["ln_out.weight"], w["ln_out.bias"]) @ w["head.weight"].T

    def score(self, rows, progress=False):
        """rows [B, T] of ids that follow an id 0 -> nats [B, T]."""
        rows = np.asarray(rows)
        state, previous = self.zero_state(len(rows)), np.zeros(len(rows), np.int64)
        nats, started = np.empty(rows.shape), time.time()
        for t in range(rows.shape[1]):
            logits = self.step(previous, state)
            top = logits.max(-1, keepdims=True)
            nats[:, t] = np.log(np.exp(logits - top).sum(-1)) + top[:, 0] - logits[np.arange(len(rows)), rows[:, t]]
            previous = rows[:, t]
            if progress and t and t % 1000 == 0:
                print(json.dumps({
                    "scored": t,
                    "of": rows.shape[1],
                    "seconds": round(time.time() - started)
                }),
                      flush=True)
        return nats


def heldout_pieces(folder, tokenizer, part, count, length):
    """[(ids of one piece, its bytes)]: evenly spaced in the held-out text of the part, each from the start of a
    paragraph."""
    with open(os.path.join(folder, part + ".heldout.txt"), "rb") as f:
        data = f.read().replace(b"\0", b"\n\n" if part != "chat" else b"")
    pieces, stride = [], len(data) // count
    for n in range(count):
        begin = data.find(b"\n\n", n * stride) + 2 if n else 0
        ids = tokenizer.encode(data[begin:begin + 6 * length])[:length]
        pieces.append((ids, tokenizer.decode(ids)))
    return [p for p in pieces if len(p[0]) == length]


def bits_per_byte(nats, size):
    return round(float(nats) / math.log(2) / size, 4)


def heldout(options, model, tokenizer):
    parts, rows = [], []
    for part, count in PIECES.items():
        for ids, text in heldout_pieces(options.text, tokenizer, part, count, options.piece):
            parts.append((part, len(text)))
            rows.append(ids)
    nats = model.score(rows, progress=True)
    for part in (*PIECES, "total"):
        mine = [i for i, (name, _) in enumerate(parts) if part in (name, "total")]
        if mine:
            size = sum(parts[i][1] for i in mine)
            print(json.dumps({
                "part": part,
                "tokens": len(mine) * options.piece,
                "bytes": size,
                "nats_per_token": round(float(nats[mine].mean()), 4),
                "bits_per_byte": bits_per_byte(nats[mine].sum(), size)
            }),
                  flush=True)
    books = nats[[i for i, (name, _) in enumerate(parts) if name == "books"]]
    for begin, end in ((0, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096,
                                                                                                             8192)):
        if begin < options.piece:
            print(
                json.dumps({
                    "books_positions": [begin, end],
                    "nats_per_token": round(float(books[:, begin:end].mean()), 4)
                }))


def score_file(options, model, tokenizer):
    with open(options.file, "rb") as f:
        data = f.read()
    ids = tokenizer.encode(data)
    nats = model.score([ids])
    print(
        json.dumps({
            "tokens": len(ids),
            "bytes": len(data),
            "nats_per_token": round(float(nats.mean()), 4),
            "bits_per_byte": bits_per_byte(nats.sum(), len(data))
        }))


def compressors(options, tokenizer):
    """Bits per byte that the same held-out pieces cost xz and PPMd, alone and after the text that the model was trained
    on."""
    texts = {
        part: b"".join(t for _, t in heldout_pieces(options.text, tokenizer, part, count, options.piece))
        for part, count in PIECES.items()
    }
    with open(options.training, "rb") as f:
        training = f.read()
    primed = f"primed with {len(training) / 1e6:.1f} MB"

    def report(name, sizes):
        """sizes: bytes of code after the priming and after each part, all from the beginning."""
        row, total = {"compressor": name}, sum(map(len, texts.values()))
        for n, (part, text) in enumerate(texts.items()):
            row[part] = round(8 * (sizes[n + 1] - sizes[n]) / len(text), 4)
        print(json.dumps({**row, "total": round(8 * (sizes[-1] - sizes[0]) / total, 4), "bytes": total}), flush=True)

    def xz_size(data):
        # Matches reach back over all of it.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(1 << 26, len(data))}]
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)) if data else 0

    for name, before in (("xz -9e", b""), (f"xz -9e, {primed}", training)):
        sizes = [xz_size(before)]
        for text in texts.values():
            before += text
            sizes.append(xz_size(before))
        report(name, sizes)
    try:
        import pyppmd
    except ImportError:
        print(json.dumps({"compressor": "PPMd", "skipped": "pip install pyppmd"}))
        return
    for name, before in ("", b""), (f", {primed}", training):
        for order in options.orders:
            encoder, size, sizes = pyppmd.Ppmd7Encoder(order, options.ppmd_mb << 20), 0, []
            for text in (before, *texts.values()):
                for i in range(0, len(text), 1 << 20):
                    size += len(encoder.encode(text[i:i + (1 << 20)]))
                sizes.append(size)
            sizes[-1] += len(encoder.flush())
            report(f"PPMd (7-zip's variant H) order {order}{name}", sizes)


NEEDLES = [
    "amber", "silver", "winter", "garden", "candle", "bridge", "forest", "yellow", "copper", "island", "orange",
    "marble", "ribbon", "purple", "summer", "velvet"
]


def needle(options, model, tokenizer):
    """The right word among 16 by its probability; chance is 1 in 16. Depth is the share of the text before the fact."""
    source, rows, facts = random.Random(5), [], []
    pieces = heldout_pieces(options.text, tokenizer, "books", 16, 8192)
    question = tokenizer.encode(b'\n\n"The secret word of the castle is')
    for depth in (0.0, 0.25, 0.5, 0.75, 0.95):
        for ids, _ in pieces:
            word = source.choice(NEEDLES)
            fact = tokenizer.encode(b'\n\n"The secret word of the castle is ' + word.encode() +
                                    b'," said the old man.\n\n')
            begin = source.randrange(4000)
            rest = 480 - len(fact) - len(question)
            cut = int(rest * depth)
            filler = ids[begin:begin + rest]
            rows.append(filler[:cut] + fact + filler[cut:] + question)
            facts.append((depth, NEEDLES.index(word)))
    length = min(map(len, rows))
    rows = np.array([row[len(row) - length:] for row in rows])
    state, previous = model.zero_state(len(rows)), np.zeros(len(rows), np.int64)
    for t in range(length):
        model.step(previous, state)
        previous = rows[:, t]
    logits = model.step(previous, state)
    copies = [[part.copy() for part in layer] for layer in state]
    scores = np.zeros((len(rows), len(NEEDLES)))
    for n, word in enumerate(NEEDLES):
        now, state = logits, [[part.copy() for part in layer] for layer in copies]
        for i in tokenizer.encode(b" " + word.encode()):
            top = now.max(-1, keepdims=True)
            scores[:, n] += now[:, i] - top[:, 0] - np.log(np.exp(now - top).sum(-1))
            now = model.step(np.full(len(rows), i), state)
    # What a word costs without a fact is taken off: the mean over the trials in which another word was the fact.
    answers = np.array([answer for _, answer in facts])
    for n in range(len(NEEDLES)):
        scores[:, n] -= scores[answers != n, n].mean()
    right = scores.argmax(-1) == answers
    for depth in (0.0, 0.25, 0.5, 0.75, 0.95):
        mine = [i for i, (d, _) in enumerate(facts) if d == depth]
        print(
            json.dumps({
                "needle_depth": depth,
                "tokens": int(length),
                "right": int(right[mine].sum()),
                "of": len(mine),
                "chance": 1 / 16
            }))


def generate(model, tokenizer, prompt, tokens, temperature, top_p, seed, stop=None):
    state, ids, source = model.zero_state(1), [], np.random.default_rng(seed)
    for i in [0] + tokenizer.encode(prompt.encode()):
        logits = model.step(np.array([i]), state)[0]
    while len(ids) < tokens:
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / temperature)
            order = np.argsort(-p)
            p = p[order] / p.sum()
            keep = max(1, int((p.cumsum() < top_p).sum()) + 1)
            choice = int(source.choice(order[:keep], p=p[:keep] / p[:keep].sum()))
        if choice == 0:
            break
        ids.append(choice)
        text = tokenizer.decode(ids)
        if stop and stop in text:
            return text[:text.index(stop)].decode("utf-8", "replace")
        logits = model.step(np.array([choice]), state)[0]
    return tokenizer.decode(ids).decode("utf-8", "replace")


def sample(options, model, tokenizer):
    for question in ("What is a harbor?", "What is a dog?", "What is water?", "What is a king?",
                     "What does it mean to run?", "Define courage.", "Who are you?", "What is a lighthouse?",
                     "What is a teacher?", "What is music?"):
        print("User:", question)
        print("Assistant:",
              generate(model, tokenizer, f"User: {question}\n\nAssistant:", 60, 0, 1, 0, stop=b"\n\n").strip())
    for n, start in enumerate(("It was a dark night, and the rain", "Once upon a time there was a little girl who",
                               "The old man looked at the ship and")):
        print("---")
        print(start + generate(model, tokenizer, start, 120, 0.8, 0.8, options.seed + n))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heldout", "file", "compressors", "needle", "sample"))
    parser.add_argument("file", nargs="?")
    parser.add_argument("--text")
    parser.add_argument("--piece", type=int, default=8192, help="tokens of a held-out piece; it follows an id 0")
    parser.add_argument("--model", default=os.path.join(HERE, "rwkv7_demo.safetensors"))
    parser.add_argument("--vocabulary", default=os.path.join(HERE, "rwkv7_demo.vocab.txt"))
    parser.add_argument("--training", help="the text that the model was trained on: training.txt of train.py's --run")
    parser.add_argument("--orders", type=int, nargs="*", default=[6, 8, 12, 16], help="of PPMd")
    parser.add_argument("--ppmd-mb", type=int, default=3000, help="memory of PPMd")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tokenizer = Tokenizer(options.vocabulary)
    if options.what == "compressors":
        return compressors(options, tokenizer)
    model = Model(options.model)
    {
        "heldout": heldout,
        "file": score_file,
        "needle": needle,
        "sample": sample
    }[options.what](options, model, tokenizer)


if __name__ == "__main__":
    main()

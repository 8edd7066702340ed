#!/usr/bin/env python3
"""Tests of the shipped files that need only Python's library: vocabulary, shapes and metadata of the model, sources."""

import ast
import json
import math
import os
import re
import struct
import sys
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
VOCABULARY = os.path.join(HERE, "rwkv7_demo.vocab.txt")
MODEL = os.path.join(HERE, "rwkv7_demo.safetensors")


def read_vocabulary():
    """{id: bytes}; splits on line feed only and at the first and last blank, as the format asks."""
    tokens = {}
    with open(VOCABULARY, "rb") as f:
        for line in f.read().decode("utf-8").split("\n"):
            if line:
                first, last = line.index(" "), line.rindex(" ")
                value = ast.literal_eval(line[first + 1:last])
                token = value.encode("utf-8") if isinstance(value, str) else value
                assert len(token) == int(line[last + 1:]), line
                tokens[int(line[:first])] = token
    return tokens


def encode(data, ids):
    longest, result, at = max(map(len, ids)), [], 0
    while at < len(data):
        size = next(n for n in range(min(longest, len(data) - at), 0, -1) if data[at:at + n] in ids)
        result.append(ids[data[at:at + size]])
        at += size
    return result


class VocabularyTest(unittest.TestCase):
    def setUp(self):
        self.tokens = read_vocabulary()

    def test_ids_are_the_bytes_then_longer_tokens_by_length(self):
        self.assertEqual(sorted(self.tokens), list(range(1, len(self.tokens) + 1)))
        self.assertEqual([self.tokens[i] for i in range(1, 257)], [bytes([b]) for b in range(256)])
        sizes = [len(self.tokens[i]) for i in range(257, len(self.tokens) + 1)]
        self.assertEqual(sizes, sorted(sizes))
        self.assertEqual(len(set(self.tokens.values())), len(self.tokens))

    def test_any_bytes_come_back(self):
        ids = {token: i for i, token in self.tokens.items()}
        for data in (b"User: What is a harbor?\n\nAssistant:", "na\u00efve caf\u00e9 \u2014 \u4f60\u597d".encode(), bytes(range(256)), b""):
            self.assertEqual(b"".join(self.tokens[i] for i in encode(data, ids)), data)

    def test_turns_of_a_chat_are_single_tokens(self):
        values = set(self.tokens.values())
        self.assertTrue({b"\n\n", b"User:", b"Assistant:"} <= values)


class ModelFileTest(unittest.TestCase):
    def setUp(self):
        with open(MODEL, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            self.header = json.loads(f.read(size))
            self.data_bytes = os.path.getsize(MODEL) - 8 - size
        self.metadata = self.header.pop("__metadata__")

    def test_size_and_offsets(self):
        self.assertLessEqual(os.path.getsize(MODEL), 16_000_000)
        at = 0
        for name, tensor in self.header.items():
            self.assertEqual(tensor["data_offsets"][0], at, name)
            at = tensor["data_offsets"][1]
            self.assertEqual(at - tensor["data_offsets"][0], 2 * math.prod(tensor["shape"]), name)
            self.assertIn(tensor["dtype"], ("BF16", "F16"))
        self.assertEqual(at, self.data_bytes)

    def test_shapes_are_those_of_published_checkpoints(self):
        shapes = {name: tensor["shape"] for name, tensor in self.header.items()}
        rows, width = shapes["emb.weight"]
        self.assertEqual(rows, len(read_vocabulary()) + 1)
        self.assertEqual(shapes["head.weight"], [rows, width])
        layers = 1 + max(int(m.group(1)) for m in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if m)
        for layer in range(layers):
            block = f"blocks.{layer}."
            for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
                self.assertEqual(shapes[block + "att." + name], [1, 1, width])
            self.assertEqual(shapes[block + "att.r_k"], [width // 64, 64])
            for name in "wag":
                self.assertEqual(shapes[block + f"att.{name}1"], shapes[block + f"att.{name}2"][::-1])
            self.assertEqual(block + "att.v0" in shapes, layer > 0)
            self.assertEqual(shapes[block + "ffn.key.weight"], [4 * width, width])
            self.assertEqual(shapes[block + "ffn.value.weight"], [width, 4 * width])
            self.assertEqual(block + "ln0.weight" in shapes, layer == 0)

    def test_metadata_names_what_a_user_needs(self):
        self.assertEqual(self.metadata["vocabulary"], os.path.basename(VOCABULARY))
        for key in ("template", "training_text", "licence", "tokens_seen", "training_loss_nats_per_token"):
            self.assertTrue(self.metadata.get(key), key)


class SourcesTest(unittest.TestCase):
    def test_every_source_is_pinned_and_nothing_is_both_trained_on_and_held_out(self):
        with open(os.path.join(HERE, "sources.json"), encoding="utf-8") as f:
            sources = json.load(f)
        books = sources["books"]["files"]
        for source in books + sources["packages"]:
            self.assertRegex(source["sha256"], r"^[0-9a-f]{64}$")
        self.assertRegex(sources["books"]["commit"], r"^[0-9a-f]{40}$")
        self.assertEqual(len({book["path"] for book in books}), len(books))
        self.assertEqual({book["split"] for book in books}, {"train", "heldout"})


if __name__ == "__main__":
    unittest.main(verbosity=2)

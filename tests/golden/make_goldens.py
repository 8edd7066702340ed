#!/usr/bin/env python3
"""Makes the golden files beside it: tiny random RWKV-7 models, and what the numpy oracle computes of them in float64.

    python3 tests/golden/make_goldens.py --oracle DIR

DIR holds the oracle of the specification (rwkv_oracle.py and its neighbours, needs numpy). For each model NAME:
    NAME.safetensors | NAME.pth   the weights
    NAME.tokens.npy               int32 [T]
    NAME.logits.npy               float32 [T, V], after every token, from a fresh state
    NAME.state.safetensors        float32, the state after the last token
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# name, container, stored type, layers, width, vocab, head size, ffn width, ranks, seed, tuned initial state
MODELS = [
    ("rwkv7-bf16", "safetensors", "bf16", 3, 16, 29, 8, 40, dict(w=5, a=3, v=2, g=7), 11, False),
    ("rwkv7-fp16", "pth", "f16", 2, 24, 17, 8, 33, dict(w=4, a=4, v=3, g=9), 12, False),
    ("rwkv7-time-state", "safetensors", "f32", 2, 12, 13, 6, 20, dict(w=3, a=2, v=2, g=4), 13, True),
]
TOKENS = 19


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", required=True, help="folder of rwkv_oracle.py")
    sys.path.insert(0, parser.parse_args().oracle)
    import numpy as np
    import rwkv_io
    import rwkv_oracle
    import rwkv_random

    for name, container, store, layers, width, vocab, head, ffn, ranks, seed, tuned in MODELS:
        tensors = rwkv_random.make("7", layers, width, vocab, seed, head=head, ffn=ffn, ranks=ranks)
        rng = np.random.default_rng(seed + 1000)
        if tuned:
            for layer in range(layers):
                shape = (width // head, head, head)
                tensors["blocks.%d.att.time_state" % layer] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        stem = os.path.join(HERE, name)
        path = "%s.%s" % (stem, container)
        rwkv_oracle.save(path, tensors, store)
        tokens = rng.integers(0, vocab, TOKENS).astype(np.int32)
        model = rwkv_oracle.load(path)
        logits, state = model.forward([int(t) for t in tokens])
        np.save(stem + ".tokens.npy", tokens)
        np.save(stem + ".logits.npy", logits.astype(np.float32))
        rwkv_io.write_safetensors(stem + ".state.safetensors", model.flat_state(state))
        print(name, os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main()

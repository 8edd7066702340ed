#!/usr/bin/env python3
"""Makes the golden files beside it: tiny random models of every version, and what the numpy oracle computes of them in
float64.

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

# name, version, container, stored type, layers, width, vocab, head size, ffn width, ranks, seed, tuned initial state
MODELS = [
    ("rwkv4-fp16", "4", "pth", "f16", 3, 20, 23, 0, 44, {}, 21, False),
    ("rwkv5.0-bf16", "5.0", "safetensors", "bf16", 2, 24, 19, 8, 52, {}, 22, False),
    ("rwkv5.1-fp16", "5.1", "safetensors", "f16", 2, 18, 17, 6, 36, {}, 23, False),
    ("rwkv5.2-bf16", "5.2", "pth", "bf16", 3, 24, 21, 12, 40, {}, 24, False),
    ("rwkv5.2-time-state", "5.2", "safetensors", "f32", 2, 12, 13, 6, 20, {}, 29, True),
    ("rwkv6-bf16", "6", "safetensors", "bf16", 3, 24, 18, 8, 45, dict(mix=3, decay=5), 25, False),
    ("rwkv6-time-state", "6", "safetensors", "f32", 2, 12, 13, 6, 20, dict(mix=2, decay=4), 26, True),
    ("rwkv7-bf16", "7", "safetensors", "bf16", 3, 16, 29, 8, 40, dict(w=5, a=3, v=2, g=7), 11, False),
    ("rwkv7-fp16", "7", "pth", "f16", 2, 24, 17, 8, 33, dict(w=4, a=4, v=3, g=9), 12, False),
    ("rwkv7-time-state", "7", "safetensors", "f32", 2, 12, 13, 6, 20, dict(w=3, a=2, v=2, g=4), 13, True),
    ("rwkv7a-bf16", "7a", "safetensors", "bf16", 2, 16, 9, 8, 36, dict(w=5, a=3, v=2, g=7), 27, False),
    ("rwkv7b-bf16", "7b", "safetensors", "bf16", 3, 12, 11, 6, 28, dict(w=4, a=3, v=2, g=5), 28, False),
]
TOKENS = 19
# The same model with the group norm's epsilon that rwkv.cpp uses.
EPSILONS = {"rwkv5.2-bf16": ("rwkv5.2-eps", 1e-5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", required=True, help="folder of rwkv_oracle.py")
    sys.path.insert(0, parser.parse_args().oracle)
    import numpy as np
    import rwkv_io
    import rwkv_oracle
    import rwkv_random

    for name, version, container, store, layers, width, vocab, head, ffn, ranks, seed, tuned in MODELS:
        variant = version[1:] if version[1:] in ("a", "b") else ""
        tensors = rwkv_random.make(version[:len(version) - len(variant)],
                                   layers,
                                   width,
                                   vocab,
                                   seed,
                                   head=head or 64,
                                   ffn=ffn,
                                   variant=variant,
                                   ranks=ranks)
        rng = np.random.default_rng(seed + 1000)
        if tuned:
            for layer in range(layers):
                shape = (width // head, head, head)
                tensors["blocks.%d.att.time_state" % layer] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        path = os.path.join(HERE, "%s.%s" % (name, container))
        rwkv_oracle.save(path, tensors, store)
        tokens = rng.integers(0, vocab, TOKENS).astype(np.int32)
        for stem, epsilon in [(name, None)] + [EPSILONS[n] for n in EPSILONS if n == name]:
            model = rwkv_oracle.load(path, gn_eps=epsilon)
            logits, state = model.forward([int(t) for t in tokens])
            stem = os.path.join(HERE, stem)
            np.save(stem + ".tokens.npy", tokens)
            np.save(stem + ".logits.npy", logits.astype(np.float32))
            rwkv_io.write_safetensors(stem + ".state.safetensors", model.flat_state(state))
        print(name, os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main()

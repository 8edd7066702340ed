#!/usr/bin/env python3
"""Makes files of other people's formats and names beside the goldens, as their converters would write them.

    pip install gguf==0.19.0 numpy safetensors==0.8.0
    python3 tests/golden/make_dialect_goldens.py --oracle DIR --rwkvctl FILE --published FILE

First come the models of make_goldens.py, converted; their logits are the ones that are there. Then models that are
quantized: what their blocks or groups stand for is computed here, and the oracle computes the logits of that.
DIR as for make_goldens.py; the rwkvctl of this repository makes the files that it quantizes itself; the published file
is rwkv.cpp's tests/tiny-rwkv-6v0-3m-Q5_0.bin, of which only the goldens are here.
"""

import argparse
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../../services/checkpoint/testdata"))

import gguf  # noqa: E402
import make_dialects as dialects  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

T = gguf.GGMLQuantizationType
TOKENS = 19


def at(name):
    return os.path.join(HERE, name)


def save(name, tensors):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, at(name))


def half(tensors):
    return {name: value.astype(np.float16) for name, value in tensors.items()}


def converted(io):
    def model(name):
        return {k: np.asarray(v, np.float32) for k, v in io.read_any(at(name))[0].items()}

    v4, v50, v51 = model("rwkv4-fp16.pth"), model("rwkv5.0-bf16.safetensors"), model("rwkv5.1-fp16.safetensors")
    v52, v6, v7 = model("rwkv5.2-bf16.pth"), model("rwkv6-bf16.safetensors"), model("rwkv7-bf16.safetensors")
    save("rwkv4-port.safetensors", half(dialects.port(v4)))
    io.write_pth(at("rwkv5.2-port.bin"), dialects.port(v52), "bf16")
    save("rwkv6-port.safetensors", half(dialects.port(v6)))
    save("rwkv6-fla.safetensors", dialects.fla_6(v6))
    save("rwkv7-fla.safetensors", dialects.fla(v7))
    io.write_pth(at("rwkv7-fla-stacked.bin"), dialects.fla_stacked(v7), "f16")
    save("rwkv5.1.st", dialects.web_rwkv(v51))
    save("rwkv5.2.st", dialects.web_rwkv(v52))
    save("rwkv6.st", dialects.web_rwkv(v6))
    save("rwkv7.st", dialects.web_rwkv(v7))
    dialects.write_rwkv_cpp(at("rwkv4-cpp.bin"), v4, version=100)
    for name, tensors in (("5.0", v50), ("5.1", v51), ("5.2", v52), ("6", v6), ("7", v7)):
        dialects.write_rwkv_cpp(at("rwkv%s-cpp.bin" % name), tensors)
    dialects.write_gguf(at("rwkv6.gguf"), "rwkv6", v6, dialects.gguf_6(v6, 2),
                        {"wkv.head_size": v6["blocks.0.att.time_faaaa"].shape[1], "rescale_every_n_layers": 2})
    dialects.write_gguf(at("rwkv7.gguf"), "rwkv7", v7, dialects.gguf_7(v7, lambda name: T.F16),
                        {"wkv.head_size": v7["blocks.0.att.r_k"].shape[1]})


def golden(name, tensors, model_class):
    """What the oracle computes of these weights."""
    tokens = np.random.default_rng(5).integers(0, len(tensors["emb.weight"]), TOKENS).astype(np.int32)
    model = model_class({k: np.asarray(v, np.float32) for k, v in tensors.items()}, dtype=np.float64)
    logits, state = model.forward([int(t) for t in tokens])
    np.save(at(name + ".tokens.npy"), tokens)
    np.save(at(name + ".logits.npy"), logits.astype(np.float32))
    save(name + ".state.safetensors", {k: np.asarray(v, np.float32) for k, v in model.flat_state(state).items()})


# What gguf-py has no quantizer for: random blocks with scales of a size that gives weights like the others'.
def k_blocks(kind, rows, columns, rng):
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for place, scale in {T.Q4_K: ((0, 2e-4), (2, 1e-3)), T.Q5_K: ((0, 1e-4), (2, 1e-3)), T.Q6_K: ((208, 3e-5),)}[kind]:
        values = (scale * rng.uniform(0.5, 1.5, (len(raw), 1))).astype(np.float16)
        raw[:, place:place + 2] = values.view(np.uint8)
    return raw.reshape(rows, -1)


def quantized_gguf(random, model_class):
    kinds = {"att.receptance": T.Q8_0, "att.key": T.Q4_0, "att.value": T.Q5_0, "att.output": T.Q4_1, "ffn.key": T.Q5_1}
    by_layer = [T.Q4_K, T.Q5_K, T.Q6_K]
    t = random.make("7", 3, 32, 29, 31, head=16, ffn=256, ranks=dict(w=5, a=3, v=2, g=7))
    rng = np.random.default_rng(32)

    def kind_of(name):
        if name.startswith("blocks.") and name.endswith("ffn.value.weight"):
            return by_layer[int(name.split(".")[1])]
        return kinds.get(name.split(".", 2)[-1][: -len(".weight")], T.F32)

    raw, weights = {}, dict(t)
    for name, value in t.items():
        kind = kind_of(name)
        if value.ndim != 2 or kind == T.F32:
            continue
        raw[name] = k_blocks(kind, *value.shape, rng) if kind in by_layer else gguf.quants.quantize(
            np.asarray(value, np.float32), kind)
        weights[name] = gguf.quants.dequantize(raw[name], kind).reshape(value.shape)
    # The writer has the ends in fp16.
    weights.update({name: weights[name].astype(np.float16) for name in ("emb.weight", "head.weight")})
    dialects.write_gguf(at("rwkv7-quantized.gguf"), "rwkv7", t, dialects.gguf_7(t, kind_of, raw), {"wkv.head_size": 16})
    golden("rwkv7-quantized", weights, model_class)


def quantized_rwkv_cpp(random, model_class):
    kinds = {"att.receptance": 9, "att.key": 2, "att.value": 7, "att.output": 3, "ffn.key": 8, "ffn.value": 9,
             "ffn.receptance": 2}
    blocks = {2: T.Q4_0, 3: T.Q4_1, 7: T.Q5_0, 8: T.Q5_1, 9: T.Q8_0}
    t = random.make("4", 2, 32, 23, 33, ffn=64)
    t = {name: np.asarray(value, np.float32) for name, value in t.items()}

    def kind_of(name):
        return kinds.get(name.split(".", 2)[-1][: -len(".weight")], 1)

    dialects.write_rwkv_cpp(at("rwkv4-quantized.bin"), t, kind_of)
    weights = dict(t)
    for name, value in t.items():
        kind = blocks.get(kind_of(name))
        if name.endswith(".weight") and value.ndim == 2:
            weights[name] = value.astype(np.float16) if kind is None else gguf.quants.dequantize(
                gguf.quants.quantize(value, kind), kind).reshape(value.shape)
    golden("rwkv4-quantized", weights, model_class)


def quantized_here(random, model_class, rwkvctl):
    t = half(random.make("7", 2, 96, 29, 34, head=32, ffn=96, ranks=dict(w=5, a=3, v=2, g=7)))
    save("base.safetensors", t)
    for dtype in ("int8", "int4"):
        name = "rwkv7-%s" % dtype
        subprocess.run([rwkvctl, "convert", at("base.safetensors"), at(name + ".safetensors"), "--dtype", dtype,
                        "--overwrite"], check=True)
        weights = {}
        stored = load_file(at(name + ".safetensors"))
        for key, q in stored.items():
            if key.endswith((".scale", ".min")):
                continue
            if key + ".scale" in stored:
                if q.dtype == np.uint8:
                    q = np.stack([q & 15, q >> 4], axis=-1).reshape(len(q), -1)
                column = np.arange(q.shape[1]) // 64
                scale = stored[key + ".scale"].astype(np.float32)[:, column]
                q = q.astype(np.float32) * scale
                if key + ".min" in stored:
                    q = q + stored[key + ".min"].astype(np.float32)[:, column]
            weights[key] = q
        golden(name, weights, model_class)
    os.remove(at("base.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", required=True, help="folder of rwkv_oracle.py")
    parser.add_argument("--rwkvctl", required=True)
    parser.add_argument("--published", required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.oracle)
    import rwkv_io
    import rwkv_model
    import rwkv_random

    converted(rwkv_io)
    quantized_gguf(rwkv_random, rwkv_model.RWKV)
    quantized_rwkv_cpp(rwkv_random, rwkv_model.RWKV)
    quantized_here(rwkv_random, rwkv_model.RWKV, arguments.rwkvctl)
    published = rwkv_model.from_rwkv_cpp(rwkv_io.read_rwkv_cpp(arguments.published)[0])
    golden("tiny-6v0-q5_0", published, rwkv_model.RWKV)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes the same small random models in several containers and dialects, with other people's writers.

  pip install gguf==0.19.0 numpy safetensors==0.8.0 && ./make_dialects.py

v7.safetensors and v6.safetensors hold the original names, layouts and values; each other file is what its converter
makes of them (llama.cpp's convert_hf_to_gguf.py, web-rwkv's convert_safetensors.py, fla's names), written out here from
shared descriptions of those formats and never read by code of this repository. Matrices that v7.gguf quantises are the
dequantised ones everywhere, so that every comparison is exact. ggml_blocks.safetensors: random blocks and what gguf-py
makes of them.
"""
import os

import gguf
import numpy as np
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
L, V, R = 2, 6, 4
D, N, F = 32, 16, 32  # Rows as short as ggml's blocks allow.
H = D // N
D6, N6 = 16, 8
RANDOM = np.random.default_rng(7)
T = gguf.GGMLQuantizationType


def normal(*shape):
    """fp16 values, so that any type of the files holds them (Q types: through quantise)."""
    return (RANDOM.standard_normal(shape) / 2).astype(np.float16).astype(np.float32)


def quantised(name):
    """The type v7.gguf has a matrix in."""
    kinds = {"receptance": T.Q8_0, "key": T.Q4_0, "value": T.Q5_0, "output": T.Q4_1}
    return kinds.get(name.split(".")[-2]) if ".att." in name else T.Q5_1 if ".ffn.key." in name else T.BF16


def matrix(name, out, inner):
    return gguf.quants.dequantize(gguf.quants.quantize(normal(out, inner), quantised(name)), quantised(name))


def common(t, i, extra_norm, width):
    b = "blocks.%d." % i
    for norm in ["ln1", "ln2"] + (["ln0"] if i == 0 else []) + extra_norm:
        t[b + norm + ".weight"], t[b + norm + ".bias"] = normal(width), normal(width)


def ends(t, width):
    t["emb.weight"], t["head.weight"] = normal(V, width), normal(V, width)
    t["ln_out.weight"], t["ln_out.bias"] = normal(width), normal(width)
    return t


def version_7():
    t = {}
    for i in range(L):
        common(t, i, ["att.ln_x"], D)
        a = "blocks.%d.att." % i
        for m in "rwkvag":
            t[a + "x_" + m] = normal(1, 1, D)
        for m, rank in (("w", R), ("a", R + 1), ("v", R + 2), ("g", R + 3)):
            if m == "v" and i == 0:
                continue
            t[a + m + "1"], t[a + m + "2"] = normal(D, rank), normal(rank, D)
            if m != "g":
                t[a + m + "0"] = normal(1, 1, D)
        t[a + "k_k"], t[a + "k_a"], t[a + "r_k"] = normal(1, 1, D), normal(1, 1, D), normal(H, N)
        for m in ("receptance", "key", "value", "output"):
            t[a + m + ".weight"] = matrix(a + m + ".weight", D, D)
        f = "blocks.%d.ffn." % i
        t[f + "x_k"] = normal(1, 1, D)
        t[f + "key.weight"], t[f + "value.weight"] = matrix(f + "key.weight", F, D), matrix(f + "value.weight", D, F)
    return ends(t, D)


def version_6():
    t = {}
    for i in range(L):
        common(t, i, ["att.ln_x"], D6)
        a = "blocks.%d.att." % i
        for m in "xwkvrg":
            t[a + "time_maa_" + m] = normal(1, 1, D6)
        t[a + "time_maa_w1"], t[a + "time_maa_w2"] = normal(D6, 5 * R), normal(5, R, D6)
        t[a + "time_decay"], t[a + "time_faaaa"] = normal(1, 1, D6), normal(D6 // N6, N6)
        t[a + "time_decay_w1"], t[a + "time_decay_w2"] = normal(D6, R + 1), normal(R + 1, D6)
        for m in ("receptance", "key", "value", "gate", "output"):
            t[a + m + ".weight"] = normal(D6, D6)
        f = "blocks.%d.ffn." % i
        t[f + "time_maa_k"], t[f + "time_maa_r"] = normal(1, 1, D6), normal(1, 1, D6)
        t[f + "key.weight"], t[f + "value.weight"] = normal(F, D6), normal(D6, F)
        t[f + "receptance.weight"] = normal(D6, D6)
    return ends(t, D6)


GLOBAL = {"emb.weight": "token_embd.weight", "blocks.0.ln0.weight": "token_embd_norm.weight",
          "blocks.0.ln0.bias": "token_embd_norm.bias", "ln_out.weight": "output_norm.weight",
          "ln_out.bias": "output_norm.bias", "head.weight": "output.weight"}
PARTS = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "att.receptance": "time_mix_receptance",
         "att.key": "time_mix_key", "att.value": "time_mix_value", "att.output": "time_mix_output",
         "att.gate": "time_mix_gate", "ffn.key": "channel_mix_key", "ffn.value": "channel_mix_value",
         "ffn.receptance": "channel_mix_receptance"}


def add_vocabulary(writer):
    tokens = [b"<s>", rb"\x00", rb"\\", rb"it\'s", rb"\t\n\r\xe4\xbd\xa0", b"[PAD5]"]
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 1, 1, 1, 1, 5])
    writer.add_eot_token_id(4)
    writer.add_chat_template("rwkv-world")


def write_gguf(path, architecture, width, tensors, keys):
    writer = gguf.GGUFWriter(os.path.join(HERE, path), architecture)
    writer.add_name("small")
    writer.add_context_length(1048576)
    writer.add_embedding_length(width)
    writer.add_block_count(L)
    writer.add_layer_norm_eps(1e-5)
    for key, value in keys.items():
        writer.add_uint32("%s.%s" % (architecture, key), value)
    add_vocabulary(writer)
    for name, value, kind in tensors:
        if kind in (T.F32, T.F16):
            writer.add_tensor(name, np.ascontiguousarray(value, {T.F32: np.float32, T.F16: np.float16}[kind]))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_7(t):
    out = [(gguf_name, t[name], T.F16) for name, gguf_name in GLOBAL.items() if not name.startswith(("ln", "blocks"))]
    out += [(gguf_name, t[name], T.F32) for name, gguf_name in GLOBAL.items() if name.startswith(("ln", "blocks"))]
    for i in range(L):
        b, g = "blocks.%d." % i, "blk.%d." % i
        for ours, theirs in PARTS.items():
            for end in (".weight", ".bias"):
                name = b + ours + end
                if name in t:
                    out.append((g + theirs + end, t[name], quantised(name) if t[name].ndim == 2 else T.F32))
        out.append((g + "time_mix_lerp_fused.weight",
                    np.stack([t[b + "att.x_" + m] for m in "rwkvag"]).reshape(6, 1, 1, D), T.F32))
        for m in "wavg":
            # Layer 0 has no value residual; the converter writes a's in its place.
            source = "a" if m == "v" and i == 0 else m
            for n in "12":
                out.append((g + "time_mix_%s%s.weight" % (m, n), t[b + "att." + source + n].T, T.F32))
            if m != "g":
                out.append((g + "time_mix_%s0.weight" % m, t[b + "att." + source + "0"].reshape(D), T.F32))
        for m in ("k_k", "k_a", "r_k"):
            out.append((g + "time_mix_%s.weight" % m, t[b + "att." + m].reshape(D), T.F32))
        out.append((g + "channel_mix_lerp_k.weight", t[b + "ffn.x_k"], T.F32))
    return out


def gguf_6(t, rescale_every):
    out = [(gguf_name, t[name], T.F32) for name, gguf_name in GLOBAL.items()]
    for i in range(L):
        b, g = "blocks.%d." % i, "blk.%d." % i
        for ours, theirs in PARTS.items():
            for end in (".weight", ".bias"):
                if b + ours + end in t:
                    scale = 2.0 ** (i // rescale_every) if ours in ("att.output", "ffn.value") else 1
                    out.append((g + theirs + end, t[b + ours + end] / scale, T.F16))
        out.append((g + "time_mix_lerp_x.weight", t[b + "att.time_maa_x"], T.F32))
        if i == 0:
            out.append((g + "time_mix_lerp_fused.weight",
                        np.stack([t[b + "att.time_maa_" + m] for m in "wkvrg"]).reshape(5, 1, 1, -1), T.F32))
        else:  # As older files have it.
            out += [(g + "time_mix_lerp_%s.weight" % m, t[b + "att.time_maa_" + m], T.F32) for m in "wkvrg"]
        out.append((g + "time_mix_w1.weight", t[b + "att.time_maa_w1"].T, T.F16))
        out.append((g + "time_mix_w2.weight", t[b + "att.time_maa_w2"].transpose(0, 2, 1), T.F16))
        out.append((g + "time_mix_decay.weight", t[b + "att.time_decay"].reshape(-1), T.F32))
        out.append((g + "time_mix_decay_w1.weight", t[b + "att.time_decay_w1"].T, T.F16))
        out.append((g + "time_mix_decay_w2.weight", t[b + "att.time_decay_w2"].T, T.F16))
        out.append((g + "time_mix_first.weight", t[b + "att.time_faaaa"], T.F32))
        for m in "kr":
            out.append((g + "channel_mix_lerp_%s.weight" % m, t[b + "ffn.time_maa_" + m], T.F32))
    return out


def web_rwkv(t):
    out = {}
    factors = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "w1", "w2", "a1", "a2", "v1", "v2",
               "g1", "g2")
    for name, value in t.items():
        if name.rsplit(".", 1)[-1] in factors:
            value = value.swapaxes(-1, -2)
        out[name.replace("time_maa", "time_mix").replace("time_faaaa", "time_first")] = value.astype(np.float16)
    return out


def fla(t):
    out = {}
    parts = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight",
             "ln_out.weight": "model.norm.weight", "ln_out.bias": "model.norm.bias"}
    names = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm",
             "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj",
             "att.output": "attn.o_proj"}
    for name, value in t.items():
        if name in parts:
            out[parts[name]] = value
            continue
        _, layer, rest = name.split(".", 2)
        stem, end = rest.rsplit(".", 1)
        if stem in names:
            rest = names[stem] + "." + end
        elif stem == "att" and len(end) == 2 and end[0] in "wavg":
            rest = "attn.%s_lora.lora.%s" % (end[0], {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[end[1]])
            value = value.reshape(D) if end[1] == "0" else value.T
        elif stem == "att":
            rest = "attn." + end
        out["model.layers.%s.%s" % (layer, rest)] = value
    return {name: value.astype(np.float16) for name, value in out.items()}


def blocks():
    out = {}
    for kind in (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K):
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        raw = RANDOM.integers(0, 256, (3, size), dtype=np.uint8)
        scales = {T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}.get(kind, [0])
        for at in scales:
            raw[:, at:at + 2] = RANDOM.standard_normal((3, 1)).astype(np.float16).view(np.uint8)
        out[kind.name] = raw
        out[kind.name + ".weights"] = gguf.quants.dequantize(raw, kind).astype(np.float32).reshape(3, weights)
    return out


def main():
    def save(name, tensors):
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, os.path.join(HERE, name))

    v7, v6 = version_7(), version_6()
    save("v7.safetensors", v7)
    save("v6.safetensors", {name: value.astype(np.float16) for name, value in v6.items()})
    write_gguf("v7.gguf", "rwkv7", D, gguf_7(v7), {"wkv.head_size": N, "feed_forward_length": F})
    write_gguf("v6.gguf", "rwkv6", D6, gguf_6(v6, 1), {"wkv.head_size": N6, "rescale_every_n_layers": 1})
    save("v7.st", web_rwkv(v7))
    save("v6.st", web_rwkv(v6))
    save("v7_fla.safetensors", fla(v7))
    save("ggml_blocks.safetensors", blocks())


if __name__ == "__main__":
    main()

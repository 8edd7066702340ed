#!/usr/bin/env python3
"""Writes the same small random models in several containers and dialects, with other people's writers.

  pip install gguf==0.19.0 numpy safetensors==0.8.0 && ./make_dialects.py

v7.safetensors and v6.safetensors hold the original names, layouts and values; each other file is what its converter
makes of them (llama.cpp's convert_hf_to_gguf.py, web-rwkv's convert_safetensors.py, fla's convert_from_rwkv6.py and
convert_from_rwkv7.py), written out here from those scripts and descriptions and never read by code of this repository.
Matrices that v7.gguf quantizes are the dequantized ones everywhere, so that every comparison is exact.
ggml_blocks.safetensors: random blocks and what gguf-py makes of them.
"""
import os
import struct

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
    """fp16 values, so that any type of the files holds them (Q types: through quantize)."""
    return (RANDOM.standard_normal(shape) / 2).astype(np.float16).astype(np.float32)


def quantized(name):
    """The type v7.gguf has a matrix in."""
    kinds = {"receptance": T.Q8_0, "key": T.Q4_0, "value": T.Q5_0, "output": T.Q4_1}
    return kinds.get(name.split(".")[-2]) if ".att." in name else T.Q5_1 if ".ffn.key." in name else T.BF16


def matrix(name, out, inner):
    return gguf.quants.dequantize(gguf.quants.quantize(normal(out, inner), quantized(name)), quantized(name))


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


def layers(t):
    return 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))


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


def write_gguf(path, architecture, t, tensors, keys):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(1048576)
    writer.add_embedding_length(t["emb.weight"].shape[1])
    writer.add_block_count(layers(t))
    writer.add_layer_norm_eps(1e-5)
    for key, value in keys.items():
        writer.add_uint32("%s.%s" % (architecture, key), value)
    add_vocabulary(writer)
    for name, value, kind in tensors:
        if kind in (T.F32, T.F16):
            writer.add_tensor(name, np.ascontiguousarray(value, {T.F32: np.float32, T.F16: np.float16}[kind]))
        else:
            raw = value if value.dtype == np.uint8 else gguf.quants.quantize(np.ascontiguousarray(value), kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_7(t, kind_of=quantized, raw={}):
    """kind_of: the type of a matrix by its original name; raw: matrices that are blocks already."""
    out = [(gguf_name, t[name], T.F16) for name, gguf_name in GLOBAL.items() if not name.startswith(("ln", "blocks"))]
    out += [(gguf_name, t[name], T.F32) for name, gguf_name in GLOBAL.items() if name.startswith(("ln", "blocks"))]
    for i in range(layers(t)):
        b, g = "blocks.%d." % i, "blk.%d." % i
        for ours, theirs in PARTS.items():
            for end in (".weight", ".bias"):
                name = b + ours + end
                if name in t:
                    kind = kind_of(name) if t[name].ndim == 2 else T.F32
                    out.append((g + theirs + end, raw.get(name, t[name]), kind))
        out.append((g + "time_mix_lerp_fused.weight",
                    np.stack([t[b + "att.x_" + m] for m in "rwkvag"]).reshape(6, 1, 1, -1), T.F32))
        for m in "wavg":
            # Layer 0 has no value residual; the converter writes a's in its place.
            source = "a" if m == "v" and i == 0 else m
            for n in "12":
                out.append((g + "time_mix_%s%s.weight" % (m, n), t[b + "att." + source + n].T, T.F32))
            if m != "g":
                out.append((g + "time_mix_%s0.weight" % m, t[b + "att." + source + "0"].reshape(-1), T.F32))
        for m in ("k_k", "k_a", "r_k"):
            out.append((g + "time_mix_%s.weight" % m, t[b + "att." + m].reshape(-1), T.F32))
        out.append((g + "channel_mix_lerp_k.weight", t[b + "ffn.x_k"], T.F32))
    return out


def gguf_6(t, rescale_every):
    out = [(gguf_name, t[name], T.F32) for name, gguf_name in GLOBAL.items()]
    for i in range(layers(t)):
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
    decay = t.get("blocks.0.att.time_decay")
    if "blocks.0.att.gate.weight" in t and decay is not None and decay.ndim == 1:  # RWKV-5.1 becomes 5.2
        t = {name: np.repeat(value[:, None], len(t["emb.weight"][0]) // len(value), 1)
             if name.endswith((".time_decay", ".time_faaaa")) else value for name, value in t.items()}
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
            value = value.reshape(-1) if end[1] == "0" else value.T
        elif stem == "att":
            rest = "attn." + end
        out["model.layers.%s.%s" % (layer, rest)] = value
    return {name: value.astype(np.float16) for name, value in out.items()}


def fla_6(t):
    """fla's utils/convert_from_rwkv6.py: what it does to each tensor, and where it puts it."""
    out = {"model.embeddings.weight": t["emb.weight"], "lm_head.weight": t["head.weight"],
           "model.norm.weight": t["ln_out.weight"], "model.norm.bias": t["ln_out.bias"],
           "model.layers.0.pre_norm.weight": t["blocks.0.ln0.weight"],
           "model.layers.0.pre_norm.bias": t["blocks.0.ln0.bias"]}
    for i in range(layers(t)):
        a, f, m = "blocks.%d.att." % i, "blocks.%d.ffn." % i, "model.layers.%d." % i
        for ours, theirs in (("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm")):
            for end in (".weight", ".bias"):
                out[m + theirs + end] = t["blocks.%d." % i + ours + end]
        ww, wk, wv, wr, wg = np.moveaxis(t[a + "time_maa_w1"].reshape(len(t[a + "time_maa_w1"]), 5, -1), 1, 0)
        out[m + "attn.x_proj.0.linear.weight"] = np.concatenate((wr, ww, wk, wv, wg), -1).T
        ww, wk, wv, wr, wg = t[a + "time_maa_w2"]
        out[m + "attn.x_proj.2.weight"] = np.concatenate((wr, ww, wk, wv, wg), 0).T
        out[m + "attn.x_proj.0.mu"] = t[a + "time_maa_x"].reshape(-1)
        out[m + "attn.x_bias"] = np.stack([t[a + "time_maa_" + x].reshape(-1) for x in "rwkvg"])
        out[m + "attn.w_proj.linear.lora.0.weight"] = t[a + "time_decay_w1"].T
        out[m + "attn.w_proj.linear.lora.2.weight"] = t[a + "time_decay_w2"].T
        out[m + "attn.w_proj.linear.lora.2.bias"] = t[a + "time_decay"].reshape(-1)
        out[m + "attn.bonus"] = t[a + "time_faaaa"]
        for ours, theirs in (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g")):
            out[m + "attn.%s_proj.linear.weight" % theirs] = t[a + ours + ".weight"]
        out[m + "attn.o_proj.weight"] = t[a + "output.weight"]
        for ours, theirs in (("k", "key"), ("r", "receptance")):
            out[m + "ffn.%s.mu" % theirs] = t[f + "time_maa_" + ours].reshape(-1)
            out[m + "ffn.%s.linear.weight" % theirs] = t[f + theirs + ".weight"]
        out[m + "ffn.value.weight"] = t[f + "value.weight"]
    return {name: value.astype(np.float16) for name, value in out.items()}


def fla_stacked(t):
    """fla between January and April 2025: one x_x [6, D] a layer, and small vectors without dimensions of one."""
    out = fla(t)
    for i in range(layers(t)):
        a = "model.layers.%d.attn." % i
        out[a + "x_x"] = np.stack([out.pop(a + "x_" + m).reshape(-1) for m in "rwkvag"])
        for m in ("k_k", "k_a"):
            out[a + m] = out[a + m].reshape(-1)
    return out


def port(t):
    """transformers' convert_rwkv_checkpoint_to_hf.py and convert_rwkv{5,6}_checkpoint_to_hf.py."""
    out = {}
    words = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance",
             "time_mix_g": "time_mix_gate"}
    for name, value in t.items():
        name = name.replace("emb.", "embeddings.") if name.startswith("emb.") else name
        name = name.replace("blocks.0.ln0", "blocks.0.pre_ln").replace(".att.", ".attention.")
        stem, end = name.replace(".ffn.", ".feed_forward.").rsplit(".", 1)
        name = stem + "." + words.get(end, end)
        out[name if name == "head.weight" else "rwkv." + name] = value
    return out


def rwkv_cpp(t):
    """rwkv.cpp's convert_pytorch_to_ggml.py: names and fp32 values; those in the set may be of other types."""
    v7, v6 = "blocks.0.att.k_k" in t, "blocks.0.att.time_maa_x" in t
    v5, v52 = "blocks.0.att.ln_x.weight" in t, "blocks.0.att.gate.weight" in t
    out, matrices = {}, set()
    for name, x in t.items():
        x = x.astype(np.float32)
        end = name.rsplit(".", 1)[-1]
        if v7 and ".att.x_" in name:
            if end == "x_r":
                stem = name[: -len("x_r")]
                out[stem + "x_rwkvag"] = np.concatenate([t[stem + "x_" + m] for m in "rwkvag"], 0).astype(np.float32)
            continue
        if ".time_" in name:
            x = x.squeeze()
        if v7:
            if end in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"):
                x = x.T
        elif v6:
            if end == "time_faaaa":
                x = x[..., None]
            if end in ("time_maa_w1", "time_decay_w1", "time_decay_w2"):
                x = x.T
            if end == "time_maa_w2":
                x = x.transpose(0, 2, 1)
            if end == "time_decay":
                x = x.reshape(len(t["blocks.0.att.time_faaaa"]), -1, 1)
        elif v5:
            if end == "time_decay":
                x = np.exp(-np.exp(x))[..., None] if v52 else np.exp(-np.exp(x)).reshape(-1, 1, 1)
            if end == "time_first":
                x = np.exp(x).reshape(-1, 1, 1)
            if end == "time_faaaa":
                x = x[..., None]
        elif end == "time_decay":
            x = -np.exp(x)
        if x.ndim > 1 and ".time_" not in name and end not in ("k_k", "k_a", "r_k", "x_k", "w0", "a0", "v0"):
            matrices.add(name)
        out[name] = x
    return out, matrices


def write_rwkv_cpp(path, t, kind_of=lambda name: 1, version=101):
    """kind_of: the type of a matrix by its name: 0 FP32, 1 FP16, 2 Q4_0, 3 Q4_1, 7 Q5_0, 8 Q5_1, 9 Q8_0."""
    blocks = {2: T.Q4_0, 3: T.Q4_1, 7: T.Q5_0, 8: T.Q5_1, 9: T.Q8_0}
    tensors, matrices = rwkv_cpp(t)
    with open(path, "wb") as f:
        f.write(struct.pack("=6i", 0x67676D66, version, *t["emb.weight"].shape, layers(t), 1))
        for name, x in tensors.items():
            kind = kind_of(name) if name in matrices else 0
            f.write(struct.pack("=3i", x.ndim, len(name), kind) + struct.pack("=%di" % x.ndim, *reversed(x.shape)))
            f.write(name.encode())
            x = np.ascontiguousarray(x)
            f.write((gguf.quants.quantize(x, blocks[kind]) if kind in blocks
                     else x.astype(np.float16 if kind == 1 else np.float32)).tobytes())


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
    write_gguf(os.path.join(HERE, "v7.gguf"), "rwkv7", v7, gguf_7(v7), {"wkv.head_size": N, "feed_forward_length": F})
    write_gguf(os.path.join(HERE, "v6.gguf"), "rwkv6", v6, gguf_6(v6, 1),
               {"wkv.head_size": N6, "rescale_every_n_layers": 1})
    save("v7.st", web_rwkv(v7))
    save("v6.st", web_rwkv(v6))
    save("v7_fla.safetensors", fla(v7))
    save("v7_fla_stacked.safetensors", fla_stacked(v7))
    save("v6_fla.safetensors", fla_6(v6))
    save("ggml_blocks.safetensors", blocks())


if __name__ == "__main__":
    main()

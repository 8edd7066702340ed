"""Writes a bf16 .safetensors of RWKV-7, as make_model makes it, as a GGUF that llama.cpp runs.

The tokens are placeholders: speed does not need their text. Source: llama.cpp's convert_hf_to_gguf.py and
gguf-py/gguf/tensor_mapping.py; `rwkvctl inspect` reads the result back (smoke_test.sh).
"""
import array
import json
import struct

UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # Types of metadata.
F32, BF16 = 0, 30  # Types of tensors.
ALIGNMENT = 32

GLOBAL = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
BLOCK = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "ffn.x_k": "channel_mix_lerp_k"}
LERPS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # One tensor holds the six.


def read_header(path):
    """{name: {"dtype", "shape", "data_offsets"}}, and where the data begins."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def weight_bytes(path):
    """Bytes that a token reads: all but the embedding, of which it reads a row."""
    header, _ = read_header(path)
    return sum(t["data_offsets"][1] - t["data_offsets"][0] for name, t in header.items() if not name.startswith("emb."))


def _name(rest):
    """Of a layer's tensor, after "blk.N."."""
    stem, end = (rest.rsplit(".", 1) + [""])[:2] if rest.endswith((".weight", ".bias")) else (rest, "weight")
    if stem in BLOCK:
        return f"{BLOCK[stem]}.{end}"
    room, stem = stem.split(".", 1)
    return f"{'time_mix' if room == 'att' else 'channel_mix'}_{stem}.{end}"


def _plan(header):
    """[(name, dimensions outermost first, type, [sources], transposed)] of the GGUF."""
    plan = []
    layers = 1 + max(int(name.split(".")[1]) for name in header if name.startswith("blocks."))
    for name, gguf in GLOBAL.items():
        shape = header[name]["shape"]
        plan.append((gguf, shape, BF16 if len(shape) == 2 else F32, [name], False))
    for layer in range(layers):
        block = f"blocks.{layer}."
        rests = [name[len(block):] for name in header if name.startswith(block) and ".ln0." not in name]
        sources = {rest: block + rest for rest in rests}
        if "att.v0" not in sources:  # Layer 0: unused, but llama.cpp wants some, of the rank of a.
            sources.update({f"att.v{i}": f"{block}att.a{i}" for i in range(3)})
        width = max(header[block + "ln1.weight"]["shape"])
        plan.append((f"blk.{layer}.time_mix_lerp_fused.weight", [6, 1, 1, width], F32,
                     [f"{block}att.{lerp}" for lerp in LERPS], False))
        for rest, source in sources.items():
            if rest[4:] in LERPS and rest != "ffn.x_k":
                continue
            shape = [size for size in header[source]["shape"] if size != 1]
            factor = rest[:4] == "att." and len(rest) == 6 and rest[4] in "wavg" and rest[5] in "12"
            if rest == "att.r_k":
                shape = [width]
            if factor:
                shape = shape[::-1]
            # As the converter: vectors and the decay's factors in fp32.
            kind = BF16 if len(shape) == 2 and rest not in ("att.w1", "att.w2") else F32
            plan.append((f"blk.{layer}." + _name(rest), shape, kind, [source], factor))
    return layers, plan


def _bytes(file, begin, tensor):
    file.seek(begin + tensor["data_offsets"][0])
    return file.read(tensor["data_offsets"][1] - tensor["data_offsets"][0])


def _transposed(data, columns):
    values = array.array("H", data)
    out = array.array("H")
    for column in range(columns):
        out.extend(values[column::columns])
    return out.tobytes()


def _as_fp32(data):
    return array.array("I", [value << 16 for value in array.array("H", data)]).tobytes()


def _string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def _metadata(header, layers):
    shape = lambda name: header[name]["shape"]
    vocabulary, width = shape("emb.weight")
    last = f"blocks.{layers - 1}."
    number = lambda key, value: _string(key) + struct.pack("<II", UINT32, value)
    pairs = [
        _string("general.architecture") + struct.pack("<I", STRING) + _string("rwkv7"),
        _string("general.name") + struct.pack("<I", STRING) + _string("random"),
        number("general.file_type", 32),
        number("rwkv7.context_length", 1 << 20),
        number("rwkv7.embedding_length", width),
        number("rwkv7.block_count", layers),
        number("rwkv7.feed_forward_length", shape(last + "ffn.key.weight")[0]),
        number("rwkv7.attention.head_count", 0),
        number("rwkv7.wkv.head_size", shape(last + "att.r_k")[-1]),
        _string("rwkv7.attention.layer_norm_epsilon") + struct.pack("<If", FLOAT32, 1e-5),
    ]
    for key, factor in (("decay", "w1"), ("iclr", "a1"), ("value_residual_mix", "v1"), ("gate", "g1")):
        pairs.append(number(f"rwkv7.attention.{key}_lora_rank", shape(f"{last}att.{factor}")[-1]))
    tokens = b"".join(_string(f"<{i}>") for i in range(vocabulary))
    pairs += [
        _string("tokenizer.ggml.model") + struct.pack("<I", STRING) + _string("rwkv"),
        _string("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, vocabulary) + tokens,
        _string("tokenizer.ggml.token_type") + struct.pack("<IIQ", ARRAY, INT32, vocabulary) +
        array.array("i", [3] + [1] * (vocabulary - 1)).tobytes(),
        number("tokenizer.ggml.bos_token_id", 0),
        number("tokenizer.ggml.eos_token_id", 0),
    ]
    return pairs


def write_gguf(source, target):
    header, begin = read_header(source)
    layers, plan = _plan(header)
    pairs = _metadata(header, layers)
    infos, offset = [], 0
    for name, shape, kind, _, _ in plan:
        size = 4 if kind == F32 else 2
        for dimension in shape:
            size *= dimension
        infos.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
        offset += size + -size % ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with open(source, "rb") as file, open(target, "wb") as out:
        out.write(head + bytes(-len(head) % ALIGNMENT))
        for _, shape, kind, sources, transposed in plan:
            data = b"".join(_bytes(file, begin, header[name]) for name in sources)
            if transposed:
                data = _transposed(data, shape[0])
            if kind == F32:
                data = _as_fp32(data)
            out.write(data + bytes(-len(data) % ALIGNMENT))

#!/usr/bin/env python3
"""Trains the demo model, a small RWKV-7, with PyTorch, on the CPU or with --device cuda on a GPU.

  train.py --text DIR --vocabulary FILE --run DIR --minutes 70 --export FILE.safetensors

DIR of --text is what fetch_text.py wrote. Everything of a run is in --run: the training text and its tokens,
checkpoint.pt (weights, optimisers, position in the data; written every few minutes, read at the start if there),
log.jsonl. --steps instead of --minutes makes a run that depends on nothing but the seed. --export-only writes the model
of the newest checkpoint and stops.

Recipe (initialisation, decay groups): BlinkDL/RWKV-LM RWKV-v7/train_temp, as the authors insist on it. Three things
differ, for a model of a few million weights and an hour or two of one core: Muon instead of Adam for the matrices of
the blocks; higher rates, down to zero at the end; and rows of a batch read on in their text with the state of the
window before (gradient cut), from zero every --segment windows, so that the model meets states much older than a
window. The WKV recurrence is computed by wkv7.cc where a C++ compiler is there, else by wkv7_chunked below in plain
tensor operations; train_test.py holds both against the plain recurrence.
"""

import argparse
import ast
import ctypes
import json
import math
import os
import struct
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
HEAD = 64  # head size N
PARTS = ("books", "reference", "chat", "drill")

# ---- the recurrence ---------------------------------------------------------------------------------------------


def wkv7_recurrent(r, logw, k, v, a, b, state):
    """As the paper writes it, one token after the other. r..b [B,T,H,N], state [B,H,N(value),N(key)]."""
    outputs = []
    for t in range(r.shape[1]):
        recall = torch.einsum("bhij,bhj->bhi", state, a[:, t])
        state = (state * logw[:, t].exp()[:, :, None, :] + recall[..., None] * b[:, t][:, :, None, :] +
                 v[:, t][..., None] * k[:, t][:, :, None, :])
        outputs.append(torch.einsum("bhij,bhj->bhi", state, r[:, t]))
    return torch.stack(outputs, 1), state


def wkv7_chunked(r, logw, k, v, a, b, state, chunk=16):
    """The same by chunks (WY form): products of matrices inside a chunk, one affine map of the state per chunk.

    logw >= -0.6066, so quotients of decays within a chunk of 16 stay below 2e4 and the factored form is safe in
    fp32."""
    batch, tokens, heads, n = r.shape
    count = tokens // chunk
    # [B,H,chunks,C,N]
    r, logw, k, v, a, b = (x.view(batch, count, chunk, heads, n).permute(0, 3, 1, 2, 4) for x in (r, logw, k, v, a, b))
    decay = logw.cumsum(-2)  # log W_t
    until, before = decay.exp(), (decay - logw).exp()
    inverse = (-decay).exp()
    rest = (decay[..., -1:, :] - decay).exp()  # W_C / W_s
    r_here, a_here = r * until, a * before
    k_there, b_there = (k * inverse).transpose(-1, -2), (b * inverse).transpose(-1, -2)
    strict = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril(-1)
    upto = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril()
    zero = torch.zeros((), dtype=r.dtype, device=r.device)
    ab, ak = (torch.where(strict, a_here @ x, zero) for x in (b_there, k_there))
    rb, rk = (torch.where(upto, r_here @ x, zero) for x in (b_there, k_there))
    # (I - ab)^-1 = (I + ab)(I + ab^2)(I + ab^4)...: ab is strictly lower triangular, so the product ends.
    solve = torch.eye(chunk, dtype=r.dtype, device=r.device) + ab
    power = ab
    for _ in range(max(0, math.ceil(math.log2(chunk)) - 1)):
        power = power @ power
        solve = solve + solve @ power
    p, q = solve @ a_here, solve @ (ak @ v)  # U = P S^T + Q
    k_rest, b_rest = k * rest, b * rest
    move = torch.diag_embed(until[..., -1, :]) + p.transpose(-1, -2) @ b_rest
    add = q.transpose(-1, -2) @ b_rest + v.transpose(-1, -2) @ k_rest
    starts = []
    for c in range(count):
        starts.append(state)
        state = state @ move[:, :, c] + add[:, :, c]
    starts = torch.stack(starts, 2)
    y = (r_here + rb @ p) @ starts.transpose(-1, -2) + (rb @ q + rk @ v)
    return y.permute(0, 2, 3, 1, 4).reshape(batch, tokens, heads, n), state


def load_native(folder):
    """wkv7.cc as a library, or None where there is no compiler."""
    path = os.path.join(folder, "wkv7.so")
    source = os.path.join(HERE, "wkv7.cc")
    try:
        if not os.path.exists(path) or os.path.getmtime(path) < os.path.getmtime(source):
            os.makedirs(folder, exist_ok=True)
            subprocess.run([
                os.environ.get("CXX", "c++"), "-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC",
                "-pthread", source, "-o", path
            ],
                           check=True,
                           stderr=subprocess.DEVNULL)
        return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError):
        return None


class NativeWkv7(torch.autograd.Function):
    """wkv7.cc. Gradients for all inputs but the state that the window starts with."""

    library = None

    @classmethod
    def call(cls, name, shape, tensors):
        batch, tokens, heads, _ = shape
        getattr(cls.library, name)(*(ctypes.c_int64(x) for x in (batch, tokens, heads)),
                                   ctypes.c_int(torch.get_num_threads()),
                                   *(ctypes.c_void_p(x.data_ptr() if x is not None else 0) for x in tensors))

    @staticmethod
    def forward(ctx, r, logw, k, v, a, b, state):
        r, k, v, a, b = (x.contiguous() for x in (r, k, v, a, b))
        w = logw.exp().contiguous()
        state = state.clone()
        y, recall = torch.empty_like(r), torch.empty_like(r)
        batch, tokens, heads, n = r.shape
        starts = r.new_empty(batch, heads, tokens // NativeWkv7.library.wkv7_chunk(), n, n)
        NativeWkv7.call("wkv7_forward", r.shape, (r, w, k, v, a, b, state, y, recall, starts))
        ctx.save_for_backward(r, w, k, v, a, b, recall, starts)
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    def backward(ctx, dy, _):
        r, w, k, v, a, b, recall, starts = ctx.saved_tensors
        dr, dw, dk, dv, da, db = (torch.zeros_like(r) for _ in range(6))
        NativeWkv7.call("wkv7_backward", r.shape,
                        (r, w, k, v, a, b, recall, starts, dy.contiguous(), dr, dw, dk, dv, da, db))
        return dr, dw * w, dk, dv, da, db, None


# ---- the model --------------------------------------------------------------------------------------------------


def ranks(width):

    def by(factor):
        return max(32, round(factor * math.sqrt(width) / 32) * 32)

    return {"w": by(2.5), "a": by(2.5), "v": by(1.7), "g": by(5)}


def initial_weights(layers, width, vocabulary, generator):
    """{published name: fp32 tensor} in the published shapes."""
    heads, rank, weights = width // HEAD, ranks(width), {}
    channel = torch.arange(width, dtype=torch.float32)
    u, linear = channel / width, channel / (width - 1) - 0.5
    z = ((channel % HEAD) - (HEAD - 1) / 2) / ((HEAD - 1) / 2)
    zigzag = z * z.abs()

    def orthogonal(rows, columns, gain):
        m = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
        q, upper = torch.linalg.qr(m)
        q = q * torch.diagonal(upper).sign()
        return gain * (q if rows >= columns else q.T).contiguous()

    def norm(name):
        weights[name + ".weight"], weights[name + ".bias"] = torch.ones(width), torch.zeros(width)

    weights["emb.weight"] = (torch.rand(vocabulary, width, generator=generator) * 2 - 1) * 1e-4
    for layer in range(layers):
        ratio, left = layer / max(1, layers - 1), 1 - layer / layers
        block = f"blocks.{layer}."
        att, ffn = block + "att.", block + "ffn."
        if layer == 0:
            norm(block + "ln0")
        norm(block + "ln1")
        norm(block + "ln2")
        for name, exponent in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            weights[att + "x_" + name] = (1 - u**(exponent * left)).view(1, 1, -1)
        zero = {
            "w": -6 + 6 * (channel / (width - 1))**(1 + ratio**0.3) + 0.5 + 2.5 * zigzag,
            "a": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "v": 0.73 - 0.4 * linear
        }
        for name in "wavg":
            if name == "v" and layer == 0:
                continue
            if name in zero:
                weights[att + name + "0"] = zero[name].view(1, 1, -1)
            weights[att + name + "1"] = torch.zeros(width, rank[name])
            weights[att + name + "2"] = orthogonal(rank[name], width, 0.1 * max(1, math.sqrt(rank[name] / width)))
        weights[att + "k_k"] = (0.71 - 0.1 * linear).view(1, 1, -1)
        weights[att + "k_a"] = torch.full((1, 1, width), 1.02)
        weights[att + "r_k"] = torch.full((heads, HEAD), -0.04)
        weights[att + "receptance.weight"] = orthogonal(width, width, 1.0)
        weights[att + "key.weight"] = orthogonal(width, width, 0.1)
        weights[att + "value.weight"] = orthogonal(width, width, 1.0)
        weights[att + "output.weight"] = torch.zeros(width, width)
        weights[att + "ln_x.weight"] = torch.full((width,), ((1 + layer) / layers)**0.7)
        weights[att + "ln_x.bias"] = torch.zeros(width)
        weights[ffn + "x_k"] = (1 - u**(left**4)).view(1, 1, -1)
        weights[ffn + "key.weight"] = orthogonal(4 * width, width, 1.0)
        weights[ffn + "value.weight"] = torch.zeros(width, 4 * width)
    norm("ln_out")
    weights["head.weight"] = orthogonal(vocabulary, width,
                                        0.5 * math.sqrt(vocabulary / width) if vocabulary > width else 0.5)
    return weights


COMPUTE = torch.bfloat16  # of the matrix products; everything between them is fp32


def product(x, weight):
    """x W^T in COMPUTE."""
    return F.linear(x.to(COMPUTE), weight.to(COMPUTE))


def low_rank(x, first, second, between):
    return product(between(product(x, first.T).float()), second.T).float()


def same(x):
    return x


def shift(x, previous):
    """x[t-1] beside x[t]; previous is the last x of the window before."""
    return torch.cat([previous[:, None], x[:, :-1]], 1)


def time_mix_inputs(x, previous, v_first, ln_w, ln_b, x_r, x_w, x_k, x_v, x_a, x_g, w0, w1, w2, a0, a1, a2, v0, v1, v2,
                    g1, g2, k_k, k_a, receptance, key, value):
    """Layer norm, token shift and projections: what the recurrence takes, plus the gate, v_first and the shift
    state."""
    batch, tokens, width = x.shape
    heads = (batch, tokens, width // HEAD, HEAD)
    x = F.layer_norm(x, (width,), ln_w, ln_b)
    delta = shift(x, previous) - x
    r = product(x + delta * x_r, receptance).float()
    k = product(x + delta * x_k, key).float()
    at_v = x + delta * x_v
    v = product(at_v, value).float()
    logw = -math.exp(-0.5) * torch.sigmoid(w0 + low_rank(x + delta * x_w, w1, w2, torch.tanh))
    a = torch.sigmoid(a0 + low_rank(x + delta * x_a, a1, a2, same))
    g = low_rank(x + delta * x_g, g1, g2, torch.sigmoid)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(v0 + low_rank(at_v, v1, v2, same))
    kappa = F.normalize((k * k_k).view(heads), dim=-1, p=2.0, eps=1e-12)
    k = k * (1 + (a - 1) * k_a)
    return (r.view(heads), logw.view(heads), k.view(heads), v.view(heads), -kappa, kappa * a.view(heads), g, v_first,
            x[:, -1])


def time_mix_output(x, y, r, k, v, g, ln_w, ln_b, r_k, output):
    """Group norm, bonus and gate; adds to the residual stream x."""
    batch, tokens, width = x.shape
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 64e-5)
    y = y.reshape(batch, tokens, width) * ln_w + ln_b
    y = y + ((r * k * r_k).sum(-1, keepdim=True) * v).view(batch, tokens, width)
    return x + product(y * g, output)


def channel_mix(x, previous, ln_w, ln_b, x_k, key, value):
    h = F.layer_norm(x, (x.shape[-1],), ln_w, ln_b)
    k = torch.relu(product(h + (shift(h, previous) - h) * x_k, key)).square()
    return x + product(k, value), h[:, -1]


def head_loss(x, ln_w, ln_b, head, targets):
    """Cross entropy of each token, and the mean loss that is trained: with L2 wrap, whose gradient keeps the logits
    small."""
    logits = product(F.layer_norm(x, (x.shape[-1],), ln_w, ln_b), head).float()
    largest = logits.amax(-1, keepdim=True)
    logits = logits - largest
    nats = logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None]).squeeze(-1)
    return nats.mean() + 0.5e-4 * largest.square().mean(), nats.detach()


def embed(tokens, emb, ln_w, ln_b):
    return F.layer_norm(F.embedding(tokens, emb), (emb.shape[1],), ln_w, ln_b)


class Model(torch.nn.Module):

    def __init__(self, weights):
        super().__init__()
        self.names = list(weights)
        self.tensors = torch.nn.ParameterList([torch.nn.Parameter(w) for w in weights.values()])
        self.layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
        self.functions = {f.__name__: f for f in (embed, time_mix_inputs, time_mix_output, channel_mix, head_loss)}
        self.wkv = wkv7_chunked

    def compile(self):
        # Per function, not whole: layers share the compiled code, and the recurrence stays outside.
        for name in ("time_mix_inputs", "time_mix_output", "channel_mix", "head_loss"):
            self.functions[name] = torch.compile(self.functions[name], dynamic=False)

    def weights(self):
        return dict(zip(self.names, self.tensors))

    def zero_state(self, batch):
        device, width = self.tensors[0].device, self.weights()["ln_out.weight"].shape[0]

        def zeros(*shape):
            return torch.zeros(batch, *shape, device=device)

        return [(zeros(width), zeros(width // HEAD, HEAD, HEAD), zeros(width)) for _ in range(self.layers)]

    def forward(self, inputs, targets, states):
        """Mean loss to train, nats of each token, and the states after the window (per layer: shift, wkv, shift)."""
        w, f = self.weights(), self.functions
        x = f["embed"](inputs, w["emb.weight"], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
        after, v_first = [], None
        for layer, (att_shift, wkv_state, ffn_shift) in enumerate(states):

            def get(*names, prefix=f"blocks.{layer}."):
                return [w.get(prefix + n) for n in names]

            r, logw, k, v, a, b, g, v_first, att_shift = f["time_mix_inputs"](x, att_shift, v_first, *get(
                "ln1.weight", "ln1.bias", "att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g", "att.w0",
                "att.w1", "att.w2", "att.a0", "att.a1", "att.a2", "att.v0", "att.v1", "att.v2", "att.g1", "att.g2",
                "att.k_k", "att.k_a", "att.receptance.weight", "att.key.weight", "att.value.weight"))
            y, wkv_state = self.wkv(r, logw, k, v, a, b, wkv_state)
            x = f["time_mix_output"](x, y, r, k, v, g, *get("att.ln_x.weight", "att.ln_x.bias", "att.r_k",
                                                            "att.output.weight"))
            x, ffn_shift = f["channel_mix"](x, ffn_shift, *get("ln2.weight", "ln2.bias", "ffn.x_k", "ffn.key.weight",
                                                               "ffn.value.weight"))
            after.append((att_shift.detach(), wkv_state.detach(), ffn_shift.detach()))
        loss, nats = f["head_loss"](x, w["ln_out.weight"], w["ln_out.bias"], w["head.weight"], targets)
        return loss, nats, after


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: for the square and oblong matrices inside the blocks, where it learns
    from fewer tokens than Adam. A step has the spectral norm rate * sqrt(max(1, rows / columns))."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def orthogonal(m):
        """A matrix with m's singular vectors and singular values near 1."""
        c1, c3, c5 = Muon.COEFFICIENTS
        x = m.T if m.shape[0] > m.shape[1] else m
        x = (x / (x.norm() + 1e-12)).to(COMPUTE)
        for _ in range(5):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=c3, alpha=c5), x, beta=c1)
        return (x.T if m.shape[0] > m.shape[1] else x).to(m.dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = self.orthogonal(weight.grad.lerp(momentum, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def optimisers(model, options):
    """Muon for the matrices of the blocks, AdamW with the reference's groups for the rest; "peak" is a group's highest
    rate."""
    inner, outer, w0, rest = [], [], [], []
    for name, tensor in model.weights().items():
        matrix = name.endswith(".weight") and tensor.squeeze().dim() == 2
        group = w0 if name.endswith("att.w0") else rest if not matrix else inner if name.startswith(
            "blocks.") else outer
        group.append(tensor)
    muon = Muon([{"params": inner, "peak": options.muon_rate}], lr=options.muon_rate, weight_decay=options.decay)
    adam = torch.optim.AdamW([{
        "params": outer,
        "weight_decay": options.decay,
        "peak": options.rate
    }, {
        "params": w0,
        "weight_decay": 0.0,
        "peak": 2 * options.rate
    }, {
        "params": rest,
        "weight_decay": 0.0,
        "peak": options.rate
    }],
                             lr=options.rate,
                             betas=(0.9, 0.99),
                             eps=1e-18,
                             fused=True)
    return muon, adam


# ---- vocabulary and data ----------------------------------------------------------------------------------------


def read_vocabulary(path):
    """Token bytes in id order from 1."""
    tokens = []
    with open(path, "rb") as f:
        for line in f.read().decode("utf-8").split("\n"):
            if line:
                first, last = line.index(" "), line.rindex(" ")
                value = ast.literal_eval(line[first + 1:last])
                tokens.append(value.encode("utf-8") if isinstance(value, str) else value)
                assert int(line[:first]) == len(tokens) and int(line[last + 1:]) == len(tokens[-1]), line
    return tokens


def tokenize(data, tokens, native):
    """Bytes -> ids by greedy longest match; a zero byte is document end, id 0."""
    if native is not None:
        ids = torch.empty(len(data), dtype=torch.uint16)
        begin = torch.tensor([0] + [len(t) for t in tokens]).cumsum(0)
        native.tokenize.restype = ctypes.c_int64
        count = native.tokenize(ctypes.c_int64(len(data)), data, ctypes.c_int64(len(tokens)), b"".join(tokens),
                                ctypes.c_void_p(begin.data_ptr()), ctypes.c_void_p(ids.data_ptr()))
        return ids[:count].clone()
    index = {t: i for i, t in enumerate(tokens, 1)}
    longest, ids, at = max(map(len, tokens)), [], 0
    while at < len(data):
        for size in range(longest, 0, -1):
            piece = data[at:at + size]
            if piece in index and (size == 1 or b"\0" not in piece):
                ids.append(0 if piece == b"\0" else index[piece])
                at += len(piece)
                break
    return torch.tensor(ids, dtype=torch.int32).to(torch.uint16)


def training_text(folder, generator, take):
    """All training documents in random order, each after a zero byte. take: {part: bytes} makes do with random passages
    of a part."""
    documents = []
    for part in PARTS:
        path = os.path.join(folder, part + ".train.txt")
        if not os.path.exists(path):
            continue
        with open(path, "rb") as f:
            data = f.read()
        if part not in take:
            documents += data.split(b"\0")
            continue
        size = 16384
        for begin in torch.randint(0, max(1,
                                          len(data) - 2 * size), (take[part] // size,), generator=generator).tolist():
            first = data.find(b"\n\n", begin) + 2
            documents += data[first:data.rfind(b"\n\n", first, first + size) + 2].split(b"\0")
    order = torch.randperm(len(documents), generator=generator).tolist()
    return b"".join(b"\0" + documents[i] for i in order)


class Segments:
    """Deals pieces of `windows` windows to the rows of a batch, each piece once an epoch, in random order."""

    def __init__(self, stream, rows, context, windows, seed):
        self.stream, self.rows, self.context, self.windows, self.seed = stream, rows, context, windows, seed
        self.size = context * windows
        self.stream = stream.to(torch.int32)
        starts = torch.arange(0, max(1, len(stream) - self.size), self.size)
        # A piece that can start with a document does: at most a quarter of a piece is read twice for that.
        ends = (self.stream == 0).nonzero().squeeze(-1)
        if len(ends):
            near = ends[torch.searchsorted(ends, starts, right=True).sub(1).clamp(min=0)]
            starts = torch.where((near <= starts) & (starts - near < self.size // 4), near, starts)
        self.starts = starts

    def batch(self, step):
        """inputs, targets [B, T] and which rows start a piece; a function of the step alone, so that a run can
        resume."""
        rows, pieces, restart = [], [], []
        for row in range(self.rows):
            at = step + row * self.windows // self.rows  # rows change their piece at different steps
            number = (at // self.windows) * self.rows + row
            epoch, within = divmod(number, len(self.starts))
            window = at % self.windows
            begin = self.starts[self.order(epoch)[within]].item() + window * self.context
            piece = self.stream[begin:begin + self.context + 1].long()
            first = window == 0 or step == 0
            restart.append(first)
            inputs, targets = piece[:-1].clone(), piece[1:]
            if first and number % 2 == 0:
                inputs[0] = 0  # half of the pieces begin with document end, as prompts and scored texts do
            rows.append(inputs)
            pieces.append(targets)
        return torch.stack(rows), torch.stack(pieces), torch.tensor(restart)

    def order(self, epoch):
        if getattr(self, "order_epoch", None) != epoch:
            self.order_epoch = epoch
            self.order_now = torch.randperm(len(self.starts),
                                            generator=torch.Generator().manual_seed(self.seed + 1000 + epoch))
        return self.order_now


# ---- export -----------------------------------------------------------------------------------------------------


def write_safetensors(path, weights, metadata, dtype):
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    header, blobs, at = {"__metadata__": {k: str(v) for k, v in metadata.items()}}, [], 0
    for name, tensor in weights.items():
        blob = tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    os.replace(path + ".part", path)


def export(model, path, dtype, options, progress):
    metadata = {
        "model": "RWKV-7 demo",
        "vocabulary": os.path.basename(options.vocabulary),
        "template": "User: {question}\\n\\nAssistant: {answer}\\n\\n",
        "training_text":
            "236 public-domain books of 1800-1930, WordNet 3.0 as questions and answers, Jargon File, Debian Handbook "
            "and Debian Reference; list in sources.json; of it " +
            (" ".join(options.take) + " MB" if options.take else "all"),
        "licence": "Apache-2.0 for the weights; WordNet 3.0 Copyright 2006 by Princeton University",
        "context": options.context,
        "tokens_seen": progress["tokens"],
        "steps": progress["step"],
        "training_loss_nats_per_token": round(progress["loss"], 4),
        "heldout": options.heldout,
        "made_by": "deploy/demo_model/train.py",
    }
    write_safetensors(path, model.weights(), metadata, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    print("wrote", path, os.path.getsize(path), "bytes", flush=True)


# ---- training ---------------------------------------------------------------------------------------------------


def rate(options, progress, step):
    """Share of the peak rate: warm-up, level for --level of the run, then a line down to zero; progress is the share
    done."""
    return min(1.0, 0.01 + step / options.warmup, (1 - progress) / (1 - options.level))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="folder that fetch_text.py wrote")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--take",
                        nargs="*",
                        default=[],
                        metavar="PART=MB",
                        help="use only so much of a part, for example books=2")
    parser.add_argument("--run",
                        required=True,
                        help="folder for checkpoint, log and token stream; outside the repository")
    parser.add_argument("--export", help="write the model here at the end")
    parser.add_argument("--heldout",
                        default="not measured",
                        help="the loss on held-out text, for the metadata of the export")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="fp16", help="of the exported file")
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint and stop")
    parser.add_argument("--minutes", type=float, default=0, help="length of the run, time of earlier starts included")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--segment", type=int, default=8, help="windows that a row reads on with its state")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest rate of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="highest rate of Muon")
    parser.add_argument("--level",
                        type=float,
                        default=0.2,
                        help="share of the run at the highest rate, before the line down to zero")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--log-steps", type=int, default=10)
    parser.add_argument("--native", choices=("auto", "off"), default="auto")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    os.makedirs(options.run, exist_ok=True)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = read_vocabulary(options.vocabulary)
    model = Model(initial_weights(options.layers, options.width, len(tokens) + 1, generator)).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(tokens) + 1} ids", flush=True)
    both = optimisers(model, options)
    progress = {"step": 0, "tokens": 0, "seconds": 0.0, "loss": 0.0}
    states = model.zero_state(options.rows)
    checkpoint = os.path.join(options.run, "checkpoint.pt")
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint, map_location=options.device)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(both, saved["optimisers"]):
            optimiser.load_state_dict(state)
        progress, states = saved["progress"], saved["states"]
        print("resumed:", progress, flush=True)
    if options.export_only:
        return export(model, options.export, options.dtype, options, progress)

    native = load_native(options.run) if options.native == "auto" else None
    if native is not None and options.device == "cpu" and options.context % native.wkv7_chunk() == 0:
        NativeWkv7.library = native
        model.wkv = NativeWkv7.apply
    if options.compile == "on":
        model.compile()
    stream_path = os.path.join(options.run, "tokens.pt")
    if os.path.exists(stream_path):
        stream = torch.load(stream_path)
    else:
        take = {part: int(1e6 * float(size)) for part, size in (item.split("=") for item in options.take)}
        text = training_text(options.text, torch.Generator().manual_seed(options.seed), take)
        with open(os.path.join(options.run, "training.txt"), "wb") as f:
            f.write(text)
        stream = tokenize(text, tokens, native)
        torch.save(stream, stream_path)
    data = Segments(stream, options.rows, options.context, options.segment, options.seed)
    print(f"{len(stream):,} tokens of text, {len(data.starts):,} pieces", flush=True)

    def save():
        torch.save(
            {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in both],
                "progress": progress,
                "states": states
            }, checkpoint + ".part")
        os.replace(checkpoint + ".part", checkpoint)

    last_save, log = time.time(), open(os.path.join(options.run, "log.jsonl"), "a")
    recent = []
    while True:
        begin = time.time()
        done = max(progress["seconds"] / 60 / options.minutes if options.minutes else 0,
                   progress["step"] / options.steps if options.steps else 0)
        if done >= 1:
            break
        step = progress["step"]
        now = rate(options, done, step)
        for group in (g for o in both for g in o.param_groups):
            group["lr"] = group["peak"] * now
        inputs, targets, restart = (x.to(options.device) for x in data.batch(step))
        keep = (~restart).float()
        states = [(a * keep[:, None], s * keep[:, None, None, None], c * keep[:, None]) for a, s, c in states]
        loss, nats, states = model(inputs, targets, states)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(norm):
            sys.exit(f"step {step}: the gradient is not finite; the last checkpoint is kept")
        for optimiser in both:
            optimiser.step()
        nats = nats.mean().item()
        progress["step"] += 1
        progress["tokens"] += inputs.numel()
        progress["seconds"] += time.time() - begin
        progress["loss"] = nats if step == 0 else 0.98 * progress["loss"] + 0.02 * nats
        recent.append((nats, norm, time.time() - begin))
        if progress["step"] % options.log_steps == 0:
            row = {
                "step": progress["step"],
                "tokens": progress["tokens"],
                "minutes": round(progress["seconds"] / 60, 2),
                "loss": round(sum(n for n, _, _ in recent) / len(recent), 4),
                "norm": round(sum(n for _, n, _ in recent) / len(recent), 3),
                "rate": round(now, 4),
                "tokens_per_second": round(len(recent) * inputs.numel() / sum(s for _, _, s in recent))
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            recent = []
        if time.time() - last_save > 60 * options.save_minutes:
            save()
            last_save = time.time()
    save()
    if options.export:
        export(model, options.export, options.dtype, options, progress)


if __name__ == "__main__":
    main()

"""The demo model: the initial weights of an RWKV-7, and what it computes of a window of tokens."""

import math

import torch
import torch.nn.functional as F

from wkv7 import wkv7_chunked

HEAD = 64  # head size N


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

"""The recurrence of RWKV-7 for training: token by token, by chunks in plain tensor operations, and in C++ (wkv7.cc)."""

import ctypes
import math
import os
import subprocess

import torch

HERE = os.path.dirname(os.path.abspath(__file__))


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

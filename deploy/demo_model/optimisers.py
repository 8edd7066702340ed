"""What moves the weights: Muon for the matrices of the blocks, AdamW for the rest."""

import math

import torch

import rwkv7


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
        x = (x / (x.norm() + 1e-12)).to(rwkv7.COMPUTE)
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

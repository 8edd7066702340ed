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
window. The WKV recurrence is computed by wkv7.cc where a C++ compiler is there, else in plain tensor operations
(wkv7.py); train_test.py holds both against the plain recurrence.
"""

import argparse
import json
import math
import os
import struct
import sys
import time

import torch

from optimisers import optimisers
from rwkv7 import Model, initial_weights
from training_text import Segments, read_vocabulary, tokenize, training_text
from wkv7 import NativeWkv7, load_native


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

    if not hasattr(torch, "uint16"):
        sys.exit(f"train.py: PyTorch {torch.__version__} is too old, 2.3 is needed")
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

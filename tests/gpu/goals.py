#!/usr/bin/env python3
"""What was measured against what was wanted.

goals.py OUT_DIR GPU GOAL     GPU: its name; GOAL: kernels, peers, decode_1.5b_1, decode_1.5b_32, decode_7.2b_1,
                              prefill_1.5b, prefill_1.5b_rounded, prefill_1.5b_lt, serving_1.5b

Prints "SAYS: ..." with the numbers; ends with 1 if the goal is missed. "NOT RUN: ..." for a GPU that has no goal.
"""
import json
import pathlib
import sys

# Tokens/s of decode_*; from Albatross' published figures and half as much again (the study of the CUDA backend).
TOKENS = {"decode_1.5b_1": {"H200": 1070, "H100": 930}, "decode_1.5b_32": {"H200": 13500, "H100": 12500}}
SERVING = {"H200": 40000, "H100": 40000}  # tokens/s of the whole path, many streams
OF_COPY = 0.85  # 7.2B at one row: of the measured bandwidth of copies
OF_MATRIX = 0.60  # prefill of 32 prompts of 1024 tokens: of the measured matrix rate
GAP_US = 2.6  # a kernel's boundary, as static_report.md guesses
# Weights of a step without the embedding, and state read and written a sequence, in bytes; operations a token.
BYTES_7_2B = 13.863e9 + 68.2e6
WEIGHTS_1_5B = 2.787e9 / 2


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best(speed, model, case, **sizes):
    for line in speed:
        if line["model"] == model and line["case"] == case and all(line.get(k) == v for k, v in sizes.items()):
            return line["tokens_per_s"]["best"]
    return None


def beside(speed, peers):
    """Ours in percent of theirs, for what both have measured."""
    shares = []
    for line in peers:
        case = {key: line[key] for key in ("batch", "length", "sequences") if key in line}
        ours = best(speed, line["model"], line["case"], **case)
        if ours is not None:
            theirs = line["tokens_per_s"]["best"]
            what = ", ".join([line["case"], *(f"{key} {value}" for key, value in case.items())])
            shares.append(f"{ours / theirs:.0%} of {line['peer']}'s {theirs:g} at {line['model']}, {what}")
    return (True, "; ".join(shares)) if shares else (None, "no peer was measured")


def judge(name, gpu, rates, ops, speed):
    """(whether it is reached or None if there is nothing to judge, words)"""
    if not rates:
        return None, "the machine's rates were not measured"
    copy, matrix = rates[0]["copy_gb_per_s"] * 1e9, rates[0]["matrix_tflop_per_s"] * 1e12
    if name == "kernels":
        if not ops:
            return None, "no kernel was measured"
        shares = []
        for op in ops:
            need_us = max(op["bytes"] / copy, op["flop"] / max(matrix, 1)) * 1e6 + GAP_US
            shares.append((op["us"] / need_us, f"{op['op']} at {op['rows']} rows of {op['width']}"))
        return True, "time over need: " + "; ".join(f"{share:.1f} {what}" for share, what in sorted(shares)[-3:])
    if gpu == "emulated":
        return None, "no GPU"
    if name == "serving_1.5b":
        wanted = next((tokens for card, tokens in SERVING.items() if card in gpu), None)
        got = best(speed, "1.5b", "serving")
        if wanted is None or got is None:
            return None, f"no goal for {gpu}" if got else "not measured"
        return got >= wanted, f"{got:.0f} tokens/s of {wanted}"
    if name in TOKENS:
        wanted = next((tokens for card, tokens in TOKENS[name].items() if card in gpu), None)
        got = best(speed, "1.5b", "decode", batch=int(name.rsplit("_", 1)[1]))
        if wanted is None or got is None:
            return None, f"no goal for {gpu}" if got else "not measured"
        return got >= wanted, f"{got:.0f} tokens/s of {wanted}"
    if name == "decode_7.2b_1":
        got = best(speed, "7.2b", "decode", batch=1)
        if got is None:
            return None, "not measured"
        share = got * BYTES_7_2B / copy
        return share >= OF_COPY, f"{got:.0f} tokens/s, {share:.0%} of the copies' bandwidth, {OF_COPY:.0%} wanted"
    model = name[len("prefill_"):].replace("_", "/")  # "1.5b", "1.5b/lt"
    got = best(speed, model, "prefill", length=1024, sequences=32)
    if got is None:
        return None, "not measured"
    share = got * 2 * WEIGHTS_1_5B / matrix
    return share >= OF_MATRIX, f"{got:.0f} tokens/s, {share:.0%} of the matrix rate, {OF_MATRIX:.0%} wanted"


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1])
    speed = lines_of(out / "speed.jsonl")
    if sys.argv[3] == "peers":
        reached, words = beside(speed, lines_of(out / "peers.jsonl"))
    else:
        reached, words = judge(sys.argv[3], sys.argv[2], lines_of(out / "rates.jsonl"), lines_of(out / "ops.jsonl"),
                               speed)
    print(f"{'NOT RUN' if reached is None else 'SAYS'}: {words}")
    if reached is False:
        sys.exit(f"missed: {words}")


if __name__ == "__main__":
    main()

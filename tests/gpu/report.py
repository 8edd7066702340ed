#!/usr/bin/env python3
"""What can be said of the CUDA kernels' speed without a GPU: static_report.json, static_report.md.

report.py --resources PTXAS_LOG... --ptx FILE... --launches FILE --traffic FILE --out FOLDER    writes the two files
report.py ... --check FOLDER    fails if they say better than what is the case, or if kernels wait for something else

Resources are what `nvcc -Xptxas=-v` prints, ptx what `nvcc -ptx` writes, launches and traffic what tests/gpu/launches
and traffic print. Nothing here was measured on a GPU; the predicted times are bounds and sums, to be held against a
run.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys

# Nominal: HBM bandwidth in bytes/s, dense rate of bfloat16 tensor cores in flop/s.
GPUS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
# Of that rate: what mma.sync may reach of it on Hopper, which only wgmma reaches in full. A guess.
MMA_RATE = 0.6
# For a product of a float and a bfloat16 weight: three parts of the float.
PRODUCT_RATE = MMA_RATE / 3
# Weights of few bits: two products of bytes an input. Each block makes bytes of its inputs anew, by about ten
# instructions a number, for 16 outputs of up to 16 rows and for 64 of more (kernels/cuda/tensor_fixed_products.cuh).
BYTE_RATE = 1979e12 * 0.6 / 2
INSTRUCTIONS = 132 * 128 * 1.7e9  # a second, of all lanes
CONVERSION = 10
# Bytes a weight, with its group's scale and minimum; and those of a number of the wkv state.
WEIGHTS = {"16 bits": (2, 4), "int8": (1 + 2 / 32, 4), "int4": (0.5 + 4 / 32, 4), "16 bits, fp16 states": (2, 2),
           "16 bits, rounded inputs": (2, 4)}
LAYER_KERNELS = {"1": 8, "16": 13}  # at most, by rows
ACHIEVABLE = 0.9  # Of the nominal bandwidth: what copies reach on these cards.
# Seconds lost at a kernel's boundary: what published decode times of others come to, and what is assumed to be left
# where the next kernel's blocks are there and their weights on the way before the last one ends (programmatic dependent
# launch; others saw 97 % of the boundaries overlap on another card).
SERIAL_GAP = 2.6e-6
GAP = 1.0e-6
# Of the time that the step's bytes take at the achievable bandwidth, at 1 row with 16-bit weights: at least this share.
SHARES = {"1.5B": 0.70, "7.2B": 0.85}
MODELS = {  # width, layers, ranks of decay, iclr, value residual and gate
    "0.4B": (1024, 24, (64, 64, 32, 128)),
    "1.5B": (2048, 24, (96, 96, 64, 256)),
    "2.9B": (2560, 32, (96, 96, 64, 320)),
    "7.2B": (4096, 32, (128, 128, 96, 480)),
}
VOCABULARY = 65536
# Drawing takes a block a row: for a greedy one an exponential in double for each id, of 41 operations none of which are
# fused, where a multiprocessor has 64 lanes for them.
DRAW = VOCABULARY * 41 / (64 * 1.7e9)
MULTIPROCESSORS = 132
HEAD = 64
ROWS = (1, 8, 32, 256)

# The names of launches, and the kernels behind them.
KERNELS = {
    "embed": "EmbedKernel",
    "layer_norm": "LayerNormKernel",
    "mix_input": "MixInputKernel",
    "mix_state": "MixStateKernel",
    "products": "ProductsKernel",
    "tensor_products": "TensorProductsKernel",
    "rounded_products": "TensorProductsKernel",
    "round_inputs": "RoundInputsKernel",
    "finish_product": "FinishProductKernel",
    "fixed_products": "FixedProductsKernel",
    "tensor_fixed_products": "TensorFixedProductsKernel",
    "wkv4": "Wkv4Kernel",
    "wkv6": "Wkv6Kernel",
    "wkv7": "Wkv7Kernel",
    "deep_embed": "DeepEmbedKernel",
    "attention": "AttentionKernel",
    "attention_state": "AttentionStateKernel",
    "sample": "SampleKernel",
}
# What threads wait for and exchange, by the beginning of the instruction.
EXCHANGES = {"barriers": "bar.sync", "warp_barriers": "bar.warp.sync", "shuffles": "shfl.sync",
             "matrix_products": "mma.sync", "atomics": "atom."}
# What may come before a kernel has waited for the one before.
HARMLESS = ("ld.param", "prefetch")
SM = {"registers": 65536, "warps": 64, "blocks": 32, "shared": {"sm_80": 164 << 10, "sm_90": 228 << 10}}


def demangle(name):
    text = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\w+::|\((?:\w+)\)", "", text).replace(" ", "")


def read_resources(paths):
    """{(kernel, architecture): {registers, spills, stack, shared}}"""
    kernels = {}
    for path in paths:
        key = None
        for line in pathlib.Path(path).read_text().splitlines():
            entry = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
            if entry:
                key = (demangle(entry[1]), entry[2])
                kernels[key] = {"registers": 0, "spills": 0, "stack": 0, "shared": 0}
            if key is None:
                continue
            frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
            if frame:
                kernels[key]["stack"] = int(frame[1])
                kernels[key]["spills"] = int(frame[2]) + int(frame[3])
            used = re.search(r"Used (\d+) registers", line)
            if used:
                kernels[key]["registers"] = int(used[1])
                shared = re.search(r"(\d+) bytes smem", line)
                kernels[key]["shared"] = int(shared[1]) if shared else 0
    return kernels


def threads_of(kernel):
    """As the launch bounds say: products 128, on tensor cores and of rows 256, wkv 16 * quads * 4 of a head, sample 512."""
    name = kernel.split("<")[0]
    if name == "Wkv4Kernel":
        return 64
    if name == "SampleKernel":
        return 512
    if name.startswith("Wkv"):
        return 64 * int(re.search(r"<(\d+)", kernel)[1])
    return 128 if name in ("ProductsKernel", "FixedProductsKernel") else 256


def read_ptx(paths):
    """{kernel: {exchange: how many instructions}}, and what is wrong with how kernels begin, in words."""
    kernels = {}
    problems = []
    for path in paths:
        for entry in re.finditer(r"\.entry (\w+)\(.*?^\{\n(.*?)^\}", pathlib.Path(path).read_text(), re.S | re.M):
            kernel = demangle(entry[1])
            instructions = re.findall(r"^\s+(?:@!?%\w+\s+)?\{?\s*([a-z][\w.:]*)", entry[2], re.M)
            kernels[kernel] = {name: sum(instruction.startswith(beginning) for instruction in instructions)
                               for name, beginning in EXCHANGES.items()}
            waits = [at for at, name in enumerate(instructions) if name.startswith("griddepcontrol.wait")]
            lets = [at for at, name in enumerate(instructions) if name.startswith("griddepcontrol.launch_dependents")]
            if len(waits) != 1:
                problems.append(f"{kernel}: waits {len(waits)} times for the kernel before")
                continue
            if len(lets) != 1 or lets[0] < waits[0]:
                problems.append(f"{kernel}: lets the next kernel begin {len(lets)} times")
            for name in instructions[:waits[0]]:
                if name.startswith(("ld.", "st.", "atom", "red", "bar", "shfl", "mma", "ldu")) and \
                        not name.startswith(HARMLESS):
                    problems.append(f"{kernel}: {name} before it waits for the kernel before")
    return kernels, problems


def warps_per_sm(used, threads, architecture):
    warps = threads // 32
    granted = -(-used["registers"] * 32 // 256) * 256  # Registers come in 256 a warp.
    blocks = min(SM["blocks"], SM["warps"] // warps, SM["registers"] // granted // warps if granted else SM["blocks"])
    if used["shared"]:
        blocks = min(blocks, SM["shared"][architecture] // (used["shared"] + 1024))
    return blocks * warps


def read_launches(path):
    """{rows: {"layer": {kernel: count}, "step": count}}, step without layers."""
    counts = {}
    for line in pathlib.Path(path).read_text().splitlines():
        launch = json.loads(line)
        of_step = counts.setdefault((launch["rows"], launch["layers"]), {})
        of_step[launch["kernel"]] = of_step.get(launch["kernel"], 0) + 1
    result = {}
    for rows in sorted({rows for rows, _ in counts}):
        two, three = counts[(rows, 2)], counts[(rows, 3)]
        layer = {kernel: three[kernel] - two.get(kernel, 0) for kernel in three}
        layer = {kernel: count for kernel, count in sorted(layer.items()) if count}
        result[str(rows)] = {"layer": layer, "per_layer": sum(layer.values()),
                             "per_step": sum(two.values()) - 2 * sum(layer.values())}
    return result


def weight_counts(width, layers, ranks):
    """Those that may have few bits, the ranks."""
    return layers * 12 * width * width + VOCABULARY * width, layers * 2 * width * sum(ranks)


def state_bytes(width, layers, bytes_of_number):
    """Read and written by a sequence's step."""
    return 2 * layers * (bytes_of_number * width * HEAD + 4 * 2 * width)


def work_seconds(weights, counts, rows, bytes_of_step, bandwidth, rate):
    large, ranks = counts
    seconds = {"bytes": bytes_of_step / (ACHIEVABLE * bandwidth)}
    if weights.startswith("16 bits"):
        parts = 1 if weights.endswith("rounded inputs") else 3
        seconds["matrix rate"] = 2 * rows * (large + ranks) / (rate * MMA_RATE / parts)
    else:
        tile, outputs = (8, 16) if rows <= 8 else (16, 16) if rows <= 16 else (16, 64)
        padded = -(-rows // tile) * tile
        seconds["matrix rate"] = 2 * rows * (large / BYTE_RATE + ranks / (rate * PRODUCT_RATE))
        seconds["conversions"] = padded * large / outputs * CONVERSION / INSTRUCTIONS
    return max((value, name) for name, value in seconds.items())


def predict(launches):
    steps = []
    for weights, (bytes_of_weight, bytes_of_state) in WEIGHTS.items():
        for model, (width, layers, ranks) in MODELS.items():
            for rows in ROWS:
                shape = launches["1" if rows == 1 else "16"]
                kernels = shape["per_layer"] * layers + shape["per_step"]
                # Ranks keep 16 bits, which is a launch of their own beside matrices of few.
                kernels += layers if not weights.startswith("16 bits") else 0
                counts = weight_counts(width, layers, ranks)
                floor = round(counts[0] * bytes_of_weight + counts[1] * 2 +
                              rows * state_bytes(width, layers, bytes_of_state))
                step = {"weights": weights, "model": model, "rows": rows, "kernels": kernels, "floor_bytes": floor}
                for gpu, (bandwidth, rate) in GPUS.items():
                    work, bound = work_seconds(weights, counts, rows, floor, bandwidth, rate)
                    work += -(-rows // MULTIPROCESSORS) * DRAW
                    seconds = work + kernels * GAP
                    step[gpu] = {"floor_us": round(floor / bandwidth * 1e6, 1),
                                 "serial_us": round((work + kernels * SERIAL_GAP) * 1e6, 1),
                                 "predicted_us": round(seconds * 1e6, 1), "tokens_per_s": round(rows / seconds),
                                 "share": round(floor / (ACHIEVABLE * bandwidth) / seconds, 3), "bound": bound}
                steps.append(step)
    return steps


def read_traffic(path):
    """{"kernel, rows": {bytes, wide, sectors, conflicts}}, of the emulation's checker."""
    result = {}
    for line in pathlib.Path(path).read_text().splitlines():
        traffic = json.loads(line)
        result[f"{traffic['kernel']}, {traffic['rows']}"] = {
            key: round(traffic[key], 3) for key in ("bytes", "wide", "sectors", "conflicts")}
    return result


def make(resources, exchanges, launches, traffic):
    kernels = {}
    for (kernel, architecture), used in sorted(resources.items()):
        threads = threads_of(kernel)
        kernels[f"{kernel} {architecture}"] = dict(
            used, threads=threads, warps_per_sm=warps_per_sm(used, threads, architecture))
    return {"kernels": kernels, "exchanges": exchanges, "launches": launches, "traffic": traffic,
            "steps": predict(launches)}


def markdown(report):
    out = ["# Static report of the CUDA kernels", "",
           "Written by `tests/gpu/report.sh`; a test fails when the tree gets worse than this. **Nothing here was",
           "measured on a GPU.** Occupancy follows from registers, launch bounds and static shared memory. A predicted",
           f"time is max(bytes / {ACHIEVABLE} of nominal bandwidth, flop / {PRODUCT_RATE:.1f} of the matrix rate, with",
           f"rounded inputs {MMA_RATE:.1f}) +",
           f"{DRAW * 1e6:.0f} us to draw from up to {MULTIPROCESSORS} rows + kernels x {GAP * 1e6} us, of kernels",
           "that overlap: a guess to be held against a run. Serial: with",
           f"{SERIAL_GAP * 1e6} us, which is what others' published times come to without overlap. Share: of the time",
           "that the bytes alone take at the achievable bandwidth.", "",
           "## Kernels of a decode step, RWKV-7", "",
           "| rows | a layer | of them | a step besides |", "|---|---:|---|---:|"]
    for rows, shape in report["launches"].items():
        of_them = ", ".join(f"{count} {kernel}" for kernel, count in shape["layer"].items())
        out.append(f"| {rows} | {shape['per_layer']} | {of_them} | {shape['per_step']} |")
    out += ["", "## Accesses", "",
            "Of a step of width 256: bytes that lanes ask of memory, the share of them by 16 bytes, the share of",
            "the 32-byte sectors touched that a warp's request uses, passes too many a request to shared memory.", "",
            "| kernel, rows | bytes | wide | sectors | conflicts |", "|---|---:|---:|---:|---:|"]
    for name, of in report["traffic"].items():
        out.append(f"| {name} | {of['bytes']} | {of['wide']:.0%} | {of['sectors']:.0%} | {of['conflicts']} |")
    out += ["", "## Predicted steps", "",
            "States in fp32 where nothing else is said. MB: of weights and states, which no step can do without. With",
            "weights of few bits the time is the largest",
            f"of bytes, of two products of bytes at {BYTE_RATE / 1e12:.0f} Top/s, and of the blocks' making bytes of",
            f"their inputs, {CONVERSION} instructions a number; c: that is the largest.", "",
            "| weights | model | rows | kernels | MB | H100 floor us | serial | predicted | tok/s | share |"
            " H200 floor us | serial | predicted | tok/s | share |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for step in report["steps"]:
        cells = [step["weights"], step["model"], step["rows"], step["kernels"], round(step["floor_bytes"] / 1e6)]
        for gpu in GPUS:
            mark = " c" if step[gpu]["bound"] == "conversions" else ""
            cells += [step[gpu]["floor_us"], step[gpu]["serial_us"], f"{step[gpu]['predicted_us']}{mark}",
                      step[gpu]["tokens_per_s"], f"{step[gpu]['share']:.0%}"]
        out.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    out += ["", "## Exchanges", "",
            "Instructions of PTX by which threads wait for each other or exchange something. Each kernel waits once",
            "for the one before, before it touches memory but to prefetch, and then lets the next one begin.", "",
            "| kernel | " + " | ".join(name.replace("_", " ") for name in EXCHANGES) + " |",
            "|---|" + "---:|" * len(EXCHANGES)]
    for name, counts in sorted(report["exchanges"].items()):
        out.append(f"| `{name}` | " + " | ".join(str(counts[key]) for key in EXCHANGES) + " |")
    out += ["", "## Kernels", "", "| kernel | registers | spills | stack | shared | threads | warps an SM |",
            "|---|---:|---:|---:|---:|---:|---:|"]
    for name, used in report["kernels"].items():
        out.append(f"| `{name}` | {used['registers']} | {used['spills']} | {used['stack']} | {used['shared']} | "
                   f"{used['threads']} | {used['warps_per_sm']} |")
    return "\n".join(out) + "\n"


def worse(now, before):
    """What got worse, in words."""
    problems = []
    for name, used in now["kernels"].items():
        if used["spills"] or used["stack"]:
            problems.append(f"{name}: {used['spills']} bytes of spills, {used['stack']} of stack")
        old = before["kernels"].get(name)
        if old is None:
            problems.append(f"{name}: not in the report")
        elif used["warps_per_sm"] < old["warps_per_sm"]:
            problems.append(f"{name}: {used['warps_per_sm']} warps an SM, {old['warps_per_sm']} in the report "
                            f"({used['registers']} registers, {old['registers']})")
    for name, counts in now["exchanges"].items():
        for key, count in counts.items():
            old = before["exchanges"].get(name, {}).get(key)
            if count != old:
                problems.append(f"{name}: {key} {count}, {old} in the report")
    for rows, shape in now["launches"].items():
        if shape["per_layer"] > LAYER_KERNELS[rows]:
            problems.append(f"{rows} rows: {shape['per_layer']} kernels a layer, more than {LAYER_KERNELS[rows]}")
        old = before["launches"][rows]
        for key in ("per_layer", "per_step"):
            if shape[key] > old[key]:
                problems.append(f"{rows} rows: {shape[key]} kernels {key}, {old[key]} in the report: {shape['layer']}")
    for name, traffic in now["traffic"].items():
        old = before["traffic"].get(name)
        if old is None:
            problems.append(f"{name}: not in the report")
            continue
        for key, sign in (("bytes", 1), ("wide", -1), ("sectors", -1), ("conflicts", 1)):
            if sign * (traffic[key] - old[key]) > 1e-9:
                problems.append(f"{name}: {key} {traffic[key]}, {old[key]} in the report")
    for step, old in zip(now["steps"], before["steps"]):
        for gpu in GPUS:
            wanted = SHARES.get(step["model"], 0) if step["weights"] == "16 bits" and step["rows"] == 1 else 0
            if step[gpu]["share"] < wanted:
                problems.append(f"{step['model']} at 1 row on {gpu}: {step[gpu]['share']:.0%} of the achievable "
                                f"bandwidth, less than {wanted:.0%}")
            if step[gpu]["predicted_us"] > old[gpu]["predicted_us"]:
                problems.append(f"{step['model']}, {step['weights']}, at {step['rows']} rows on {gpu}: "
                                f"{step[gpu]['predicted_us']} us, "
                                f"{old[gpu]['predicted_us']} in the report")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resources", nargs="+", required=True)
    parser.add_argument("--ptx", nargs="+", required=True)
    parser.add_argument("--launches", required=True)
    parser.add_argument("--traffic", required=True)
    parser.add_argument("--out")
    parser.add_argument("--check")
    arguments = parser.parse_args()
    resources = read_resources(arguments.resources)
    if not resources:
        sys.exit("report.py: no kernel in " + " ".join(arguments.resources))
    exchanges, problems = read_ptx(arguments.ptx)
    if {kernel for kernel, _ in resources} != set(exchanges):
        problems.append("kernels without PTX")
    if problems:
        sys.exit("kernels that begin in a wrong way:\n  " + "\n  ".join(problems))
    report = make(resources, exchanges, read_launches(arguments.launches), read_traffic(arguments.traffic))
    if arguments.out:
        folder = pathlib.Path(arguments.out)
        (folder / "static_report.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "static_report.md").write_text(markdown(report))
    if arguments.check:
        before = json.loads((pathlib.Path(arguments.check) / "static_report.json").read_text())
        problems = worse(report, before)
        if problems:
            sys.exit("worse than tests/gpu/static_report.json (tests/gpu/report.sh writes it anew):\n  "
                     + "\n  ".join(problems))
        print(f"{len(report['kernels'])} kernels, none worse than reported")


if __name__ == "__main__":
    main()

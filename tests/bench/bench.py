#!/usr/bin/env python3
"""Measures the engine alone and a whole cluster on synthetic models of published shapes, beside the machine's limits.

OUT gets table.txt, results.jsonl and charts (*.svg). run.sh builds what this needs and calls it.
"""
import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time

import chart
import cluster
import gguf
import summary

LLAMA_TYPES = {"bf16": None, "int8": "q8_0", "int4": "q4_0"}  # The nearest; None: as gguf.py writes it.
LIMIT_ROUNDS = 5  # A round takes milliseconds: more of them than of what takes seconds.


def numbers(text, most=8192):
    values = [int(part) for part in text.split(",")]
    if not all(1 <= value <= most for value in values):
        raise argparse.ArgumentTypeError(f"{text}: not in 1 .. {most}")
    return values


def positions(text):
    return numbers(text, 10000000)


def names(text):
    return text.split(",")


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def command(arguments, script="tests/bench/run.sh"):
    """What was asked for, without where things lie on this machine."""
    words = [script]
    paths = {"--llama_cpp": "DIR", "--models": None, "--results": None, "--binaries": None}
    given = iter(arguments)
    for argument in given:
        name, has_value, _ = argument.partition("=")
        if name in paths:
            if not has_value:
                next(given, None)
            if paths[name]:
                words += [name, paths[name]]
        else:
            words.append("OUT" if "/" in argument else argument)
    return shlex.join(words)


def machine():
    """What a number depends on beside the code."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    with open("/proc/meminfo") as file:
        memory = int(re.search(r"MemTotal:\s*(\d+)", file.read()).group(1))
    commit = ["?", "?"]
    here = os.path.dirname(os.path.realpath(__file__))
    done = subprocess.run(["git", "-C", here, "log", "-1", "--format=%h %cI"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    if done.returncode == 0:
        commit = done.stdout.split()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit[0],
        "commit_date": commit[1],
        "cpu": model.group(1) if model else "?",
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 20)),
        "kernel": os.uname().release,
        "load_average": round(os.getloadavg()[0], 2),
        "command": command(sys.argv[1:]),
    }


def seconds_to_first_line(command):
    """From no process to the first line of what it prints, which is of its first token."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        line = process.stdout.readline()
        seconds = time.monotonic() - began
        process.stdout.read()
    if not line or process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return seconds


class Bench:

    def __init__(self, options):
        self.options = options
        self.machine = machine()
        self.rows = []
        self.facts = []

    def binary(self, path):
        return os.path.join(self.options.binaries, path)

    def say(self, text):
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def add(self, what, shape, form, case, size, threads, tokens_per_s, **more):
        row = {"what": what, "shape": shape, "format": form, "case": case, "size": size, "threads": threads,
               "tokens_per_s": tokens_per_s, **more}
        self.rows.append(row)
        with open(os.path.join(self.options.out, "results.jsonl"), "a") as file:
            file.write(json.dumps({**self.machine, **row}) + "\n")

    def tell(self, shape, form, what, **facts):
        """A number that is no row of the table."""
        self.facts.append((f"{shape} {form}, {what}", facts))
        with open(os.path.join(self.options.out, "results.jsonl"), "a") as file:
            file.write(json.dumps({**self.machine, "what": what, "shape": shape, "format": form, **facts}) + "\n")

    # ---- models ----

    def made(self, name, make):
        """The path of a file in the models' folder, made once."""
        path = os.path.join(self.options.models, name)
        if not os.path.exists(path):
            self.say(f"making {name}")
            make(path + ".part")
            os.replace(path + ".part", path)
        return path

    def model(self, shape, form):
        base = self.made(f"rwkv7-{shape}-bf16.safetensors",
                         lambda path: run([self.binary("tests/bench/make_model"), shape, path]))
        if form == "bf16":
            return base

        def convert(path):
            whole = path[:-len(".part")] + ".part.safetensors"
            run([self.binary("services/rwkvctl/rwkvctl"), "convert", base, whole, "--dtype", form])
            os.replace(whole, path)

        return self.made(f"rwkv7-{shape}-{form}.safetensors", convert)

    def gguf(self, shape, form):
        base = self.made(f"rwkv7-{shape}-bf16.gguf", lambda path: gguf.write_gguf(self.model(shape, "bf16"), path))
        kind = LLAMA_TYPES[form]
        if kind is None:
            return base
        quantize = os.path.join(self.options.llama_cpp, "llama-quantize")
        if not os.path.exists(quantize):
            return None
        return self.made(f"rwkv7-{shape}-{kind}.gguf", lambda path: run([quantize, base, path, kind]))

    # ---- measures ----

    def limits(self, shape, form, weight_bytes):
        for threads in self.options.threads:
            line = json.loads(run([self.binary("tests/bench/limits"), str(weight_bytes), str(threads),
                                   str(LIMIT_ROUNDS * self.options.repeats)]))
            rate = {key: value * 1e9 / weight_bytes for key, value in line["read_gb_per_s"].items()}
            self.add("limit", shape, form, "decode", 1, threads, rate, read_gb_per_s=line["read_gb_per_s"],
                     weight_bytes=weight_bytes)

    def engine(self, shape, form, model):
        for threads in self.options.threads:
            out = run([self.binary("tests/bench/engine_bench"), model, self.options.device, str(threads),
                       str(self.options.seconds), ",".join(map(str, self.options.batches)),
                       ",".join(map(str, self.options.lengths))])
            for line in map(json.loads, out.splitlines()):
                size = line["batch"] if line["case"] == "decode" else line["length"]
                self.add("engine", shape, form, line["case"], size, threads, line["tokens_per_s"], steps=line["steps"])

    def engine_start(self, shape, form, model):
        """A process that loads the model and computes a token, as llama.cpp's start is."""
        seconds = seconds_to_first_line([self.binary("tests/bench/engine_bench"), model, self.options.device,
                                         str(max(self.options.threads)), "0", "1", "-"])
        self.tell(shape, form, "engine's start", seconds_to_first_token=seconds)

    def positions(self, shape, form, model):
        threads = max(self.options.threads)
        out = run([self.binary("tests/bench/engine_bench"), model, self.options.device, str(threads),
                   str(self.options.seconds), "-", "-", ",".join(map(str, self.options.positions))])
        for line in map(json.loads, out.splitlines()):
            self.add("engine", shape, form, "position", line["position"], threads, line["tokens_per_s"],
                     steps=line["steps"])

    def timelines(self, shape, form, model):
        """A drawn step for the fewest and the most sequences."""
        threads = max(self.options.threads)
        for batch in sorted({min(self.options.batches), max(self.options.batches)}):
            step = json.loads(run([self.binary("tests/bench/step_timeline"), model, self.options.device, str(threads),
                                   str(self.options.seconds), str(batch)]))
            title = f"A decode step: {shape} {form}, sequences: {batch}, threads: {threads}; {step['step_us']:.0f} us"
            with open(os.path.join(self.options.out, f"timeline-{shape}-{form}-{batch}.svg"), "w") as file:
                file.write(chart.timeline(title, step["step_us"], step["ops"]))

    def cluster(self, shape, form, model):
        threads = max(self.options.threads)
        slots = max(self.options.batches + [8])
        duration = f"{self.options.cluster_seconds}s"
        with cluster.Cluster(self.options.binaries, model, os.path.join(self.options.out, "cluster"), threads,
                             slots, max(self.options.lengths + [128]), [f"--max_waiting={slots}"],
                             self.options.device) as running:
            for batch in self.options.batches:
                report = running.load("--streams", str(batch), "--duration", duration, "--prompt-tokens", "8",
                                      "--max-tokens", str(self.options.answer_tokens))
                rate = report["tokens"]["generated_per_second"]
                self.add("cluster", shape, form, "decode", batch, threads, {"best": rate, "median": rate},
                         load=report)
            for length in self.options.lengths:
                report = running.load("--streams", "1", "--duration", duration, "--prompt-tokens", str(length),
                                      "--max-tokens", "1")
                times = report["ttft_seconds"]
                self.add("cluster", shape, form, "prefill", length, threads,
                         {"best": length / times["p50"], "median": length / times["p50"]}, load=report)
            self.overload(shape, form, running, slots)
            most, allowed = running.worker_memory()
            self.tell(shape, form, "memory", bytes=most, allowed_bytes=allowed, of_allowed=most / allowed)
            self.tell(shape, form, "start", seconds_to_first_token=running.seconds_to_first_token())

    def overload(self, shape, form, running, slots):
        """Twice the requests a second that the cluster can answer, by a clock that waits for nobody."""
        warmup = self.options.cluster_seconds / 4
        request = ("--duration", f"{2 * self.options.cluster_seconds + warmup}s", "--warmup", f"{warmup}s",
                   "--prompt-tokens", "8", "--max-tokens", str(self.options.answer_tokens))
        # By their tokens: those that are asked at once end at once, in lumps that would fall into the time or not.
        requests = lambda report: report["tokens"]["generated_per_second"] / self.options.answer_tokens
        always = lambda: requests(running.load("--streams", str(2 * slots), *request))
        with running.asked_for_its_status() as answers:  # In all, because who asks needs a processor, too.
            before = always()
            report = running.load("--rate", f"{2 * before:.6g}", *request)
            peak = (before + always()) / 2  # A machine that slows down meanwhile is not to show as a loss, or gain.
        rate, refusal = requests(report), report["refusal_seconds"]
        self.tell(shape, form, "twice the load", peak_requests_per_s=peak, requests_per_s=rate, of_peak=rate / peak,
                  refusals=refusal["count"], refusal_p50_ms=1e3 * refusal["p50"], refusal_p99_ms=1e3 * refusal["p99"],
                  slowest_status_s=max(answers))

    def beside_a_busy_process(self, shape, form, model):
        """What a step keeps of its speed where another process wants one of the processors for itself."""
        threads, batch = max(self.options.threads), min(self.options.batches)
        alone = summary.find(self.rows, "engine", shape, form, "decode", batch, threads)["tokens_per_s"]["median"]
        processor = max(os.sched_getaffinity(0))
        busy = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, [{processor}])\n"
                                 "while True: pass"])
        try:
            line = json.loads(run([self.binary("tests/bench/engine_bench"), model, self.options.device, str(threads),
                                   str(self.options.seconds), str(batch), "-"]))
        finally:
            busy.kill()
            busy.wait()
        beside = line["tokens_per_s"]["median"]
        self.tell(shape, form, "beside a busy process", threads=threads, tokens_per_s=beside, of_alone=beside / alone)

    def llama_cpp(self, shape, form):
        model = self.gguf(shape, form)
        if model is None:
            self.say(f"llama.cpp: no llama-quantize in {self.options.llama_cpp}, so no {form}")
            return
        bench = os.path.join(self.options.llama_cpp, "llama-bench")
        for threads in self.options.threads:
            out = run([bench, "-m", model, "-t", str(threads), "-p", ",".join(map(str, self.options.lengths)), "-n",
                       str(self.options.answer_tokens), "-r", str(self.options.repeats), "-o", "json"])
            for line in json.loads(out[out.index("["):]):
                samples = line["samples_ts"]
                case, size = ("prefill", line["n_prompt"]) if line["n_prompt"] else ("decode", 1)
                self.add("llama.cpp", shape, form, case, size, threads,
                         {"best": max(samples), "median": statistics.median(samples)},
                         build=line.get("build_commit", ""))
            self.llama_cpp_batches(shape, form, model, threads)
        seconds = seconds_to_first_line([bench, "-m", model, "-t", str(max(self.options.threads)), "-p", "1", "-n", "0",
                                         "-r", "1", "--no-warmup", "-o", "jsonl"])
        self.tell(shape, form, "llama.cpp's start", seconds_to_first_token=seconds)

    def llama_cpp_batches(self, shape, form, model, threads):
        program = os.path.join(self.options.llama_cpp, "llama-batched-bench")
        batches = [batch for batch in self.options.batches if batch > 1]
        if not batches or not os.path.exists(program):
            return
        out = run([program, "-m", model, "-t", str(threads), "-tb", str(threads), "-c", "8192", "-b", "512", "-ub",
                   "512", "-npp", "4", "-ntg", str(self.options.answer_tokens), "-npl", ",".join(map(str, batches))])
        for line in out.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) == 10 and cells[0].isdigit():
                rate = float(cells[7])  # S_TG t/s
                self.add("llama.cpp", shape, form, "decode", int(cells[2]), threads, {"best": rate, "median": rate})

    def run(self):
        for shape in self.options.shapes:
            for form in self.options.formats:
                model = self.model(shape, form)
                self.say(f"measuring {shape} {form}")
                self.limits(shape, form, gguf.weight_bytes(model))
                self.engine(shape, form, model)
                self.engine_start(shape, form, model)
                self.timelines(shape, form, model)
                if self.options.positions:
                    self.positions(shape, form, model)
                self.beside_a_busy_process(shape, form, model)
                if self.options.cluster_seconds > 0:
                    self.cluster(shape, form, model)
                if self.options.llama_cpp:
                    self.llama_cpp(shape, form)
        rows = summary.table(self.rows, self.options)
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
        for what, facts in self.facts:
            text += f"\n{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
        head = "tokens/s on {cpu}, {processors} processors, {date}, commit {commit}\n".format(**self.machine)
        with open(os.path.join(self.options.out, "table.txt"), "w") as file:
            file.write(head + text + "\n")
        print(head + text)
        summary.charts(self.rows, self.options)
        if self.options.results:
            with open(os.path.join(self.options.out, "results.jsonl")) as new, open(self.options.results, "a") as file:
                file.write(new.read())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = len(os.sched_getaffinity(0))
    parser.add_argument("out", metavar="OUT", help="folder of what is measured; what was in it is replaced")
    parser.add_argument("--shapes", type=names, default=["0.1b", "0.4b", "1.5b"], help="of make_model, by commas")
    parser.add_argument("--formats", type=names, default=["bf16", "int8", "int4"], help="of bf16,int8,int4")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32], help="sequences decoded at once")
    parser.add_argument("--lengths", type=numbers, default=[32, 128, 512], help="of prompts, each in one step")
    parser.add_argument("--positions", type=positions, default=[],
                        help="decode of one sequence that has read so many tokens, e.g. 1,1000,10000,100000")
    parser.add_argument("--threads", type=numbers, default=sorted({1, every}))
    parser.add_argument("--device", default="auto", help="of engine and cluster: auto, cpu/avx512, ...")
    parser.add_argument("--seconds", type=float, default=3, help="of each of the engine's cases")
    parser.add_argument("--cluster_seconds", type=float, default=20, help="of each of the cluster's; 0: no cluster")
    parser.add_argument("--answer_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="of limits and llama.cpp's cases; the best is told")
    parser.add_argument("--llama_cpp", metavar="DIR", default="",
                        help="llama-bench, and, where they are, llama-batched-bench and llama-quantize")
    parser.add_argument("--models", metavar="DIR", default=os.path.expanduser("~/.cache/rwkv-serving/bench"),
                        help="where models are made and kept: up to 6 GB a shape")
    parser.add_argument("--results", metavar="FILE", default="", help="append the lines to this one, too")
    parser.add_argument("--binaries", metavar="DIR", required=True, help="what Bazel built")
    options = parser.parse_args()
    unknown = set(options.formats) - set(LLAMA_TYPES)
    if unknown:
        parser.error(f"--formats: {', '.join(sorted(unknown))}")
    if options.llama_cpp and not os.path.exists(os.path.join(options.llama_cpp, "llama-bench")):
        parser.error(f"--llama_cpp: there is no llama-bench in {options.llama_cpp}")
    os.makedirs(options.out, exist_ok=True)
    os.makedirs(options.models, exist_ok=True)
    open(os.path.join(options.out, "results.jsonl"), "w").close()
    try:
        Bench(options).run()
    except RuntimeError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()

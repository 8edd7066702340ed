#!/usr/bin/env python3
"""Measures how fast states are saved and restored, and what that costs those beside it. states.sh builds and calls it.

OUT gets states.txt and states.jsonl: per shape save and restore through a store of its own, beside a copy in memory and
the disk alone in the same run; a long session resumed, beside reading it again; tokens with snapshots beside them and
without.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys

import bench
import cluster


class States:

    def __init__(self, options):
        self.options = options
        self.machine = bench.machine()
        self.machine["command"] = bench.command(sys.argv[1:], "tests/bench/states.sh")
        self.table = []

    def binary(self, path):
        return os.path.join(self.options.binaries, path)

    def add(self, row):
        line = json.dumps({**self.machine, "what": "states", **row})
        for path in filter(None, [os.path.join(self.options.out, "states.jsonl"), self.options.results]):
            with open(path, "a") as file:
                file.write(line + "\n")

    def say(self, text):
        self.table.append(text)
        print(text, flush=True)

    # ---- save and restore ----

    def measure(self, *arguments):
        done = bench.run([self.binary("tests/bench/state_bench"), *arguments])
        return {row["case"]: row for row in map(json.loads, done.splitlines())}

    def transfer(self, shape):
        """A round: save, and restore by a store that has just started, with nothing of it in memory."""
        folder = os.path.join(self.options.out, f"store-{shape}")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        count = str(self.options.count)
        rows = self.measure("copy", shape, count)
        with cluster.Store(self.options.binaries, folder) as address:
            rows.update(self.measure("save", address, shape, count, folder))
            rows["restore, at once"] = self.measure("restore", address, shape, count)["restore"]
        for where, _, names in os.walk(folder):
            for name in names:
                with open(os.path.join(where, name), "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with cluster.Store(self.options.binaries, folder) as address:
            rows.update(self.measure("restore", address, shape, count, folder))
        shutil.rmtree(folder)
        return rows

    def transfers(self):
        self.say("MB/s, median of the states of a round; the median round\n"
                 "shape    bytes       copy  disk write  direct  disk read      save  of slower  of direct"
                 "   restore  of slower  at once   four saves  restores")
        for shape in self.options.shapes:
            rounds = [self.transfer(shape) for _ in range(self.options.rounds)]
            rate = {case: [r[case]["mb_per_s"]["median"] for r in rounds] for case in rounds[0]}
            # Each round against its own limits: what else runs on the machine changes them by the minute.
            ratio = {
                "save": [s / min(c, w) for s, c, w in zip(rate["save"], rate["copy"], rate["disk write"])],
                "save, direct": [s / min(c, w) for s, c, w in
                                 zip(rate["save"], rate["copy"], rate["disk write, direct"])],
                "restore": [r / min(c, d) for r, c, d in zip(rate["restore"], rate["copy"], rate["disk read"])],
            }
            median = {case: statistics.median(values) for case, values in rate.items()}
            of = {case: statistics.median(values) for case, values in ratio.items()}
            size = rounds[0]["save"]["bytes"]
            self.say(f"{shape}  {size:10d}  {median['copy']:8.0f}  {median['disk write']:10.0f}  "
                     f"{median['disk write, direct']:6.0f}  {median['disk read']:9.0f}  {median['save']:8.0f}  "
                     f"{of['save']:9.0%}  {of['save, direct']:9.0%}  {median['restore']:8.0f}  "
                     f"{of['restore']:9.0%}  {median['restore, at once']:7.0f}  {median['save, 4 at once']:11.0f}  "
                     f"{median['restore, 4 at once']:8.0f}")
            self.add({"case": "transfer", "shape": shape, "bytes": size, "mb_per_s": median, "of_slower": of,
                      "rounds": rounds})

    # ---- through the cluster ----

    def model(self, shape):
        path = os.path.join(self.options.models, f"rwkv7-{shape}-bf16.safetensors")
        if not os.path.exists(path):
            os.makedirs(self.options.models, exist_ok=True)
            bench.run([self.binary("tests/bench/make_model"), shape, path + ".part"])
            os.replace(path + ".part", path)
        return path

    def serving(self, slots, *router_flags):
        folder = os.path.join(self.options.out, "cluster")
        shutil.rmtree(folder, ignore_errors=True)
        return cluster.Cluster(self.options.binaries, self.model(self.options.model), folder, self.options.threads,
                               slots, 256, ["--max_prompt_tokens=1000000", *router_flags])

    def resume(self):
        """Seconds to the first token: of all tokens read, and of one more after the worker was started anew."""
        piece = min(20000, self.options.resume_tokens)
        read, resumed = [], []
        with self.serving(4) as serving:
            serving.create_session("long")
            for begin in range(0, self.options.resume_tokens, piece):
                tokens = [1 + (begin + i) % 97 for i in range(min(piece, self.options.resume_tokens - begin))]
                read.append(serving.first_token("long", tokens))
            for _ in range(5):
                serving.restart_worker()
                resumed.append(serving.first_token("long", [1]))
        seconds, again = sum(read), statistics.median(resumed)
        self.say(f"\na session of {self.options.resume_tokens} tokens of {self.options.model}: read in {seconds:.2f} s"
                 f", resumed in {again * 1000:.1f} ms (median of 5, another worker process): 1/{seconds / again:.0f}")
        self.add({"case": "resume", "model": self.options.model, "tokens": self.options.resume_tokens,
                  "read_seconds": seconds, "resume_seconds": sorted(resumed)})

    def beside(self):
        """Time between tokens of streams in sessions, saved so often that some save is always under way, or never."""
        found = {}
        for _ in range(self.options.rounds):
            for name, interval in (("never", 10**9), ("often", self.options.interval)):
                with self.serving(self.options.streams, f"--snapshot_interval_tokens={interval}") as serving:
                    report = serving.load("--streams", str(self.options.streams), "--sessions",
                                          str(self.options.streams), "--turns", "1", "--prompt-tokens", "16",
                                          "--max-tokens", str(self.options.answer_tokens), "--requests",
                                          str(self.options.streams * 2), "--temperature", "0")
                    saved = serving.metric("worker", "rwkv_worker_snapshot_save_seconds_count")
                found.setdefault(name, []).append((report, saved))
        p99 = {name: statistics.median(r["inter_token_seconds"]["p99"] for r, _ in of) for name, of in found.items()}
        p50 = {name: statistics.median(r["inter_token_seconds"]["p50"] for r, _ in of) for name, of in found.items()}
        saves = statistics.median(s for _, s in found["often"])
        self.say(f"\n{self.options.streams} streams of {self.options.model}, ms between tokens, p50 and p99: "
                 f"{p50['never'] * 1000:.2f} {p99['never'] * 1000:.2f} without snapshots, "
                 f"{p50['often'] * 1000:.2f} {p99['often'] * 1000:.2f} with one every {self.options.interval} tokens "
                 f"({saves:.0f} saved): p99 x {p99['often'] / p99['never']:.2f}")
        self.add({"case": "beside", "model": self.options.model, "streams": self.options.streams,
                  "interval_tokens": self.options.interval, "saves": saves, "p50_seconds": p50, "p99_seconds": p99,
                  "ratio_p99": p99["often"] / p99["never"]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--binaries", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--models", default=os.path.expanduser("~/.cache/rwkv-serving/bench"), help="kept models")
    parser.add_argument("--cases", type=bench.names, default=["transfer", "resume", "beside"])
    parser.add_argument("--shapes", type=bench.names, default=["0.1b", "1.5b", "7.2b"], help="of states")
    parser.add_argument("--count", type=int, default=12, help="states of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="0.1b", help="shape of the model of resume and beside")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--resume_tokens", type=int, default=100000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--answer_tokens", type=int, default=128)
    parser.add_argument("--interval", type=int, default=16, help="tokens between two snapshots of a stream")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    states = States(options)
    measures = {"transfer": states.transfers, "resume": states.resume, "beside": states.beside}
    for case in options.cases:
        if case not in measures:
            parser.error(f"--cases: no {case}")
    try:
        for case in options.cases:
            measures[case]()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"states: {error}")
    with open(os.path.join(options.out, "states.txt"), "w") as file:
        file.write("\n".join(states.table) + "\n")


if __name__ == "__main__":
    main()

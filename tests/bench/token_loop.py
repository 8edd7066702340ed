#!/usr/bin/env python3
"""What the cluster adds to the model: time between tokens, and each process's processor time a token.

  bazel build -c opt //services/router //services/worker //services/state_store //services/rwkvctl
  tests/bench/token_loop.py --binaries .bazel/bin [--model FILE] [--stages 1,2] [--streams 1,32,64] [--seconds 3]

A line of JSON for each number of stages and streams. The model is small by default (tests/golden), so that next to
nothing of it is computing: what is left is the loop. Stages have a thread each.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time

import bench
import cluster

SLOTS = 64


class Pipeline(cluster.Cluster):
    """A store, a router and one pipeline of some stages."""

    def __init__(self, binaries, model, folder, stages):
        super().__init__(binaries, model, folder, 1, SLOTS, 128)
        self._stages = stages

    def __enter__(self):
        os.makedirs(self._folder, exist_ok=True)
        try:
            self._store = self._start("state_store", "127.0.0.1:0")
            self.workers, self._addresses = [], []
            for _ in range(self._stages):
                self._addresses.append(self._start("worker", "127.0.0.1:0"))
                self.workers.append(self._processes[-1].pid)
            self.router = self._start("router", "127.0.0.1:0")
            self._wait_until_serving()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _flags(self, name):
        if name == "state_store":
            return [f"--data_dir={self._folder}/state"]
        if name == "worker":
            stage = len(self.workers)
            return [f"--model={self._model}", f"--stage={stage}/{self._stages}", "--threads=1", f"--slots={SLOTS}",
                    f"--state_store={self._store}", f"--name=worker-{stage}"]
        return [f"--workers={','.join(self._addresses)}", f"--state_store={self._store}", f"--max_running={SLOTS}",
                f"--max_waiting={SLOTS}"]

    def router_pid(self):
        return self._processes[-1].pid


def processor_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options, folder, stages):
    with Pipeline(options.binaries, options.model, os.path.join(folder, str(stages)), stages) as running:
        for streams in options.streams:
            request = ("--streams", str(streams), "--prompt-tokens", "8", "--max-tokens", str(options.answer_tokens))
            running.load(*request, "--duration", "0.5s")  # Warm.
            pids = [running.router_pid(), *running.workers]
            before = [processor_seconds(pid) for pid in pids]
            report = running.load(*request, "--duration", f"{options.seconds}s")
            spent = [after - was for after, was in zip(map(processor_seconds, pids), before)]
            tokens = report["tokens"]["generated"]
            yield {
                "stages": stages, "streams": streams, "tokens": tokens, "failed": report["requests"]["failed"],
                "tokens_per_s": round(report["tokens"]["generated_per_second"], 1),
                "inter_token_ms": {key: round(1e3 * report["inter_token_seconds"][key], 4)
                                   for key in ("mean", "p50", "p99")},
                "router_us_a_token": round(1e6 * spent[0] / tokens, 1),
                "worker_us_a_token": [round(1e6 * one / tokens, 1) for one in spent[1:]],
                "load_average": os.getloadavg()[0],
            }


def main():
    here = os.path.dirname(os.path.realpath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", required=True)
    parser.add_argument("--model", default=os.path.join(here, "../golden/rwkv7-bf16.safetensors"))
    parser.add_argument("--stages", type=bench.numbers, default=[1, 2])
    parser.add_argument("--streams", type=bench.numbers, default=[1, 32, 64])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--answer_tokens", type=int, default=256)
    parser.add_argument("--results", help="a file that lines are added to")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="token_loop.")
    try:
        for stages in options.stages:
            for line in measure(options, folder, stages):
                line = {"what": "token loop", **bench.machine(),
                        "command": bench.command(sys.argv[1:], "tests/bench/token_loop.py"), **line,
                        "at": time.strftime("%H:%M:%S")}
                print(json.dumps({key: line[key] for key in list(line)[6:]}), flush=True)
                if options.results:
                    with open(options.results, "a") as file:
                        file.write(json.dumps(line) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

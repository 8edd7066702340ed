#!/usr/bin/env python3
"""What a cluster adds to a step of the engine: the median step of both, in turns of a second in one run.

  bazel build -c opt //services/router //services/worker //services/state_store //services/rwkvctl \\
    //tests/bench:engine_bench
  tests/bench/overhead.py --binaries .bazel/bin --model FILE [--streams 32] [--seconds 60]

A machine whose speed drifts changes both alike: a worker and a process of the engine alone take turns on the same
processors, each stopped (SIGSTOP) while the other runs. A step of the engine that was cut in two is one of many, and
medians do not see it. The router, the state store and the load generator share the processors with the worker. One line
of JSON; overhead is time between tokens over a step of the engine, less one. For steps of milliseconds: tokens of
shorter ones come several at a time.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import bench
import cluster

ANSWER_TOKENS = 400


class Overhead(cluster.Cluster):

    def worker_process(self):
        return self._processes[1]


def take_turns(processes, seconds, turn_seconds):
    """One of them runs at a time; all of them afterwards."""
    until, turn = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until and all(process.poll() is None for process in processes):
            for i, process in enumerate(processes):
                process.send_signal(signal.SIGCONT if i == turn % len(processes) else signal.SIGSTOP)
            turn += 1
            time.sleep(turn_seconds)
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)  # Nothing if it has ended.


def measure(options, folder):
    threads = len(os.sched_getaffinity(0))
    flags = [f"--max_waiting={options.streams}"]
    with Overhead(options.binaries, options.model, folder, threads, options.streams, 128, flags,
                  options.device) as running:
        reports = []
        load = threading.Thread(target=lambda: reports.append(running.load(
            "--streams", str(options.streams), "--duration", f"{options.seconds}s",
            "--warmup", f"{options.seconds / 10}s", "--prompt-tokens", "1",
            "--max-tokens", str(ANSWER_TOKENS), "--temperature", "0")))
        load.start()
        engine = subprocess.Popen([os.path.join(options.binaries, "tests/bench/engine_bench"), options.model,
                                   options.device, str(threads), str(options.seconds), str(options.streams), "-"],
                                  stdout=subprocess.PIPE, text=True)
        take_turns([engine, running.worker_process()], options.seconds, options.turn)
        out, _ = engine.communicate()
        load.join()
    if engine.returncode != 0 or not reports:
        raise RuntimeError(f"the engine ended with {engine.returncode}, the load with {len(reports)} reports")
    step = options.streams / json.loads(out)["tokens_per_s"]["median"]
    between = reports[0]["inter_token_seconds"]["p50"]
    return {"streams": options.streams, "failed": reports[0]["requests"]["failed"], "engine_step_ms": 1e3 * step,
            "inter_token_p50_ms": 1e3 * between, "overhead": between / step - 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", required=True, help="folder of built programs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--turn", type=float, default=1, help="seconds that one of them runs before the other does")
    options = parser.parse_args()
    machine = bench.machine()
    machine["command"] = bench.command(sys.argv[1:], "tests/bench/overhead.py")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({**machine, "what": "overhead", "model": os.path.basename(options.model),
                          **measure(options, folder)}))


if __name__ == "__main__":
    main()

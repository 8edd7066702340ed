#!/usr/bin/env python3
"""Watches the processes of a local cluster under load; soak.sh starts the cluster and calls this.

What grows is a line through the samples behind warm-up and settling (Theil and Sen: the median of all slopes between
two samples, which spikes do not move). In its time under load a process may gain 2 % of its private memory and 4 MiB,
8 descriptors and 2 threads.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time

import bench
import chart

SAMPLES = 720
SETTLING = 1 / 12  # Of the time, behind the warm-up.
GAIN_SHARE, GAIN_BYTES = 0.02, 4 << 20
GAINS = {"descriptors": 8, "threads": 2}
UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text):
    match = re.fullmatch(r"(\d+)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: want a number and s, m or h")
    return int(match.group(1)) * UNITS[match.group(2)]


def cluster_of(folder):
    with open(os.path.join(folder, "cluster.env")) as file:
        return dict(line.strip().split("=", 1) for line in file if "=" in line and not line.startswith("#"))


def sample(pid):
    """Private memory in bytes, descriptors and threads of a process; raises OSError once it is gone."""
    with open(f"/proc/{pid}/status") as file:
        status = file.read()
    number = lambda key: int(re.search(key + r":\s*(\d+)", status).group(1))
    return {"memory": number("RssAnon") * 1024, "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": number("Threads")}


def slope(points):
    """Per second. `points`: [(seconds, value)], some hundred of them at most."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1:]]
    return statistics.median(slopes)


def judge(samples, duration):
    """samples: {process: [(second, sample)]}. What each gained behind the warm-up, and what breaks the law."""
    gains, broken = {}, []
    for process, all_points in samples.items():
        points = [point for point in all_points if point[0] >= duration * SETTLING]
        if len(points) < 3:
            raise ValueError(f"{process}: only {len(points)} samples")
        span = points[-1][0] - points[0][0]
        gains[process] = {}
        for what in ("memory", *GAINS):
            gained = slope([(second, one[what]) for second, one in points]) * span
            first = statistics.median(one[what] for _, one in points[:5])
            allowed = first * GAIN_SHARE + GAIN_BYTES if what == "memory" else GAINS[what]
            gains[process][what] = {"first": first, "last": statistics.median(one[what] for _, one in points[-5:]),
                                    "gained": round(gained, 1)}
            if gained > allowed:
                broken.append(f"{process}: {what} {first:.0f} + {gained:.0f} in {span:.0f} s, at most {allowed:.0f}")
    return gains, broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--duration", type=seconds, required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--warm_up", type=int, required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--results", required=True)
    options = parser.parse_args()
    env = cluster_of(os.path.join(options.out, "cluster"))
    pids = {key[:-len(".pid")]: int(value) for key, value in env.items() if key.endswith(".pid")}
    routers = ",".join(env[name + ".grpc"] for name in sorted(pids) if name.startswith("router"))
    load = [os.path.join(options.out, "cluster/bin/rwkvctl"), "--router", routers, "load", "--prompt-tokens", "16..128",
            "--max-tokens", "16..128", "--retry", "--deadline", "5m", "--json"]
    if options.rate is None:
        done = subprocess.run([*load, "--streams", "4", "--duration", "10s"], stdout=subprocess.PIPE, check=True)
        options.rate = max(0.1, round(json.loads(done.stdout)["requests"]["per_second"] / 2, 2))
    # Pools, caches and memtables fill with what is done, not with time.
    subprocess.run([*load, "--streams", "4", "--sessions", str(options.sessions), "--requests", str(options.warm_up)],
                   stdout=subprocess.DEVNULL, check=True)
    line = {**bench.machine(), "command": f"tests/bench/soak.sh OUT --duration {options.duration}s --rate "
            f"{options.rate:g} --sessions {options.sessions} --warm-up {options.warm_up} -- {options.cluster}",
            "what": "soak"}
    began = time.monotonic()
    running = subprocess.Popen([*load, "--rate", str(options.rate), "--sessions", str(options.sessions), "--duration",
                                f"{options.duration}s", "--out", os.path.join(options.out, "load.json")],
                               stdout=subprocess.DEVNULL)
    samples, broken = {name: [] for name in sorted(pids)}, []
    with open(os.path.join(options.out, "samples.jsonl"), "w") as file:
        while running.poll() is None and not broken and time.monotonic() - began < options.duration:
            second = round(time.monotonic() - began, 1)
            for name in samples:
                try:
                    samples[name].append((second, sample(pids[name])))
                except OSError:
                    broken.append(f"{name} died")
                    continue
                file.write(json.dumps({"second": second, "process": name, **samples[name][-1][1]}) + "\n")
            file.flush()
            time.sleep(max(0.2, options.duration / SAMPLES))
    if broken:
        running.terminate()
    running.wait()
    if running.returncode != 0:
        broken.append(f"rwkvctl load ended with {running.returncode}")
    gains = {}
    if not broken:
        gains, broken = judge(samples, options.duration)
        with open(os.path.join(options.out, "load.json")) as file:
            report = json.load(file)
        line["requests"] = report["requests"]
        if report["requests"]["failed"]:
            broken.append(f"{report['requests']['failed']} requests failed")
    with open(os.path.join(options.out, "soak.svg"), "w") as file:
        file.write(chart.over_time(
            f"Private memory, {options.rate:g} requests a second", "minutes", "MiB",
            {name: [(second / 60, one["memory"] / (1 << 20)) for second, one in points]
             for name, points in samples.items()}))
    line.update(seconds=options.duration, rate=options.rate, warm_up_requests=options.warm_up,
                processes=gains, broken=broken)
    for path in (os.path.join(options.out, "result.json"), options.results):
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    for name, gained in gains.items():
        memory = gained["memory"]
        print(f"{name:15} {memory['first'] / (1 << 20):8.1f} MiB, gained {memory['gained'] / (1 << 20):+7.2f}; "
              f"descriptors {gained['descriptors']['first']:.0f} {gained['descriptors']['gained']:+.0f}; "
              f"threads {gained['threads']['first']:.0f} {gained['threads']['gained']:+.0f}")
    for what in broken:
        print(f"BROKEN: {what}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()

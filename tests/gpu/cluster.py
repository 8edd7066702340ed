#!/usr/bin/env python3
"""Whole clusters on this machine: state store, workers, router, and what they say.

cluster.py BIN DEVICE MODEL FOLDER TOKENS      BIN: where services/ lies; TOKENS: how many are drawn

A cluster of one worker says what one of two says, a second time the same, and after kill -9 of either worker in the
middle of a turn the turn goes on with the same tokens: the router must have counted a turn that it took up again.
Prints "SAYS: ..." and ends with 0 if that is so. Two workers on cuda:0 have cuda:1 for the second, if there is one.

cluster.py load BIN DEVICE MODEL FOLDER STREAMS TOKENS     a line of JSON: what one worker serves
"""
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

START_SECONDS = 120
TURN_SECONDS = 120
LOAD_SECONDS = 110
STOP_SECONDS = 20
ANSWER_SECONDS = 20  # Of a status, or metrics.
PROMPT = [(i * i + 7 * i + 1) % 97 + 1 for i in range(12)]


class Cluster:

    def __init__(self, binaries, device, model, folder, workers, slots=8):
        self._binaries, self._folder = binaries, pathlib.Path(folder)
        emulated = device.startswith("cuda/emulated")
        self._worker_program = "services/worker/testing/emulated_worker" if emulated else "services/worker/worker"
        self._flags = [f"--model={model}", f"--slots={slots}", "--metrics_listen=127.0.0.1:0"]
        self._devices = devices_for(device, workers)
        self._flags += ["--max_batch_tokens=8"] if emulated else []
        self._count, self._slots, self._processes = workers, slots, {}

    def __enter__(self):
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            store = self._start("state_store", "services/state_store/state_store", [f"--data_dir={self._folder}/state"])
            self._workers = {}
            for stage in range(self._count):
                self._workers[f"worker-{stage}"] = [
                    f"--stage={stage}/{self._count}", f"--device={self._devices[stage]}", f"--state_store={store}",
                    *self._flags]
            self._addresses = {name: self._start(name, self._worker_program, flags)
                               for name, flags in self._workers.items()}
            self.router = self._start("router", "services/router/router", [
                f"--workers={','.join(self._addresses.values())}", f"--state_store={store}",
                f"--max_running={self._slots}"])
            self.wait_until_serving()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(list(self._processes.values())):
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill_and_restart(self, name):
        self._processes[name].kill()
        self._processes[name].wait()
        self._start(name, self._worker_program, self._workers[name], self._addresses[name])

    def links(self):
        """How rows go between the workers: "nccl", "grpc", or nothing."""
        text = "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("worker-*.log")))
        return ", ".join(sorted(set(re.findall(r"link_opened.*? rows=(\w+)", text))))

    def recovered_turns(self):
        """How many turns the router has taken up again after a pipeline was lost."""
        url = f"http://{self._ports('router')['metrics']}/metrics"
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with directly.open(url, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
        found = re.search(r"^rwkv_router_recovered_turns_total(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.MULTILINE)
        return float(found.group(1)) if found else 0

    def control(self, *arguments):
        return [f"{self._binaries}/services/rwkvctl/rwkvctl", *arguments, "--router", self.router]

    def generate(self, count, disturb=lambda tokens: None):
        """Token ids; disturb(how many there are) after each."""
        command = self.control("generate", "--json", "--ignore-eos", "--temperature", "0", "--max-tokens", str(count),
                               "--tokens", ",".join(map(str, PROMPT)))
        tokens, said = [], []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                said.append(line)
                if not line.startswith("{"):
                    continue
                answer = json.loads(line)
                if "id" in answer:
                    tokens.append(answer["id"])
                    disturb(len(tokens))
            if process.wait(TURN_SECONDS) != 0:
                raise RuntimeError(f"generate: {''.join(said[-5:])}{self._ends_of_logs()}")
        return tokens

    def wait_until_serving(self):
        limit = time.monotonic() + START_SECONDS
        while True:
            state = "no answer"
            try:
                done = subprocess.run(self.control("status", "--json"), capture_output=True, text=True,
                                      timeout=ANSWER_SECONDS)
                if done.returncode == 0:
                    state = json.loads(done.stdout)["pipeline_state"]
            except subprocess.TimeoutExpired:
                pass
            if state == "serving":
                return
            gone = [name for name, process in self._processes.items() if process.poll() is not None]
            if time.monotonic() > limit or gone:
                raise RuntimeError(f"the cluster does not serve: {state}; ended: {gone}{self._ends_of_logs()}")
            time.sleep(0.05)

    def _start(self, name, program, flags, listen="127.0.0.1:0"):
        """The address where it listens then."""
        ports = self._folder / f"{name}.ports"
        ports.unlink(missing_ok=True)
        with open(self._folder / f"{name}.log", "a") as log:
            self._processes[name] = subprocess.Popen(
                [f"{self._binaries}/{program}", f"--port_file={ports}", f"--listen={listen}", *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        limit = time.monotonic() + START_SECONDS
        while not (ports.exists() and ports.stat().st_size):
            if self._processes[name].poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{name} does not listen{self._ends_of_logs()}")
            time.sleep(0.05)
        return self._ports(name)["grpc"]

    def _ports(self, name):
        return dict(line.split("=", 1) for line in (self._folder / f"{name}.ports").read_text().splitlines())

    def _ends_of_logs(self):
        return "".join(f"\n{path.name}: ..." + path.read_text(errors="replace")[-800:]
                       for path in sorted(self._folder.glob("*.log")))


def devices_for(device, count):
    """A device for each worker: GPUs one after the other from cuda:0 on, where there are as many."""
    if device != "cuda:0" or count == 1:
        return [device] * count
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ANSWER_SECONDS)
    gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [f"cuda:{stage}" for stage in range(count)] if gpus >= count else [device] * count


def tokens(binaries, device, model, folder, count):
    with Cluster(binaries, device, model, f"{folder}/one", 1) as cluster:
        expected = cluster.generate(count)
    if len(expected) != count:
        sys.exit(f"one worker drew {len(expected)} tokens, not {count}")
    with Cluster(binaries, device, model, f"{folder}/two", 2) as cluster:
        wrong = [] if cluster.generate(count) == expected else ["two workers say something else than one"]
        for name, at in (("worker-1", count // 2), ("worker-0", count // 3)):
            disturb = lambda have, name=name, at=at: cluster.kill_and_restart(name) if have == at else None
            before = cluster.recovered_turns()
            if cluster.generate(count, disturb) != expected:
                wrong.append(f"after kill -9 of {name} the turn says something else")
            if cluster.recovered_turns() <= before:
                wrong.append(f"the turn was over before {name} was killed")
            cluster.wait_until_serving()
        links = cluster.links()
    if wrong:
        sys.exit("; ".join(wrong))
    print(f"SAYS: {count} tokens, the same four times; rows between workers by {links}")


def load(binaries, device, model, folder, streams, count):
    with Cluster(binaries, device, model, folder, 1, slots=streams) as cluster:
        command = cluster.control("load", "--json", "--streams", str(streams), "--requests", str(2 * streams),
                                  "--prompt-tokens", "16", "--max-tokens", str(count))
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS)
    if done.returncode != 0:
        sys.exit(f"load: {done.stderr}")
    report = json.loads(done.stdout)
    if report["requests"]["completed"] != 2 * streams:
        sys.exit(f"load: {report['requests']}")
    print(json.dumps({"case": "serving", "streams": streams, "ttft_seconds": report["ttft_seconds"],
                      "tokens_per_s": {"best": report["tokens"]["generated_per_second"]}}))


def main():
    arguments = sys.argv[1:]
    if len(arguments) == 7 and arguments[0] == "load":
        load(*arguments[1:5], int(arguments[5]), int(arguments[6]))
    elif len(arguments) == 5:
        tokens(*arguments[:4], int(arguments[4]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()

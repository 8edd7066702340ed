"""A cluster of one stage on this machine, for as long as a `with` lasts."""
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request

START_SECONDS = 300  # A large model on a slow disk.
STOP_SECONDS = 60


class Cluster:

    def __init__(self, binaries, model, folder, threads, slots, max_batch_tokens, router_flags=(), device="auto"):
        self._binaries, self._folder, self._processes = binaries, folder, []
        self._router_flags = router_flags
        self._model, self._device, self._threads = model, device, threads
        self._slots, self._max_batch_tokens = slots, max_batch_tokens

    def __enter__(self):
        os.makedirs(self._folder, exist_ok=True)
        try:
            self._store = self._start("state_store", "127.0.0.1:0")
            self._worker = self._start("worker", "127.0.0.1:0")
            self.router = self._start("router", "127.0.0.1:0")
            self._wait_until_serving()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def _stop(self):
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def seconds_to_first_token(self):
        """From no process at all: all three are started at once, where the last ones listened, as by a supervisor."""
        self._stop()
        began = time.monotonic()
        for name, address in (("state_store", self._store), ("worker", self._worker), ("router", self.router)):
            self._launch(name, address)
        self._wait_until_serving()
        self.load("--streams", "1", "--requests", "1", "--prompt-tokens", "1", "--max-tokens", "1")
        return time.monotonic() - began

    def worker_memory(self):
        """The most that the worker has had in memory, and what it may have had, in bytes: its file, its states and
        64 MiB, and a tenth of that."""
        with open(f"/proc/{self._processes[1].pid}/status") as file:
            most = int(re.search(r"VmHWM:\s*(\d+) kB", file.read()).group(1)) * 1024
        with open(f"{self._folder}/worker.log", errors="replace") as file:
            states = int(re.search(r" state_bytes=(\d+)", file.read()).group(1))
        return most, int((os.path.getsize(self._model) + states + (64 << 20)) * 1.1)

    def load(self, *arguments):
        """The report of `rwkvctl load`."""
        command = [f"{self._binaries}/services/rwkvctl/rwkvctl", "load", "--router", self.router, "--json", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{self._ends_of_logs()}")
        return json.loads(done.stdout)

    def _flags(self, name):
        if name == "state_store":
            return [f"--data_dir={self._folder}/state"]
        if name == "worker":
            return [f"--model={self._model}", "--stage=0/1", f"--device={self._device}", f"--threads={self._threads}",
                    f"--slots={self._slots}", f"--max_batch_tokens={self._max_batch_tokens}",
                    f"--state_store={self._store}", "--metrics_listen=127.0.0.1:0"]
        # What is measured is read each time, also where requests are alike.
        return [f"--workers={self._worker}", f"--state_store={self._store}", f"--max_running={self._slots}",
                "--prefix_cache=false", *self._router_flags]

    @contextlib.contextmanager
    def asked_for_its_status(self):
        """Meanwhile `rwkvctl status` is called again and again; the seconds of each call, at least one."""
        answers, over = [], threading.Event()
        command = [f"{self._binaries}/services/rwkvctl/rwkvctl", "status", "--router", self.router, "--json"]

        def ask():
            while not answers or not over.wait(0.2):
                began = time.monotonic()
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                answers.append(time.monotonic() - began if done.returncode == 0 else float("inf"))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield answers
        finally:
            over.set()
            thread.join()

    def restart_worker(self):
        """Another process on the same port, which holds no state."""
        worker = self._processes[1]
        worker.send_signal(signal.SIGTERM)
        worker.wait(STOP_SECONDS)
        self._start("worker", self._worker)
        self._processes[1] = self._processes.pop()
        self._wait_until_serving()

    def metric(self, process, name):
        """The sum of a metric of "worker", "router" or "state_store"."""
        with open(f"{self._folder}/{process}.ports") as file:
            address = dict(line.strip().split("=", 1) for line in file)["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[ {]", line))

    def first_token(self, session, tokens):
        """Seconds until a turn with this input has its first token, as a program that is started for it sees them."""
        began = time.monotonic()
        command = [f"{self._binaries}/services/rwkvctl/rwkvctl", "generate", "--router", self.router, "--json",
                   "--session", session, "--max-tokens", "1", "--ignore-eos", "--temperature", "0",
                   "--tokens", ",".join(map(str, tokens))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"generate: {done.stderr}{self._ends_of_logs()}")
        return time.monotonic() - began

    def create_session(self, name):
        subprocess.run([f"{self._binaries}/services/rwkvctl/rwkvctl", "sessions", "create", name, "--router",
                        self.router], check=True, stdout=subprocess.DEVNULL)

    def _start(self, name, listen):
        """The address where it listens then."""
        process, ports = self._launch(name, listen), f"{self._folder}/{name}.ports"
        limit = time.monotonic() + START_SECONDS
        while not (os.path.exists(ports) and os.path.getsize(ports)):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{name} does not listen{self._ends_of_logs()}")
            time.sleep(0.02)
        with open(ports) as file:
            return dict(line.strip().split("=", 1) for line in file)["grpc"]

    def _launch(self, name, listen):
        ports = f"{self._folder}/{name}.ports"
        if os.path.exists(ports):
            os.remove(ports)
        with open(f"{self._folder}/{name}.log", "w") as log:
            process = subprocess.Popen([f"{self._binaries}/services/{name}/{name}", f"--port_file={ports}",
                                        f"--listen={listen}", *self._flags(name)],
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def _wait_until_serving(self):
        command = [f"{self._binaries}/services/rwkvctl/rwkvctl", "status", "--router", self.router, "--json", "--wait",
                   str(START_SECONDS)]
        waiting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while True:
            try:
                _, said = waiting.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if any(process.poll() is not None for process in self._processes):
                    waiting.kill()
        if waiting.returncode != 0:
            raise RuntimeError(f"the cluster does not serve: {said}{self._ends_of_logs()}")

    def _ends_of_logs(self):
        ends = []
        for name in ("state_store", "worker", "router"):
            path = f"{self._folder}/{name}.log"
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    ends.append(f"\n{name}: ..." + file.read()[-1500:])
        return "".join(ends)


class Store(Cluster):
    """A state store alone; `with` gives its address."""

    def __init__(self, binaries, folder):
        super().__init__(binaries, "", folder, 1, 1, 1)

    def __enter__(self):
        try:
            return self._start("state_store", "127.0.0.1:0")
        except BaseException:
            self.__exit__()
            raise

"""A cluster of one stage on this machine, for as long as a `with` lasts."""
import json
import os
import re
import signal
import subprocess
import time

START_SECONDS = 300  # A large model on a slow disk.
STOP_SECONDS = 60


class Cluster:

    def __init__(self, binaries, model, folder, threads, slots, max_batch_tokens):
        self._binaries, self._folder, self._processes = binaries, folder, []
        self._model, self._threads = model, threads
        self._slots, self._max_batch_tokens = slots, max_batch_tokens

    def __enter__(self):
        began = time.monotonic()
        os.makedirs(self._folder, exist_ok=True)
        try:
            store = self._start("state_store", f"--data_dir={self._folder}/state")
            worker = self._start("worker", f"--model={self._model}", "--stage=0/1", f"--threads={self._threads}",
                                 f"--slots={self._slots}", f"--max_batch_tokens={self._max_batch_tokens}")
            self.router = self._start("router", f"--workers={worker}", f"--state_store={store}",
                                      f"--max_running={self._slots}")
            self._wait_until_serving()
            self.load("--streams", "1", "--requests", "1", "--prompt-tokens", "1", "--max-tokens", "1")
            self.seconds_to_first_token = time.monotonic() - began  # From no process at all.
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

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

    def _start(self, name, *flags):
        ports, log = f"{self._folder}/{name}.ports", open(f"{self._folder}/{name}.log", "w")
        if os.path.exists(ports):
            os.remove(ports)
        process = subprocess.Popen([f"{self._binaries}/services/{name}/{name}", f"--port_file={ports}", *flags],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self._processes.append(process)
        limit = time.monotonic() + START_SECONDS
        while not (os.path.exists(ports) and os.path.getsize(ports)):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{name} does not listen{self._ends_of_logs()}")
            time.sleep(0.02)
        with open(ports) as file:
            return dict(line.strip().split("=", 1) for line in file)["grpc"]

    def _wait_until_serving(self):
        limit = time.monotonic() + START_SECONDS
        command = [f"{self._binaries}/services/rwkvctl/rwkvctl", "status", "--router", self.router, "--json"]
        while True:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            state = json.loads(done.stdout)["pipeline_state"] if done.returncode == 0 else "no answer"
            if state == "serving":
                return
            if time.monotonic() > limit or any(process.poll() is not None for process in self._processes):
                raise RuntimeError(f"the cluster does not serve: {state}{self._ends_of_logs()}")
            time.sleep(0.05)

    def _ends_of_logs(self):
        ends = []
        for name in ("state_store", "worker", "router"):
            path = f"{self._folder}/{name}.log"
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    ends.append(f"\n{name}: ..." + file.read()[-1500:])
        return "".join(ends)

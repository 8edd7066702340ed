"""A Kubernetes control plane of one machine for tests: etcd, kube-apiserver, kube-controller-manager, kube-scheduler.

build.sh makes the programs. They live in namespaces of this process's own (isolation.py), so ports are fixed.
"""
import contextlib
import http.client
import json
import os
import ssl
import subprocess
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 120  # Seconds, of every wait: a busy machine is slow.
TOKEN = "of-a-test"
ETCD, PORT = "http://127.0.0.1:2379", 6443
CLUSTER_IPS = "10.96.0.0/24"
CONTROLLERS = ["deployment", "replicaset", "statefulset", "endpoint", "disruption", "persistentvolume-binder",
               "serviceaccount", "namespace", "garbagecollector"]


def find_programs():
    """The folder that build.sh fills, or None."""
    found = subprocess.run([f"{HERE}/build.sh", "--find"], capture_output=True, text=True, timeout=60)
    return found.stdout.strip() if found.returncode == 0 else None


def await_true(what, condition, patience=PATIENCE):
    """Until `condition` gives something true, which it returns; else it raises, with what it gave last."""
    end = time.monotonic() + patience
    while True:
        last = condition()
        if last:
            return last
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {patience} s; last: {last!r}")
        time.sleep(0.1)


class ApiError(Exception):
    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """Calls to the API server. Any thread may use it; each has a connection of its own."""

    def __init__(self):
        self._local = threading.local()
        # Certificates are made by the server at its start, and nobody else is in this network.
        self._tls = ssl._create_unverified_context()

    def connect(self, timeout=30):
        return http.client.HTTPSConnection("127.0.0.1", PORT, context=self._tls, timeout=timeout)

    def call(self, method, path, body=None, content_type="application/json"):
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body)
        for last in (False, True):
            if getattr(self._local, "connection", None) is None:
                self._local.connection = self.connect()
            try:
                self._local.connection.request(method, path, data, headers)
                response = self._local.connection.getresponse()
                text = response.read()
                break
            except (OSError, http.client.HTTPException):
                self._local.connection.close()
                self._local.connection = None
                if last:
                    raise
        answer = json.loads(text) if text.startswith(b"{") else text.decode()
        if response.status >= 300:
            message = answer.get("message", answer) if isinstance(answer, dict) else answer
            raise ApiError(response.status, message)
        return answer

    def get(self, path):
        return self.call("GET", path)

    def post(self, path, body):
        return self.call("POST", path, body)

    def find(self, path):
        """get(), or None if it is not there."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            return None


class Watch:
    """What there is of a kind, kept up to date by a thread, which calls `changed()` after each change."""

    def __init__(self, api, path, changed):
        self._api, self._path, self._changed = api, path, changed
        self._lock = threading.Lock()
        self._objects = {}
        self._stopped = False

    def start(self):
        threading.Thread(target=self._run, daemon=True).start()

    def objects(self):
        with self._lock:
            return list(self._objects.values())

    def stop(self):
        self._stopped = True

    def _run(self):
        while not self._stopped:
            try:
                self._list_and_watch()
            except (OSError, ValueError, http.client.HTTPException, ApiError):
                time.sleep(0.2)  # The server is not there yet, or no more.

    def _list_and_watch(self):
        listed = self._api.get(self._path)
        with self._lock:
            self._objects = {item["metadata"]["uid"]: item for item in listed["items"]}
        self._changed()
        with contextlib.closing(self._api.connect(timeout=90)) as connection:
            self._follow(connection, listed["metadata"]["resourceVersion"])

    def _follow(self, connection, version):
        mark = "&" if "?" in self._path else "?"
        connection.request("GET", f"{self._path}{mark}watch=1&timeoutSeconds=60&resourceVersion={version}",
                           headers={"Authorization": f"Bearer {TOKEN}"})
        with connection.getresponse() as events:
            while not self._stopped:
                line = events.readline()
                if not line:
                    return
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                uid = event["object"]["metadata"]["uid"]
                with self._lock:
                    if event["type"] == "DELETED":
                        self._objects.pop(uid, None)
                    else:
                        self._objects[uid] = event["object"]
                self._changed()


class ControlPlane:
    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.api = Api()
        self._processes = {}
        os.makedirs(folder, exist_ok=True)
        self._write_files()
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def _write_files(self):
        with open(f"{self.folder}/tokens.csv", "w", encoding="utf-8") as file:
            file.write(f"{TOKEN},test,test,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", f"{self.folder}/accounts.key", "2048"], check=True, timeout=60,
                       capture_output=True)
        with open(f"{self.folder}/kubeconfig", "w", encoding="utf-8") as file:
            json.dump({"apiVersion": "v1", "kind": "Config", "current-context": "test",
                       "clusters": [{"name": "test", "cluster": {"server": f"https://127.0.0.1:{PORT}",
                                                                 "insecure-skip-tls-verify": True}}],
                       "users": [{"name": "test", "user": {"token": TOKEN}}],
                       "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}, file)

    def _start_all(self):
        key, config = f"{self.folder}/accounts.key", f"--kubeconfig={self.folder}/kubeconfig"
        self._start("etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", f"--listen-client-urls={ETCD}",
                    f"--advertise-client-urls={ETCD}", "--listen-peer-urls=http://127.0.0.1:2380")
        # No kubelet of Kubernetes' own, so nobody takes the taint from a new node.
        self._start("kube-apiserver", f"--etcd-servers={ETCD}", "--bind-address=127.0.0.1",
                    "--advertise-address=127.0.0.1", f"--secure-port={PORT}", f"--cert-dir={self.folder}/certificates",
                    f"--service-cluster-ip-range={CLUSTER_IPS}", f"--token-auth-file={self.folder}/tokens.csv",
                    "--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc",
                    f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
                    "--endpoint-reconciler-type=none", "--disable-admission-plugins=TaintNodesByCondition")
        await_true("the API server is ready", self._is_ready)
        self._start("kube-controller-manager", config, "--bind-address=127.0.0.1", "--port=0", "--leader-elect=false",
                    f"--controllers={','.join(CONTROLLERS)}")
        self._start("kube-scheduler", config, "--bind-address=127.0.0.1", "--port=0", "--leader-elect=false")

    def _start(self, program, *arguments):
        with open(f"{self.folder}/{program}.log", "wb") as log:
            self._processes[program] = subprocess.Popen([f"{self.programs}/{program}", *arguments], stdout=log,
                                                        stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder)

    def _is_ready(self):
        self.check_alive()
        try:
            return self.api.get("/readyz") == "ok"
        except (OSError, http.client.HTTPException, ApiError):
            return False

    def check_alive(self):
        for program, process in self._processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{program} ended with {process.returncode}: {self.log_tail(program)}")

    def log_tail(self, program):
        with open(f"{self.folder}/{program}.log", encoding="utf-8", errors="replace") as file:
            return file.read()[-2000:]

    def kubectl(self, *arguments, stdin=None, check=True, timeout=PATIENCE):
        """What it writes; with check=False the whole result."""
        result = subprocess.run([f"{self.programs}/kubectl", f"--kubeconfig={self.folder}/kubeconfig",
                                 f"--cache-dir={self.folder}/kubectl", *arguments],
                                input=stdin, capture_output=True, text=True, timeout=timeout)
        if not check:
            return result
        if result.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {result.stdout[-1000:]} {result.stderr[-2000:]}")
        return result.stdout

    def apply(self, documents):
        return self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List",
                                                                  "items": documents}))

    def stop(self):
        for program in ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            process = self._processes.get(program)
            if process is not None:
                process.kill()
                process.wait()

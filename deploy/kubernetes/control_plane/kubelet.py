"""A kubelet that runs processes instead of containers: what the control plane binds to its node, it starts.

A pod has a network of its own, a root folder with its volumes and the programs of `binaries` in /usr/bin, read-only as
the manifest says, and user and groups. Probes, restarts, preStop, SIGTERM, grace and SIGKILL are as kubelet does them.
"""
import base64
import http.client
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import grpc_health
import manifests
import network as net
from control_plane import ApiError, Watch

NODE = "machine"
GRACE = 30  # Seconds, where a pod does not say.
_FIRST_BACKOFF, _LAST_BACKOFF = 1, 10  # Seconds, between restarts. Kubernetes takes 10 and 300.


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def mount(source, target, read_only=True, recursive=False):
    net.run("mount", "--rbind" if recursive else "--bind", source, target)
    if read_only and not recursive:
        net.run("mount", "-o", "remount,bind,ro", target)


class Kubelet:
    """Runs the pods of `namespace` and leaves others alone. `binaries`: paths by the names that commands have."""

    def __init__(self, api, network, folder, binaries, namespace):
        self.api, self.network, self.folder, self.namespace = api, network, folder, namespace
        self.binaries = f"{folder}/programs"
        os.makedirs(self.binaries)
        for name, path in binaries.items():
            shutil.copy(path, f"{self.binaries}/{name}")
        # What was not as it should be: (pod, what). Ends after SIGTERM within the grace are not among it.
        self.complaints = []
        self.threads = {}
        resources = {"cpu": "256", "memory": "1024Gi", "pods": "110", "nvidia.com/gpu": "16"}
        api.post("/api/v1/nodes", {
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE, "topology.kubernetes.io/zone": "a"}},
            "status": {"capacity": resources, "allocatable": resources,
                       "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now(),
                                       "lastHeartbeatTime": now(), "reason": "Test", "message": ""}]}})
        self._watch = Watch(api, f"/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}", self._changed)
        self._watch.start()

    def _changed(self):
        pods = self._watch.objects()
        # Those of which the server knows nothing any more: deleted by force.
        for uid in set(self.threads) - {pod["metadata"]["uid"] for pod in pods}:
            self.threads[uid].delete(0)
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if uid not in self.threads and pod["metadata"]["namespace"] == self.namespace:
                self.threads[uid] = PodThread(self, pod)
                self.threads[uid].start()
            elif uid in self.threads and "deletionTimestamp" in pod["metadata"]:
                self.threads[uid].delete(pod["metadata"]["deletionGracePeriodSeconds"])

    def stop(self):
        """Kills what is left."""
        self._watch.stop()
        for thread in list(self.threads.values()):
            thread.delete(0)
        for thread in list(self.threads.values()):
            thread.join(30)

    def log(self, pod):
        with open(f"{self.folder}/{pod}.log", encoding="utf-8", errors="replace") as file:
            return file.read()


class PodThread(threading.Thread):
    def __init__(self, kubelet, pod):
        super().__init__(daemon=True)
        self._kubelet, self._pod = kubelet, pod
        self._container = manifests.original_container(pod)
        self.name = pod["metadata"]["name"]
        self._path = f'/api/v1/namespaces/{pod["metadata"]["namespace"]}/pods/{self.name}'
        self._root = f'{kubelet.folder}/{pod["metadata"]["uid"]}'
        self._deleted = threading.Event()
        self._grace = None
        self._status = {"phase": "Pending", "ready": False, "started": False, "restarts": 0}
        self._reported = None
        self._start_time = now()
        self._process = None

    def delete(self, grace):
        if self._grace is None or grace < self._grace:
            self._grace = grace
        self._deleted.set()

    # ---- Life. ------------------------------------------------------------------------------------------------------
    def run(self):
        try:
            if self._set_up():
                self._run_container()
            self._tear_down()
        except Exception as error:  # pylint: disable=broad-except
            self._complain(f"the kubelet failed: {error!r}")
            if self._process is not None:
                self._process.kill()
        while not self._deleted.wait(1):
            pass
        self._confirm_deletion()

    def _complain(self, what):
        self._kubelet.complaints.append((self.name, what))

    def _set_up(self):
        """False: deleted meanwhile. What is missing, a Secret say, is waited for."""
        self._namespace, self._address = self._kubelet.network.add_pod()
        self._report()
        said = False
        while not self._deleted.is_set():
            try:
                self._make_root()
                return True
            except ApiError as error:
                if error.status != 404:
                    raise
                if not said:
                    print(f"kubelet: {self.name} waits: {error}", flush=True)
                said = True
                self._deleted.wait(1)
        return False

    def _run_container(self):
        backoff = _FIRST_BACKOFF
        while not self._deleted.is_set():
            self._start()
            self._probe_until_end()
            if self._deleted.is_set():
                break
            self._process.wait()
            self._complain(f"ended by itself with {self._process.returncode}")
            self._status.update(ready=False, started=False, restarts=self._status["restarts"] + 1)
            self._report()
            if self._pod["spec"].get("restartPolicy", "Always") != "Always":
                return
            self._deleted.wait(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF)
        if self._process is not None:
            self._end(self._container.get("lifecycle", {}).get("preStop"))

    def _probe_until_end(self):
        """Until the process has ended, was told to restart, or the pod is deleted."""
        probes = {kind: Probe(self._container[kind], self._address)
                  for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in self._container}
        startup, live, ready = (probes.get(k) for k in ("startupProbe", "livenessProbe", "readinessProbe"))
        self._status.update(phase="Running", ready=False, started=False)
        self._report()
        while self._process.poll() is None and not self._deleted.wait(0.1):
            if startup is not None and startup.result is not True:
                if startup.tick() is False:
                    return self._restart("the startup probe failed")
                continue
            self._status["started"] = True
            if live is not None and live.tick() is False:
                return self._restart("the liveness probe failed")
            self._status["ready"] = ready is None or bool(ready.tick())
            self._report()
        return None

    def _restart(self, why):
        self._complain(why)
        self._grace = self._pod["spec"].get("terminationGracePeriodSeconds", GRACE)
        self._end(None)
        self._grace = None

    def _end(self, before):
        """preStop, SIGTERM and, when the grace is over, SIGKILL."""
        begin = time.monotonic()
        if self._process.poll() is None and before is not None and self._grace > 0:
            self._wait_for_end(min(before["sleep"]["seconds"], self._grace))
        if self._process.poll() is None and self._grace > 0:
            self._process.send_signal(signal.SIGTERM)
            self._wait_for_end(max(2, self._grace - (time.monotonic() - begin)))
        if self._process.poll() is None:
            if self._grace > 0:
                self._complain(f"did not end within {self._grace} s")
            self._process.kill()
        self._process.wait()
        if self._process.returncode not in (0, -signal.SIGKILL):
            self._complain(f"ended with {self._process.returncode} after SIGTERM")
        print(f"kubelet: {self.name} ended after {time.monotonic() - begin:.1f} s", flush=True)

    def _wait_for_end(self, seconds):
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass

    def _tear_down(self):
        subprocess.run(["umount", "--recursive", "--lazy", self._root], capture_output=True, timeout=60)
        self._kubelet.network.remove_pod(self._namespace)

    def _confirm_deletion(self):
        try:
            self._kubelet.api.call("DELETE", self._path, {
                "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0,
                "preconditions": {"uid": self._pod["metadata"]["uid"]}})
        except (OSError, http.client.HTTPException, ApiError):
            pass  # It is gone, or the server is.

    # ---- The process. -----------------------------------------------------------------------------------------------
    def _start(self):
        values = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        for variable in self._container.get("env", []):
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            known = {"metadata.name": self.name, "status.podIP": self._address,
                     "metadata.namespace": self._pod["metadata"]["namespace"]}
            values[variable["name"]] = variable["value"] if field is None else known[field]
        command = self._container["command"] + self._container.get("args", [])
        command = [re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), word) for word in command]
        outer = self._pod["spec"].get("securityContext", {})
        user, group = outer.get("runAsUser", 0), outer.get("runAsGroup", 0)
        change = ["--userspec", f"{user}:{group}", f"--groups={outer.get('fsGroup', group)}"]
        with open(f"{self._kubelet.folder}/{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace, "setpriv", "--no-new-privs", "chroot",
                 *(change if _can_be(user) else []), self._root, *command],
                env=values, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _make_root(self):
        """The root folder: a few system folders of this machine, the programs, the volumes."""
        subprocess.run(["umount", "--recursive", "--lazy", self._root], capture_output=True, timeout=60)
        volumes = self._volumes()
        root = self._root
        for folder in ("usr/bin", "usr/lib", "etc", "proc", "dev"):
            os.makedirs(f"{root}/{folder}", exist_ok=True)
        net.run("mount", "--bind", root, root)
        mount("/usr/lib", f"{root}/usr/lib")
        mount(self._kubelet.binaries, f"{root}/usr/bin")
        mount("/proc", f"{root}/proc", recursive=True)
        for name in ("lib", "lib64"):
            if os.path.islink(f"/{name}"):
                os.path.lexists(f"{root}/{name}") or os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
                target = f"{root}/{os.readlink(f'/{name}')}"
                if not os.path.isdir(target):
                    os.makedirs(target)
                    mount(f"/{name}/", target)
            else:
                os.makedirs(f"{root}/{name}", exist_ok=True)
                mount(f"/{name}", f"{root}/{name}")
        for device in ("null", "zero", "random", "urandom"):
            open(f"{root}/dev/{device}", "w", encoding="utf-8").close()
            mount(f"/dev/{device}", f"{root}/dev/{device}", read_only=False)
        namespace = self._pod["metadata"]["namespace"]
        files = {
            "resolv.conf": f"nameserver {net.DNS}\nsearch {namespace}.svc.{net.DOMAIN} svc.{net.DOMAIN} {net.DOMAIN}\n"
                           "options ndots:5\n",
            "hosts": f"127.0.0.1 localhost\n{self._address} {self.name}\n",
            "nsswitch.conf": "hosts: files dns\n",
            "passwd": "root:x:0:0::/:/\n"}
        for name, text in files.items():
            with open(f"{root}/etc/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        for wanted in self._container.get("volumeMounts", []):
            target = root + wanted["mountPath"]
            os.makedirs(target, exist_ok=True)
            source, read_only = volumes[wanted["name"]]
            mount(source, target, read_only or wanted.get("readOnly", False))
        if self._container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            net.run("mount", "-o", "remount,bind,ro", root)

    def _volumes(self):
        """(folder, whether it is read-only) of each volume, by name."""
        group = self._pod["spec"].get("securityContext", {}).get("fsGroup", 0)
        namespace = f'/api/v1/namespaces/{self._pod["metadata"]["namespace"]}'
        api, found = self._kubelet.api, {}
        for volume in self._pod["spec"].get("volumes", []):
            name, folder = volume["name"], f'{self._root}.{volume["name"]}'
            if "persistentVolumeClaim" in volume:
                claim = api.get(f'{namespace}/persistentvolumeclaims/{volume["persistentVolumeClaim"]["claimName"]}')
                path = api.get(f'/api/v1/persistentvolumes/{claim["spec"]["volumeName"]}')["spec"]["hostPath"]["path"]
                read_only = volume["persistentVolumeClaim"].get("readOnly", False)
                if not read_only:
                    os.makedirs(path, exist_ok=True)
                    _give(path, group, 0o2775)
                found[name] = (path, read_only)
            elif "secret" in volume:
                data = api.get(f'{namespace}/secrets/{volume["secret"]["secretName"]}')["data"]
                os.makedirs(folder, exist_ok=True)
                for key, value in data.items():
                    with open(f"{folder}/{key}", "wb") as file:
                        file.write(base64.b64decode(value))
                    _give(file.name, group, volume["secret"].get("defaultMode", 0o644))
                found[name] = (folder, True)
            elif "configMap" in volume:
                data = api.get(f'{namespace}/configmaps/{volume["configMap"]["name"]}')["data"]
                os.makedirs(folder, exist_ok=True)
                for key, value in data.items():
                    with open(f"{folder}/{key}", "w", encoding="utf-8") as file:
                        file.write(value)
                found[name] = (folder, True)
            elif "emptyDir" in volume:
                os.makedirs(folder, exist_ok=True)
                _give(folder, group, 0o2775)
                found[name] = (folder, False)
        return found

    # ---- What is told. ----------------------------------------------------------------------------------------------
    def _report(self):
        state = dict(self._status)
        if state == self._reported:
            return
        running = state["phase"] == "Running"
        condition = {"status": "True" if state["ready"] else "False", "lastTransitionTime": now()}
        container = {"name": self._container["name"], "image": self._container["image"], "imageID": "",
                     "ready": state["ready"], "started": state["started"], "restartCount": state["restarts"],
                     "state": {"running": {"startedAt": now()}} if running else {"waiting": {"reason": "Starting"}}}
        status = {"phase": state["phase"], "podIP": self._address, "podIPs": [{"ip": self._address}],
                  "hostIP": net.GATEWAY, "startTime": self._start_time, "containerStatuses": [container],
                  "conditions": [{"type": kind, **condition} for kind in ("Ready", "ContainersReady")]}
        try:
            self._kubelet.api.call("PATCH", f"{self._path}/status", {"status": status},
                                   "application/strategic-merge-patch+json")
        except ApiError as error:
            if error.status != 404:
                raise
        self._reported = state


class Probe:
    """tick() asks when it is time. `result`: None as long as neither threshold was met."""

    def __init__(self, spec, address):
        self._spec, self._address = spec, address
        self._next = time.monotonic() + spec.get("initialDelaySeconds", 0)
        self._good = self._bad = 0
        self.result = None

    def tick(self):
        if time.monotonic() < self._next:
            return self.result
        self._next = time.monotonic() + self._spec.get("periodSeconds", 10)
        grpc = self._spec["grpc"]
        if grpc_health.is_serving((self._address, grpc["port"]), grpc.get("service", ""),
                                  self._spec.get("timeoutSeconds", 1)):
            self._good, self._bad = self._good + 1, 0
            if self._good >= self._spec.get("successThreshold", 1):
                self.result = True
        else:
            self._good, self._bad = 0, self._bad + 1
            if self._bad >= self._spec.get("failureThreshold", 3):
                self.result = False
        return self.result


def _can_be(user):
    """Whether this namespace of users has that one."""
    with open("/proc/self/uid_map", encoding="utf-8") as lines:
        for line in lines:
            first, _, count = (int(word) for word in line.split())
            if first <= user < first + count:
                return True
    return False


def _give(path, group, mode):
    if _can_be(group):
        os.chown(path, -1, group)
    os.chmod(path, mode)

#!/usr/bin/env python3
"""The manifests on a real control plane: applied, evicted, rolled and deleted. control_plane_test.py [CASE...]

Skipped, with words, where build.sh has not made the control plane or this machine gives no namespaces.
"""
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
HOME = os.environ.get("HOME") if os.path.isdir(os.environ.get("HOME", "")) else None
HOME = pwd.getpwuid(os.getuid()).pw_dir if HOME is None else HOME
TOOLS = next((path for path in (os.path.join(home, ".cache/rwkv-serving/python")
                                for home in (HOME, pwd.getpwuid(os.getuid()).pw_dir)) if os.path.isdir(path)), None)
if TOOLS is None:
    sys.exit("the checkers of manifests are not installed; deploy/local/setup.sh does it")
sys.path[:0] = [HERE, TOOLS]
import isolation  # noqa: E402
import kubelet as process_kubelet  # noqa: E402
import manifests  # noqa: E402
import network as pod_network  # noqa: E402
import yaml  # noqa: E402
from control_plane import PATIENCE, ApiError, ControlPlane, await_true, find_programs  # noqa: E402

COMPONENTS = ["traces", "tenants"]  # That no overlay has.
OVERLAYS = ["local", "cpu", "gpu", "scale-out", *(f"with-{component}" for component in COMPONENTS)]
NAMESPACE = "rwkv-serving"
BINARIES = {name: f"services/{name}/{name}" for name in ("router", "state_store", "worker")}
MODEL = "deploy/demo_model/rwkv7_demo"
TOKENS_PER_TURN = 60
WORKLOADS = {"state-store": "statefulset", "worker": "statefulset", "router": "deployment"}


def skip(why):
    print(f"control_plane_test: skipped: {why}")
    if "XML_OUTPUT_FILE" in os.environ:  # Bazel's word for it.
        with open(os.environ["XML_OUTPUT_FILE"], "w", encoding="utf-8") as report:
            report.write('<testsuites><testsuite name="control_plane_test"><testcase name="control_plane_test">'
                         "<skipped/></testcase></testsuite></testsuites>")
    sys.exit(0)


def pods_of(documents):
    return sum(d["spec"]["replicas"] for d in documents if d["kind"] in ("Deployment", "StatefulSet"))


class ControlPlaneCase(unittest.TestCase):
    """A control plane, a network and a kubelet for the pods of NAMESPACE."""

    maxDiff = None
    began = time.monotonic()

    @classmethod
    def setUpClass(cls):
        # Pods run as another user, who has to get through to their folders.
        cls.folder = tempfile.mkdtemp(prefix="control_plane.")
        os.chmod(cls.folder, 0o755)
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        # Copied, since kustomize takes no symbolic links, which is what a sandbox has for files.
        for part in ("base", "components", "overlays"):
            shutil.copytree(f"{HERE}/../{part}", f"{cls.folder}/kubernetes/{part}")
        for component in COMPONENTS:  # As operators make one of their own.
            overlay = f"{cls.folder}/kubernetes/overlays/with-{component}"
            os.makedirs(overlay)
            with open(f"{overlay}/kustomization.yaml", "w", encoding="utf-8") as file:
                yaml.safe_dump({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
                                "resources": ["../scale-out"], "components": [f"../../components/{component}"]}, file)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=60)
        cls.plane = ControlPlane(find_programs(), f"{cls.folder}/plane")
        cls.addClassCleanup(cls.plane.stop)
        cls.api = cls.plane.api
        cls.network = pod_network.Network(cls.api)
        cls.kubelet = process_kubelet.Kubelet(cls.api, cls.network, f"{cls.folder}/kubelet", BINARIES, NAMESPACE)
        cls.addClassCleanup(cls.kubelet.stop)
        cls.say("the control plane runs")

    @classmethod
    def say(cls, what):
        print(f"{time.monotonic() - cls.began:7.1f} s  {what}", flush=True)

    def render(self, overlay):
        return list(yaml.safe_load_all(self.plane.kubectl("kustomize", f"{self.folder}/kubernetes/overlays/{overlay}")))

    def apply_overlay(self, overlay, namespace, model):
        documents = self.render(overlay)
        self.plane.kubectl("create", "namespace", namespace)
        definitions = manifests.definitions(documents)
        if definitions:
            self.plane.apply(definitions)
            self.plane.kubectl("wait", "--for=condition=Established", "crd", "--all", f"--timeout={PATIENCE}s")
        self.plane.apply(manifests.claims(documents, namespace, model, f"{self.folder}/data"))
        self.plane.apply(manifests.convert(documents, namespace))
        return documents

    def pods(self, namespace=NAMESPACE, name=None):
        items = self.api.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
        return [p for p in items if name in (None, p["metadata"]["labels"]["app.kubernetes.io/name"])]

    def evict(self, pod):
        """The status: 201 if it is, 429 if the budget does not allow it now."""
        name = pod["metadata"]["name"]
        try:
            self.api.post(f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction", {
                "apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}})
        except ApiError as error:
            return error.status
        return 201


class ApplyTest(ControlPlaneCase):
    def test_every_overlay_is_taken_and_its_pods_are_bound(self):
        for overlay in OVERLAYS:
            with self.subTest(overlay):
                namespace = f"apply-{overlay}"
                documents = self.apply_overlay(overlay, namespace, self.folder)
                wanted = pods_of(documents)

                def all_bound():
                    pods = self.pods(namespace)
                    bound = [p for p in pods if p["spec"].get("nodeName")]
                    return bound if len(bound) == wanted else False

                try:
                    await_true(f"{wanted} pods of {overlay} are bound", all_bound)
                except AssertionError as error:
                    events = self.api.get(f"/api/v1/namespaces/{namespace}/events")["items"]
                    warnings = [e["message"] for e in events if e["type"] != "Normal"]
                    raise AssertionError(f"{error}; {warnings}") from None
                self.say(f"{overlay}: {len(documents)} objects, {wanted} pods")

    def test_what_schemas_do_not_know_is_refused(self):
        self.plane.kubectl("create", "namespace", "refused")

        def refused(overlay, name, change):
            documents = manifests.convert(self.render(overlay), "refused")
            document = next(d for d in documents if (d["kind"], d["metadata"]["name"]) == name)
            change(document)
            result = self.plane.kubectl("apply", "--dry-run=server", "-f", "-", check=False,
                                        stdin=yaml.safe_dump(document))
            return result.returncode != 0 and result.stderr

        def pod(document):
            return document["spec"]["template"]["spec"]

        worker, policy = ("StatefulSet", "worker"), ("NetworkPolicy", "worker")
        self.assertFalse(refused("local", worker, lambda d: None))
        self.assertRegex(refused("local", worker, lambda d: d["spec"]["selector"]["matchLabels"].update(a="b")),
                         "selector.*does not match template")
        self.assertRegex(refused("local", worker, lambda d: pod(d).update(restartPolicy="Never")), "restartPolicy")
        self.assertRegex(refused("local", policy, lambda d: d["spec"]["ingress"][0]["ports"][0].update(port=99999)),
                         "port")


class Streams:
    """The program that holds the conversations."""

    def __init__(self, count, address, tls):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            ["tests/testing/conversations_main", address, "router", f"{tls}/client/ca.crt", f"{tls}/api_key",
             str(count), str(TOKENS_PER_TURN)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True)

    def ask(self, what):
        """Its answer. It bounds its own waits."""
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.startswith(("ok", *"0123456789")):
                return line.strip()
            said.append(line)
        self._process.wait(PATIENCE)
        self._errors.seek(0)
        raise AssertionError(f"'{what}' failed: {''.join(said)[-4000:]} {self._errors.read()[-2000:]}")

    def stop(self):
        self._process.kill()
        self._process.wait()


class ClusterCase(ControlPlaneCase):
    """The overlay `local`, running, and `streams` conversations that go on from the start on."""

    streams = 64
    state_store = "state-store:50053"  # As routers and workers know it.

    def setUp(self):
        self.plane.kubectl("create", "namespace", "kube-system", check=False)
        tls, model = f"{self.folder}/tls", f"{self.folder}/model"
        subprocess.run(["deploy/local/make_certificates.sh", tls], check=True, timeout=PATIENCE, capture_output=True)
        os.makedirs(model)
        shutil.copy(f"{MODEL}.safetensors", f"{model}/model")
        shutil.copy(f"{MODEL}.vocab.txt", f"{model}/tokenizer")
        self.wanted = pods_of(self.apply_overlay("local", NAMESPACE, model))
        for role in ("router", "worker", "state-store"):
            self.create_secret(f"{role}-tls", *(f"{tls}/{role}/{file}" for file in ("tls.crt", "tls.key", "ca.crt")))
        self.create_secret("api-keys", f"{tls}/api_keys")
        self.await_whole()
        self.say("the overlay local runs")
        service = self.api.get(f"/api/v1/namespaces/{NAMESPACE}/services/router")
        self.conversations = Streams(self.streams, f'{service["spec"]["clusterIP"]}:50051', tls)
        self.addCleanup(self.conversations.stop)
        self.assertEqual(self.conversations.ask("start"), "ok")
        self.say(f"{self.streams} conversations stream")

    def render(self, overlay):
        documents = super().render(overlay)
        for document in documents:
            if document["kind"] in ("Deployment", "StatefulSet"):
                container, = document["spec"]["template"]["spec"]["containers"]
                container["args"] = [f"--state_store={self.state_store}" if a.startswith("--state_store=") else a
                                     for a in container["args"]]
        return documents

    def create_secret(self, name, *files):
        self.plane.kubectl("-n", NAMESPACE, "create", "secret", "generic", name, *(f"--from-file={f}" for f in files))

    def await_whole(self):
        """Until every workload is rolled out and every pod ready."""
        for name, kind in WORKLOADS.items():
            result = self.plane.kubectl("-n", NAMESPACE, "rollout", "status", f"{kind}/{name}",
                                        f"--timeout={PATIENCE}s", check=False, timeout=2 * PATIENCE)
            if result.returncode != 0:
                self.show_logs()
                self.fail(f"{name} is not rolled out: {result.stdout[-300:]} {result.stderr}")

        def all_ready():
            pods = self.pods()
            ready = [p for p in pods if "deletionTimestamp" not in p["metadata"]
                     and all(c["ready"] for c in p["status"].get("containerStatuses", [{"ready": False}]))]
            return len(pods) == len(ready) == self.wanted

        await_true("every pod is there and ready", all_ready)

    def show_logs(self):
        print(self.plane.kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide", check=False).stdout)
        print(self.kubelet.complaints)
        for pod in self.pods():
            name = pod["metadata"]["name"]
            print(f"---- {name}\n{self.kubelet.log(name)[-2000:]}")

    def after(self, what):
        self.await_whole()
        self.assertEqual(self.conversations.ask("progress"), "ok")
        self.assertEqual(self.kubelet.complaints, [])
        self.say(what)

    def evict_all(self, name):
        """One after the other, as a drain of their nodes does: while one is away the next has to wait."""
        first, *others = self.pods(name=name)
        self.assertEqual(self.evict(first), 201)
        for other in others:
            self.assertEqual(self.evict(other), 429)
        for other in others:
            await_true(f"the budget of {name} allows another one", lambda pod=other: self.evict(pod) == 201)
        self.after(f"every {name} was evicted, one at a time")

    def compare(self):
        """The longest pause of a conversation, in seconds."""
        said = self.conversations.ask("compare")
        self.say(said)
        self.assertEqual(self.kubelet.complaints, [])
        return float(re.search("the longest pause ([0-9.]+) s", said)[1])


class RolloutTest(ClusterCase):
    def test_nothing_is_lost_by_rollouts_evictions_and_deletions(self):
        for name, kind in WORKLOADS.items():
            before = {p["metadata"]["uid"] for p in self.pods(name=name)}
            self.plane.kubectl("-n", NAMESPACE, "rollout", "restart", f"{kind}/{name}")
            self.after(f"{name} is restarted")
            self.assertFalse(before & {p["metadata"]["uid"] for p in self.pods(name=name)})
        for name in WORKLOADS:
            self.evict_all(name)
        # A store that is killed leaves its lock to the next one; the others have nothing.
        for name in ("worker", "router"):
            pod = self.pods(name=name)[0]["metadata"]["name"]
            self.plane.kubectl("-n", NAMESPACE, "delete", "pod", pod, "--force", "--grace-period=0")
            self.after(f"{pod} was killed")
        self.compare()


class NamesTest(ClusterCase):
    streams = 16
    state_store = "state-store-0.state-stores:50053"

    def test_a_store_is_found_under_its_new_address(self):
        # The second time shortly after the first, when the name was asked for a moment ago.
        for _ in range(2):
            self.evict_all("state-store")
        # gRPC by itself asks for a name again after 30 s.
        self.assertLess(self.compare(), 25)


if __name__ == "__main__":
    if find_programs() is None:
        skip("there is no control plane; deploy/kubernetes/control_plane/build.sh makes one")
    if not os.environ.get(isolation.INSIDE) and (reason := isolation.why_not()) is not None:
        skip(reason)
    isolation.enter()
    unittest.main(verbosity=2, warnings="ignore")  # Connections that are open at the end.

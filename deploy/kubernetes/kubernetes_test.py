#!/usr/bin/env python3
"""Renders every overlay and checks it; then breaks it in some ninety ways, of which each has its check; then in every
other, by leaving out, changing and doubling each part of it."""
import copy
import itertools
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
HOME = os.environ.get("HOME") if os.path.isdir(os.environ.get("HOME", "")) else None
HOME = pwd.getpwuid(os.getuid()).pw_dir if HOME is None else HOME
TOOLS = next((path for path in (os.path.join(home, ".cache/rwkv-serving/python")
                                for home in (HOME, pwd.getpwuid(os.getuid()).pw_dir)) if os.path.isdir(path)), None)
if TOOLS is None:
    sys.exit("the checkers of manifests are not installed; deploy/local/setup.sh does it")
sys.path[:0] = [HERE, TOOLS]
import checks  # noqa: E402
from checks.manifests import arguments  # noqa: E402
import yaml  # noqa: E402

BINARIES = {"router": "services/router/router", "worker": "services/worker/worker",
            "state_store": "services/state_store/state_store"}
OVERLAYS = ["local", "cpu", "gpu", "scale-out"]
# An overlay as an operator makes one: what is there, and a component more.
WITH = """apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: rwkv-serving
resources: [../scale-out]
components: [../../components/{}]
"""


def render(folder, overlay):
    kustomize = subprocess.run([os.path.join(TOOLS, "bin/kubectl"), "kustomize", f"{folder}/overlays/{overlay}"],
                               capture_output=True, text=True, timeout=60)
    if kustomize.returncode != 0:
        raise AssertionError(f"{overlay} does not render: {kustomize.stderr}")
    return list(yaml.safe_load_all(kustomize.stdout))


def known_flags():
    known = {}
    for name, path in BINARIES.items():
        help_text = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
        known[name] = set(re.findall(r"^\s+--(\w+) \(", help_text, re.MULTILINE))
        if "name" not in known[name]:
            raise AssertionError(f"{path} --help lists no flags: {help_text[:300]}")
    return known


def workload(documents, name):
    return next(d for d in documents if d["kind"] in ("Deployment", "StatefulSet") and d["metadata"]["name"] == name)


def pod(documents, name):
    return workload(documents, name)["spec"]["template"]["spec"]


def container(documents, name):
    return pod(documents, name)["containers"][0]


def of_kind(documents, kind, name):
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)


def replace_argument(documents, name, before, after):
    arguments = container(documents, name)["args"]
    index = next(i for i, argument in enumerate(arguments) if argument.startswith(before))
    arguments[index:index + 1] = after


# What is broken, the check that has to say so, and how.
MUTATIONS = [
    ("an unknown field", "schema", lambda d: pod(d, "worker").update(restartPolicyy="Always")),
    ("a wrong type", "schema", lambda d: workload(d, "router")["spec"].update(replicas="two")),
    ("a missing field", "schema", lambda d: workload(d, "worker")["spec"].pop("selector")),
    ("an unknown field of a custom resource", "custom_resources",
     lambda d: of_kind(d, "ScaledObject", "worker")["spec"].update(minReplicas=1)),
    ("a custom resource without what it needs", "custom_resources",
     lambda d: of_kind(d, "PodMonitor", "rwkv-serving")["spec"].pop("selector")),
    ("a selector that misses its template", "selectors",
     lambda d: workload(d, "worker")["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/name": "work"})),
    ("a budget for nobody", "selectors",
     lambda d: of_kind(d, "PodDisruptionBudget", "router")["spec"]["selector"]["matchLabels"].update(a="b")),
    ("a Service that is not there", "references",
     lambda d: replace_argument(d, "router", "--state_store=", ["--state_store=store:50053"])),
    ("a Service that leads to another port", "services",
     lambda d: of_kind(d, "Service", "router")["spec"]["ports"][0].update(targetPort="metrics")),
    ("a Service that hides workers that start", "services",
     lambda d: of_kind(d, "Service", "workers")["spec"].pop("publishNotReadyAddresses")),
    ("h2c in front of TLS", "services",
     lambda d: of_kind(d, "Service", "router")["spec"]["ports"][0].update(appProtocol="kubernetes.io/h2c")),
    ("another namespace", "namespaces", lambda d: workload(d, "worker")["metadata"].update(namespace="default")),
    ("pods of one name", "identities", lambda d: replace_argument(d, "worker", "--name=", ["--name=worker"])),
    ("a name that nobody gives", "identities", lambda d: container(d, "worker").pop("env")),
    ("a listener of loopback", "references",
     lambda d: replace_argument(d, "worker", "--listen=", ["--listen=127.0.0.1:50052"])),
    ("a store that nobody is told of", "references", lambda d: workload(d, "state-store")["spec"].update(replicas=4)),
    ("a volume that is not there", "references", lambda d: pod(d, "worker").update(volumes=[])),
    ("no startup probe", "probes", lambda d: container(d, "worker").pop("startupProbe")),
    ("readiness as liveness", "probes", lambda d: container(d, "router")["livenessProbe"]["grpc"].pop("service")),
    ("too little grace", "grace", lambda d: pod(d, "router").update(terminationGracePeriodSeconds=15)),
    ("a liveness that restarts at once", "probes",
     lambda d: container(d, "worker")["livenessProbe"].update(failureThreshold=1)),
    ("a drain that is none", "grace", lambda d: replace_argument(d, "worker", "--drain_timeout=",
                                                                 ["--drain_timeout=0s"])),
    ("calls to a router that has ended", "grace", lambda d: container(d, "router").pop("lifecycle")),
    ("all routers at once", "rollouts",
     lambda d: workload(d, "router")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable="100%")),
    ("a rollout that does nothing", "rollouts",
     lambda d: workload(d, "worker")["spec"].update(updateStrategy={"type": "OnDelete"})),
    ("a stage that keeps the others from starting", "rollouts",
     lambda d: workload(d, "worker")["spec"].pop("podManagementPolicy")),
    ("a budget that blocks drains", "budgets",
     lambda d: of_kind(d, "PodDisruptionBudget", "state-store").update(
         spec={"minAvailable": 1, "selector": of_kind(d, "PodDisruptionBudget", "state-store")["spec"]["selector"]})),
    ("a pod that is broken and keeps its node", "budgets",
     lambda d: of_kind(d, "PodDisruptionBudget", "router")["spec"].pop("unhealthyPodEvictionPolicy")),
    ("a pod that nobody closes", "network", lambda d: d.remove(of_kind(d, "NetworkPolicy", "worker"))),
    ("a store for everybody", "network",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"].append({"ports": [{"port": 50053}]})),
    ("workers open at every port", "network",
     lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["ingress"][0].pop("ports")),
    ("out to everybody", "network", lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["egress"].append({})),
    ("whole namespaces", "network",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"][0]["from"].append(
         {"namespaceSelector": {}})),
    ("no way in for Prometheus", "connections", lambda d: d.remove(of_kind(d, "NetworkPolicy", "metrics"))),
    ("no way out to PostgreSQL", "connections",
     lambda d: of_kind(d, "NetworkPolicy", "state-store-backends")["spec"]["egress"][0]["ports"].pop(0)),
    ("a worker that may not send to the next", "connections",
     lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["egress"].pop(0)),
    ("a store that lets no worker in", "connections",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"][0]["from"].pop()),
    ("no names", "connections", lambda d: of_kind(d, "NetworkPolicy", "router")["spec"]["egress"].pop()),
    ("root", "hardening", lambda d: pod(d, "worker")["securityContext"].update(runAsNonRoot=False)),
    ("a writable root", "hardening",
     lambda d: container(d, "state-store")["securityContext"].update(readOnlyRootFilesystem=False)),
    ("a container that is root again", "hardening",
     lambda d: container(d, "worker")["securityContext"].update(runAsUser=0)),
    ("the network of the machine", "hardening", lambda d: pod(d, "worker").update(hostNetwork=True)),
    ("a token for the API", "hardening",
     lambda d: of_kind(d, "ServiceAccount", "worker").pop("automountServiceAccountToken")),
    ("a worker with the router's certificate", "volumes",
     lambda d: pod(d, "worker")["volumes"][0]["secret"].update(secretName="router-tls")),
    ("a secret for everybody", "volumes",
     lambda d: pod(d, "router")["volumes"][0]["secret"].update(defaultMode=0o644)),
    ("a certificate of another role", "certificates",
     lambda d: of_kind(d, "Certificate", "worker")["spec"].update(uris=["spiffe://rwkv-serving/rwkv/router"])),
    ("a certificate without its authority", "certificates",
     lambda d: of_kind(d, "Certificate", "authority")["spec"].update(isCA=False)),
    ("a writable model", "volumes",
     lambda d: next(m for m in container(d, "worker")["volumeMounts"] if m["name"] == "model").update(readOnly=False)),
    ("no limit of memory", "resources", lambda d: container(d, "router")["resources"].pop("limits")),
    ("a GPU that is not asked for", "resources",
     lambda d: container(d, "worker")["args"].append("--device=cuda:0")),
    ("a tag", "images", lambda d: container(d, "worker").update(image="registry.example.org/rwkv-serving-cpu:latest")),
    ("no key", "security_flags", lambda d: replace_argument(d, "worker", "--tls_key=", [])),
    ("keys for certificates", "security_flags",
     lambda d: replace_argument(d, "worker", "--tls_authorities=", ["--tls_authorities=/tls/tls.key"])),
    ("calls without keys", "programs", lambda d: replace_argument(d, "router", "--api_keys=", [])),
    ("states in two places", "programs", lambda d: replace_argument(d, "state-store", "--records=", [])),
    ("another program", "programs", lambda d: container(d, "router").update(command=["/bin/sh"])),
    ("a flag that there is not", "flags", lambda d: container(d, "worker")["args"].append("--slotz=3")),
    ("a flag twice", "flags", lambda d: container(d, "worker")["args"].append("--slots=3")),
    ("one router", "replicas", lambda d: workload(d, "router")["spec"].update(replicas=1)),
    ("half a pipeline", "replicas", lambda d: workload(d, "worker")["spec"].update(replicas=7)),
    ("a router without a pipeline", "replicas", lambda d: workload(d, "router")["spec"].update(replicas=4)),
    ("a stage for all", "replicas", lambda d: replace_argument(d, "worker", "--stage=", ["--stage=0/2"])),
    ("spread by what others run", "spread",
     lambda d: pod(d, "worker")["topologySpreadConstraints"][0]["labelSelector"].update(
         matchLabels={"app.kubernetes.io/name": "router"})),
    ("a request that is no number", "resources",
     lambda d: container(d, "worker")["resources"]["requests"].update(memory="4Gb")),
    ("scaling by a number that there is not", "scaling",
     lambda d: of_kind(d, "ScaledObject", "worker")["spec"]["triggers"][0]["metadata"].update(query="rwkv_wanted")),
    ("scaling by halves of pipelines", "scaling",
     lambda d: of_kind(d, "ScaledObject", "worker")["spec"].update(maxReplicaCount=15)),
    ("a router without a pipeline at night", "scaling",
     lambda d: of_kind(d, "ScaledObject", "worker")["spec"].update(minReplicaCount=4)),
    ("a container before the first", "parts",
     lambda d: pod(d, "worker").update(initContainers=[{"name": "a", "image": "b"}])),
    ("a port of the machine", "parts", lambda d: container(d, "state-store")["ports"][0].update(hostPort=50053)),
    ("a Service for the world", "parts", lambda d: of_kind(d, "Service", "state-stores")["spec"].update(
        type="LoadBalancer")),
    ("a store for addresses", "parts",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"][0]["from"].append(
         {"ipBlock": {"cidr": "0.0.0.0/0"}})),
    ("a range of ports", "parts",
     lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["ingress"][0]["ports"][0].update(endPort=65535)),
    ("a secret in the environment", "parts",
     lambda d: container(d, "router")["env"].append({"name": "KEY", "value": "secret"})),
    ("a secret that does not change", "parts",
     lambda d: container(d, "router")["volumeMounts"][0].update(subPath="tls.crt")),
    ("a pod that starts without its secret", "parts",
     lambda d: pod(d, "router")["volumes"][0]["secret"].update(optional=True)),
    ("claims that go with their workload", "parts",
     lambda d: workload(d, "state-store")["spec"].update(
         persistentVolumeClaimRetentionPolicy={"whenDeleted": "Delete"})),
    ("a rollout of some", "parts",
     lambda d: workload(d, "worker")["spec"].update(
         updateStrategy={"type": "RollingUpdate", "rollingUpdate": {"partition": 5}})),
    ("a rollout that waits", "parts", lambda d: workload(d, "router")["spec"].update(paused=True)),
    ("a probe that kills without grace", "parts",
     lambda d: container(d, "worker")["livenessProbe"].update(terminationGracePeriodSeconds=1)),
    ("pods that nobody checks", "parts",
     lambda d: d.append({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "x"}})),
    ("pods beside the policy's", "parts",
     lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["podSelector"].update(
         matchExpressions=[{"key": "a", "operator": "Exists"}])),
    ("scaled to nothing", "parts", lambda d: of_kind(d, "ScaledObject", "worker")["spec"].update(idleReplicaCount=0)),
    ("a store for other pods", "network",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"][0]["from"].append(
         {"podSelector": {"matchLabels": {"app": "other"}}})),
    ("a store for another namespace", "network",
     lambda d: of_kind(d, "NetworkPolicy", "state-store")["spec"]["ingress"][0]["from"].append(
         {"namespaceSelector": {"matchLabels": {"a": "b"}}})),
    ("metrics for everybody inside", "network",
     lambda d: of_kind(d, "NetworkPolicy", "metrics")["spec"]["ingress"][0]["from"].append(
         {"podSelector": {"matchLabels": {"app": "other"}}})),
    ("a worker that calls others", "network",
     lambda d: of_kind(d, "NetworkPolicy", "worker")["spec"]["egress"][0]["to"].append(
         {"podSelector": {"matchLabels": {"app": "other"}}})),
    ("the authority's key in a router", "volumes",
     lambda d: pod(d, "router")["volumes"].append(
         {"name": "authority", "secret": {"secretName": "authority", "defaultMode": 0o440}})),
    ("a volume over the programs", "volumes",
     lambda d: container(d, "router")["volumeMounts"].append(
         {"name": "model", "mountPath": "/usr/bin", "readOnly": True})),
    ("a router that may sign", "certificates",
     lambda d: of_kind(d, "Certificate", "router")["spec"].update(isCA=True)),
    ("a router that is an operator, too", "certificates",
     lambda d: of_kind(d, "Certificate", "router")["spec"]["uris"].append("spiffe://rwkv-serving/rwkv/operator")),
    ("an operator by name", "certificates",
     lambda d: of_kind(d, "Certificate", "router")["spec"]["dnsNames"].append("operator.rwkv.internal")),
    ("a certificate for anything", "certificates",
     lambda d: of_kind(d, "Certificate", "worker")["spec"]["usages"].append("cert sign")),
    ("flags beside the flags", "programs", lambda d: container(d, "worker")["command"].append("--slots=1")),
    ("metrics by a Service", "services",
     lambda d: of_kind(d, "Service", "router")["spec"]["ports"].append(
         {"name": "metrics", "port": 9090, "targetPort": "metrics"})),
]

# Parts that may be left out or changed as below and mean the same, or something else that is right, too.
FREE = [
    r"(Deployment|StatefulSet|Service|[A-Z]\w+)/\S+ \w+ metadata\.labels",
    r"(PodDisruptionBudget|NetworkPolicy|ScaledObject|PodMonitor|Certificate)/\S+ change metadata\.name",
    r"Service/state-store change metadata\.name",  # Stores are named one by one in this overlay.
    # Left out, a default says the same.
    r"\S+ drop \S*\.protocol",
    r"Service/\S+ drop spec\.ports\.\d\.targetPort",
    r"Service/\S+ \w+ spec\.ports\.\d\.name",
    r"\S+ drop spec\.template\.spec\.terminationGracePeriodSeconds",
    r"StatefulSet/worker drop spec\.updateStrategy",
    r"Certificate/\S+ drop spec\.(duration|renewBefore|issuerRef\.kind)",
    r"ScaledObject/worker drop spec\.(cooldownPeriod|maxReplicaCount|pollingInterval|triggers\.0\.metricType)",
    r"PodMonitor/\S+ drop spec\.podMetricsEndpoints\.0\.interval",
    r"\S+ drop \S*Probe\.(timeoutSeconds|periodSeconds|failureThreshold)",
    # A little more of it does no harm.
    r"\S+ change \S*Probe\.(timeoutSeconds|periodSeconds|failureThreshold)",
    r"\S+ change \S*\.(minReadySeconds|preStop\.sleep\.seconds|terminationGracePeriodSeconds)",
    r"ScaledObject/worker change spec\.(cooldownPeriod|pollingInterval)",
    # What an operator sets.
    r"Certificate/\S+ \w+ spec\.(privateKey|commonName)",
    r"Certificate/router grow spec\.dnsNames",
    r"ScaledObject/worker change spec\.triggers\.0\.metadata\.serverAddress",
    r"StatefulSet/state-store change \S*\.args\.(5|7|8)",  # Where PostgreSQL, the bucket and S3 are.
    r"StatefulSet/worker change \S*\.args\.8",  # --slots
]


def parts(value, path=()):
    """Every path below a value."""
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield path + (key,)
        yield from parts(below, path + (key,))


def broken(document):
    """(What was done, the document so) for every part of it: left out, or another value."""
    for path in list(parts(document)):
        for how in ("drop", "change"):
            copied = copy.deepcopy(document)
            above = copied
            for key in path[:-1]:
                above = above[key]
            value = above[path[-1]]
            if how == "drop":
                del above[path[-1]]
            elif isinstance(value, (dict, list)):
                continue
            else:
                above[path[-1]] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else \
                    f"{value}x"
            name = f"{document['kind']}/{document['metadata']['name']}"
            yield f"{name} {how} {'.'.join(str(key) for key in path)}", copied


def _other(value):
    """Another one of its kind."""
    if isinstance(value, dict):
        return {key: _other(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_other(below) for below in value]
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}x"


def grown(document):
    """(What was done, the document so) for every list in it: one more, like each of those that are there."""
    for path in list(parts(document)):
        listed = document
        for key in path:
            listed = listed[key]
        for index, element in enumerate(listed if isinstance(listed, list) else ()):
            copied = copy.deepcopy(document)
            place = copied
            for key in path:
                place = place[key]
            place.append(_other(element))
            name = f"{document['kind']}/{document['metadata']['name']}"
            yield f"{name} grow {'.'.join(str(key) for key in path)} by {index}", copied


class KubernetesTest(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.known = known_flags()
        # Copied, since kustomize takes no symbolic links, which is what a sandbox has for files.
        with tempfile.TemporaryDirectory() as folder:
            for part in ("base", "components", "overlays"):
                shutil.copytree(f"{HERE}/{part}", f"{folder}/{part}")
            for component in ("traces", "tenants"):
                os.makedirs(f"{folder}/overlays/with-{component}")
                with open(f"{folder}/overlays/with-{component}/kustomization.yaml", "w", encoding="utf-8") as file:
                    file.write(WITH.format(component))
            cls.rendered = {overlay: render(folder, overlay) for overlay in
                            [*OVERLAYS, "with-traces", "with-tenants"]}

    def test_every_overlay_passes(self):
        for overlay, documents in self.rendered.items():
            with self.subTest(overlay):
                self.assertEqual(checks.check_all(documents, self.known), [])

    def test_each_mutation_is_refused_by_its_check(self):
        for what, check, mutate in MUTATIONS:
            with self.subTest(what):
                documents = copy.deepcopy(self.rendered["scale-out"])
                mutate(documents)
                run = (lambda d: checks.flags(d, self.known)) if check == "flags" else getattr(checks, check)
                self.assertTrue(list(run(documents)), f"{check} lets it pass")

    def test_every_part_is_needed_or_free(self):
        documents = self.rendered["scale-out"]
        for index, document in enumerate(documents):
            if document["kind"] == "PrometheusRule":
                continue  # deploy/monitoring has tests of the rules.
            for what, mutant in itertools.chain(broken(document), grown(document)):
                if any(re.match(free, what) for free in FREE):
                    continue
                # The schemas take their time, and look at one document at a time.
                found = any(list(check([mutant])) for check in checks.SCHEMAS) or any(
                    list(check(documents[:index] + [mutant] + documents[index + 1:])) for check in
                    [*checks.CHECKS, lambda d: checks.flags(d, self.known)])
                self.assertTrue(found, f"nothing says so: {what}")

    def test_overlays_are_what_they_say(self):
        args = container(self.rendered["gpu"], "worker")["args"]
        self.assertIn("--device=cuda:0", args)
        self.assertEqual(container(self.rendered["gpu"], "worker")["resources"]["limits"]["nvidia.com/gpu"], "1")
        self.assertEqual(workload(self.rendered["scale-out"], "worker")["spec"]["replicas"], 6)
        kinds = {d["kind"] for d in self.rendered["local"]}
        self.assertFalse(kinds & {"PodMonitor", "PrometheusRule", "ScaledObject", "Certificate"}, "needs an operator")

    def test_tenants_are_asked_for_where_there_is_a_file(self):
        for overlay, documents in self.rendered.items():
            flags = dict(arguments(container(documents, "router")))
            self.assertEqual("tenants" in flags, overlay == "with-tenants", overlay)
            for name in ("worker", "state-store"):
                self.assertNotIn("tenants", dict(arguments(container(documents, name))))

    def test_traces_get_out_only_where_there_is_a_collector(self):
        for overlay, documents in self.rendered.items():
            for name in ("router", "worker", "state-store"):
                flags = dict(arguments(container(documents, name)))
                self.assertEqual("otlp_traces_endpoint" in flags, overlay == "with-traces", f"{overlay}, {name}")
        documents = copy.deepcopy(self.rendered["with-traces"])
        documents.remove(of_kind(documents, "NetworkPolicy", "traces"))
        self.assertEqual(len(list(checks.connections(documents))), 3)

    def test_secrets_are_not_in_the_tree(self):
        for overlay, documents in self.rendered.items():
            self.assertNotIn("Secret", {d["kind"] for d in documents}, overlay)


if __name__ == "__main__":
    unittest.main()

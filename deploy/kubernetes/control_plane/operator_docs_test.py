#!/usr/bin/env python3
"""Every kubectl command that the operators' pages give, run as it stands against a real control plane.

A command that a page has and this test does not run, or the other way round, fails it.
"""
import glob
import json
import os
import re
import shutil
import subprocess
import unittest

import control_plane_test as common
import isolation
import manifests
from control_plane import PATIENCE, await_true, find_programs

NAMESPACE = common.NAMESPACE
README, OPERATING = "deploy/kubernetes/README.md", "services/docs/operating.md"
PAGES = [README, OPERATING, *sorted(glob.glob("deploy/playbook/*.md"))]
OTHER_DIGEST = "sha256:" + "1" * 64
# What cannot be run here, and why.
NOT_HERE = {
    "kubectl logs --previous POD": "it asks the node's kubelet, and ours runs processes instead of containers",
}


def block(page, mark):
    """The commands of the page's code block that has `mark` in it, without comments, a line each."""
    with open(page, encoding="utf-8") as file:
        blocks = re.findall(r"```sh\n(.*?)```", file.read(), re.DOTALL)
    found = next(b for b in blocks if mark in b)
    lines = [re.sub(r"(^|\s+)# .*", "", line).strip() for line in found.splitlines()]
    return [line for line in lines if line]


def commands_of(page):
    """All kubectl commands of a page, of blocks and inside of sentences."""
    with open(page, encoding="utf-8") as file:
        text = file.read()
    for inside in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in inside.splitlines():
            for part in re.sub(r"(^|\s+)# .*", "", line).split(";"):
                if part.strip().startswith("kubectl"):
                    yield part.strip()
    for inside in re.findall(r"`(kubectl [^`\n]*)`", text):
        yield inside


class OperatorDocsTest(common.ControlPlaneCase):
    def setUp(self):
        self.ran = set()
        self.work = f"{self.folder}/tree"
        self.overlay = f"{self.work}/deploy/kubernetes/overlays/cpu"
        os.makedirs(self.overlay)
        self.environment = {**os.environ, "KUBECONFIG": f"{self.work}/kubeconfig",
                            "PATH": f"{self.work}/bin:{os.environ['PATH']}"}
        os.makedirs(f"{self.work}/bin")
        os.symlink(f"{self.plane.programs}/kubectl", f"{self.work}/bin/kubectl")
        shutil.copy(f"{self.plane.folder}/kubeconfig", self.environment["KUBECONFIG"])
        self.directory = self.work
        self.plane.kubectl("create", "namespace", "kube-system", check=False)

    def run_line(self, line):
        """A line of a page, in a shell, where the last `cd` led to."""
        if line.startswith("cd "):
            self.directory = os.path.join(self.work, line[3:])
            return ""
        for command in line.split(";"):
            self.ran.add(command.strip())
        result = subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=self.directory, env=self.environment,
                                capture_output=True, text=True, timeout=3 * PATIENCE)
        self.assertEqual(result.returncode, 0, f"{line}: {result.stdout[-1000:]} {result.stderr[-2000:]}")
        self.say(line)
        return result.stdout

    def write_overlay(self, digest=None):
        """The overlay cpu as this old server takes it, where the pages say it is."""
        documents = self.render("cpu")
        definitions = manifests.definitions(documents)
        converted = manifests.convert(documents, NAMESPACE)
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": converted})
        if digest is not None:
            text = re.sub("sha256:[0-9a-f]{64}", digest, text)
        with open(f"{self.overlay}/all.yaml", "w", encoding="utf-8") as file:
            file.write(text)
        with open(f"{self.overlay}/kustomization.yaml", "w", encoding="utf-8") as file:
            json.dump({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
                       "resources": ["all.yaml"]}, file)
        return documents, definitions

    def image_of(self, kind, name):
        workload = self.api.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/{kind}s/{name}")
        return workload["spec"]["template"]["spec"]["containers"][0]["image"]

    def await_rolled_out(self):
        for name, kind in common.WORKLOADS.items():
            self.plane.kubectl("-n", NAMESPACE, "rollout", "status", f"{kind}/{name}", f"--timeout={PATIENCE}s",
                               timeout=2 * PATIENCE)

    def test_pages_are_as_they_stand(self):
        documents, definitions = self.write_overlay()
        tls, model = f"{self.folder}/tls", f"{self.folder}/model"
        subprocess.run(["deploy/local/make_certificates.sh", tls], check=True, timeout=PATIENCE, capture_output=True)
        os.makedirs(model)
        shutil.copy(f"{common.MODEL}.safetensors", f"{model}/model")
        shutil.copy(f"{common.MODEL}.vocab.txt", f"{model}/tokenizer")
        shutil.copy(f"{tls}/api_keys", f"{self.work}/api_keys")
        self.plane.apply(definitions)  # Operators are there.
        self.plane.kubectl("wait", "--for=condition=Established", "crd", "--all", f"--timeout={PATIENCE}s")

        # How a cluster is made.
        for line in block(README, "kubectl apply -k ."):
            if line.startswith("kustomize edit set image"):
                # No kustomize by itself here; what it would change is there.
                with open(f"{self.folder}/kubernetes/overlays/cpu/kustomization.yaml", encoding="utf-8") as file:
                    self.assertIn(f"- name: {line.split()[4].partition('=')[0]}\n", file.read())
                continue
            if line == "kubectl apply -k .":  # What the administrator and cert-manager bring.
                self.plane.apply(manifests.claims(documents, NAMESPACE, model, f"{self.folder}/data"))
                for role in ("router", "worker", "state-store"):
                    files = [f"--from-file={tls}/{role}/{file}" for file in ("tls.crt", "tls.key", "ca.crt")]
                    self.plane.kubectl("-n", NAMESPACE, "create", "secret", "generic", f"{role}-tls", *files)
            self.run_line(line)
        self.await_rolled_out()
        before = self.image_of("statefulset", "worker")

        # A new release, and the way back.
        upgrade = block(OPERATING, "kubectl rollout undo")
        for line in upgrade:
            if line == "kubectl apply -k .":
                self.write_overlay(OTHER_DIGEST)
            undo = "rollout undo" in line
            if undo:
                self.await_rolled_out()
                for kind, name in (("statefulset", "worker"), ("deployment", "router")):
                    self.assertIn(OTHER_DIGEST, self.image_of(kind, name))
            self.run_line(line)
        for kind, name in (("statefulset", "worker"), ("deployment", "router")):
            self.assertEqual(self.image_of(kind, name), before)
        self.await_rolled_out()
        pods = await_true("every pod is of before", lambda: all(
            OTHER_DIGEST not in p["spec"]["containers"][0]["image"]
            for p in self.pods() if p["metadata"]["labels"]["app.kubernetes.io/name"] != "state-store"))
        self.assertTrue(pods)
        self.assertEqual(self.kubelet.complaints, [])

        # What pages for alerts ask for.
        for page in PAGES:
            for command in commands_of(page):
                if command not in self.ran and command not in NOT_HERE:
                    self.assertTrue(self.run_line(command), f"{page}: {command} says nothing")
        self.assertIn("router", self.run_line("kubectl get pods"))
        everything = {command for page in PAGES for command in commands_of(page)}
        self.assertEqual(set(NOT_HERE) - everything, set(), "no page has it any more")


if __name__ == "__main__":
    if find_programs() is None:
        common.skip("there is no control plane; deploy/kubernetes/control_plane/build.sh makes one")
    if not os.environ.get(isolation.INSIDE) and (reason := isolation.why_not()) is not None:
        common.skip(reason)
    isolation.enter()
    unittest.main(verbosity=2, warnings="ignore")  # Connections that are open at the end.

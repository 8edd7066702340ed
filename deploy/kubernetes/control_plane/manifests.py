"""Manifests for a server of version 1.20: what it does not know yet is said in its words, or laid aside.

Probes by gRPC and `preStop.sleep` are younger than that; a pod carries them in an annotation to the process kubelet.
"""
import copy
import json

LAID_ASIDE = "rwkv-serving/containers"
_FIELDS = ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle")
_BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}


def _for_old_server(container):
    """Takes out what the server does not know; puts in what it does, so that it has something to check."""
    aside = {field: copy.deepcopy(container[field]) for field in _FIELDS if field in container}
    for field in _FIELDS[:3]:
        if "grpc" in container.get(field, {}):
            container[field]["tcpSocket"] = {"port": container[field].pop("grpc")["port"]}
    before = container.get("lifecycle", {}).get("preStop", {})
    if "sleep" in before:
        before["exec"] = {"command": ["sleep", str(before.pop("sleep")["seconds"])]}
    return aside


def convert(documents, namespace):
    """For 1.20, into a namespace."""
    converted = copy.deepcopy(documents)
    for document in converted:
        document["metadata"]["namespace"] = namespace
        if document["kind"] == "PodDisruptionBudget":
            document["apiVersion"] = "policy/v1beta1"
            document["spec"].pop("unhealthyPodEvictionPolicy", None)  # 1.26
        if document["kind"] not in ("Deployment", "StatefulSet"):
            continue
        if document["kind"] == "StatefulSet":
            document["spec"].pop("minReadySeconds", None)  # 1.22
        template = document["spec"]["template"]
        aside = {c["name"]: _for_old_server(c) for c in template["spec"]["containers"]}
        template["metadata"].setdefault("annotations", {})[LAID_ASIDE] = json.dumps(aside, sort_keys=True)
    return converted


def original_container(pod):
    """The pod's only container as its manifest has it."""
    container, = copy.deepcopy(pod["spec"]["containers"])
    aside = json.loads(pod["metadata"].get("annotations", {}).get(LAID_ASIDE, "{}"))
    container.update(aside.get(container["name"], {}))
    return container


def definitions(documents):
    """CustomResourceDefinitions of the kinds that operators bring; checks/schemas.py looks at their fields."""
    found = {}
    for document in documents:
        if document["apiVersion"] in _BUILT_IN:
            continue
        group, version = document["apiVersion"].split("/")
        kind = document["kind"]
        plural = kind.lower() + "s"
        found[f"{plural}.{group}"] = {
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {"group": group, "scope": "Namespaced",
                     "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
                     "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": {
                         "type": "object", "x-kubernetes-preserve-unknown-fields": True}}}]}}
    return list(found.values())


def claims(documents, namespace, model, data):
    """What an administrator brings: the claim `model`, and volumes for it and for each store's `data`, in folders."""
    def volume(name, claim, mode, size, path):
        return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{name}"},
                "spec": {"capacity": {"storage": size}, "accessModes": [mode], "storageClassName": "",
                         "claimRef": {"namespace": namespace, "name": claim}, "hostPath": {"path": path}}}

    found = [volume("model", "model", "ReadOnlyMany", "1Gi", model),
             {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
              "metadata": {"name": "model", "namespace": namespace},
              "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": f"{namespace}-model",
                       "resources": {"requests": {"storage": "1Gi"}}}}]
    for document in documents:
        for template in document.get("spec", {}).get("volumeClaimTemplates", []):
            for ordinal in range(document["spec"]["replicas"]):
                name = f'{template["metadata"]["name"]}-{document["metadata"]["name"]}-{ordinal}'
                found.append(volume(name, name, template["spec"]["accessModes"][0],
                                    template["spec"]["resources"]["requests"]["storage"], f"{data}/{name}"))
    return found

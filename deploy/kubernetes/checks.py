"""Checks of rendered manifests. Each has a name, and says what it found; none needs a cluster.

A manifest is a list of documents as kustomize renders them. `check_all` gives (check, message) pairs.
"""
import importlib
import re

SCHEMA_VERSIONS = ["1.30.0", "1.37.0"]
CUSTOM_GROUPS = {
    "monitoring.coreos.com": "cloudcoil.models.prometheus_operator",
    "keda.sh": "cloudcoil.models.keda",
    "cert-manager.io": "cloudcoil.models.cert_manager",
}


def _group(document):
    api = document.get("apiVersion", "")
    return api.split("/")[0] if "/" in api else ""


def _name(document):
    return f'{document.get("kind")}/{document.get("metadata", {}).get("name")}'


def workloads(documents):
    return [d for d in documents if d["kind"] in ("Deployment", "StatefulSet")]


def _pods(documents):
    for workload in workloads(documents):
        yield workload, workload["spec"]["template"]


def _containers(documents):
    for workload, template in _pods(documents):
        for container in template["spec"]["containers"]:
            yield workload, template["spec"], container


def arguments(container):
    """--name=value arguments as a list of pairs."""
    pairs = []
    for argument in container.get("args", []):
        name, _, value = argument.lstrip("-").partition("=")
        pairs.append((name, value))
    return pairs


def _selects(selector, labels):
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and all(labels.get(k) == v for k, v in wanted.items())


def _seconds(text):
    match = re.fullmatch(r"(\d+)(s|m)", text)
    return int(match[1]) * (60 if match[2] == "m" else 1) if match else None


# ---- The checks. ----------------------------------------------------------------------------------------------------
def schema(documents):
    import kubernetes_validate

    for document in documents:
        if _group(document) in CUSTOM_GROUPS:
            continue
        for version in SCHEMA_VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = "/".join(str(part) for part in error.path)
                yield f"{_name(document)} at {version}: {where}: {error.message[:200]}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{_name(document)}: no schema of that kind and version: {error}"


def _lost(given, kept, path):
    """What the model did not keep of what was given: unknown fields pass pydantic silently."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, value in enumerate(given):
            if index < len(kept):
                yield from _lost(value, kept[index], f"{path}[{index}]")


def custom_resources(documents):
    import pydantic

    for document in documents:
        module = CUSTOM_GROUPS.get(_group(document))
        if module is None:
            continue
        version = document["apiVersion"].split("/")[1]
        try:
            model = getattr(importlib.import_module(f"{module}.{version}"), document["kind"])
        except (ImportError, AttributeError):
            yield f"{_name(document)}: {document['apiVersion']} has no such kind"
            continue
        try:
            kept = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            yield f"{_name(document)}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            continue
        for path in _lost(document.get("spec", {}), kept.get("spec", {}), "spec"):
            yield f"{_name(document)}: unknown field {path}"


def selectors(documents):
    templates = [t["metadata"]["labels"] for _, t in _pods(documents)]
    for workload, template in _pods(documents):
        if not _selects(workload["spec"]["selector"], template["metadata"]["labels"]):
            yield f"{_name(workload)}: its selector does not match its own template"
    for document in documents:
        if document["kind"] == "Service":
            selector = {"matchLabels": document["spec"].get("selector", {})}
        elif document["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selector = document["spec"]["selector"]
        elif document["kind"] == "NetworkPolicy":
            selector = document["spec"]["podSelector"]
        else:
            continue
        if not any(_selects(selector, labels) for labels in templates):
            yield f"{_name(document)}: selects no pod"


def _pod_hosts(documents):
    """Names of the pods that have one."""
    for workload in workloads(documents):
        if workload["kind"] == "StatefulSet":
            for ordinal in range(workload["spec"].get("replicas", 1)):
                yield f'{workload["metadata"]["name"]}-{ordinal}.{workload["spec"]["serviceName"]}'


def references(documents):
    """Names that one manifest uses of another."""
    services = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Service"}
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    targets = {(d["kind"], d["metadata"]["name"]) for d in workloads(documents)}
    for workload, pod, container in _containers(documents):
        if workload["kind"] == "StatefulSet" and workload["spec"]["serviceName"] not in services:
            yield f"{_name(workload)}: no Service {workload['spec']['serviceName']}"
        if pod.get("serviceAccountName") not in accounts:
            yield f"{_name(workload)}: no ServiceAccount {pod.get('serviceAccountName')}"
        volumes = {v["name"] for v in pod.get("volumes", [])}
        volumes |= {v["metadata"]["name"] for v in workload["spec"].get("volumeClaimTemplates", [])}
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{_name(workload)}: mounts a volume {mount['name']} that there is not"
        ports = {p["name"]: p["containerPort"] for p in container.get("ports", [])}
        for name, value in arguments(container):
            if name in ("state_store", "workers"):
                addresses = [a.removeprefix("dns:").rpartition(":") for a in value.split(",")]
                for host, _, port in addresses:
                    service = services.get(host.rpartition(".")[2])
                    if service is None or int(port) not in [p["port"] for p in service["spec"]["ports"]]:
                        yield f"{_name(workload)}: --{name}={value}: no Service with that port"
                named = sorted(host for host, _, _ in addresses if "." in host)
                pods = sorted(host for host in _pod_hosts(documents) if named and
                              host.rpartition(".")[2] == named[0].rpartition(".")[2])
                if named != pods:
                    yield f"{_name(workload)}: --{name} names {named}, and there are {pods}"
            if name.endswith("listen") and int(value.rpartition(":")[2]) not in ports.values():
                yield f"{_name(workload)}: --{name}={value} is none of its ports"
            if value.startswith("/") and not any(value.startswith(m["mountPath"] + "/") for m in mounts):
                yield f"{_name(workload)}: --{name}={value} is in no volume"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            port = container.get(probe, {}).get("grpc", {}).get("port")
            if port is not None and port != ports.get("health"):
                yield f"{_name(workload)}: {probe} asks port {port}, which does not answer health"
    for document in documents:
        if document["kind"] == "ScaledObject":
            target = document["spec"]["scaleTargetRef"]
            if (target.get("kind", "Deployment"), target["name"]) not in targets:
                yield f"{_name(document)}: scales {target['name']}, which there is not"


def probes(documents):
    """Three that differ: a process that waits for others is not restarted, one that hangs gets no work."""
    for workload, _, container in _containers(documents):
        missing = [p for p in ("startupProbe", "livenessProbe", "readinessProbe") if "grpc" not in container.get(p, {})]
        if missing:
            yield f"{_name(workload)}: no {', '.join(missing)}"
            continue
        live, ready = container["livenessProbe"]["grpc"], container["readinessProbe"]["grpc"]
        if live.get("service") != "live" or container["startupProbe"]["grpc"].get("service") != "live":
            yield f"{_name(workload)}: startup and liveness have to ask for the service live"
        if ready.get("service", "") == "live":
            yield f"{_name(workload)}: readiness must not ask for the service live"


def grace(documents):
    """Between SIGTERM and SIGKILL there has to be time for preStop, the drain and its end."""
    for workload, pod, container in _containers(documents):
        drain = _seconds(dict(arguments(container)).get("drain_timeout", ""))
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        have = pod.get("terminationGracePeriodSeconds", 30)
        if drain is None:
            yield f"{_name(workload)}: no --drain_timeout in seconds"
        elif have <= before + drain + 5:
            yield f"{_name(workload)}: {have} s of grace for {before} s of preStop and {drain} s of drain"


def budgets(documents):
    for workload, template in _pods(documents):
        mine = [d for d in documents if d["kind"] == "PodDisruptionBudget"
                and _selects(d["spec"]["selector"], template["metadata"]["labels"])]
        if len(mine) != 1:
            yield f"{_name(workload)}: {len(mine)} PodDisruptionBudgets"
        for budget in mine:
            if "minAvailable" in budget["spec"] or budget["spec"].get("maxUnavailable") != 1:
                yield f"{_name(budget)}: maxUnavailable has to be 1: anything else blocks drains or stops pipelines"
            if budget["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
                yield f"{_name(budget)}: a pod that is not ready could keep its node from being drained"


def network(documents):
    """Every pod is closed but for what is said: both ways, and never to everybody inside on the processes' ports."""
    policies = [d for d in documents if d["kind"] == "NetworkPolicy"]
    for workload, template in _pods(documents):
        labels = template["metadata"]["labels"]
        mine = [p for p in policies if _selects(p["spec"]["podSelector"], labels)]
        types = {t for p in mine for t in p["spec"].get("policyTypes", [])}
        if types != {"Ingress", "Egress"}:
            yield f"{_name(workload)}: no NetworkPolicy closes it both ways"
        if labels.get("app.kubernetes.io/name") == "router":
            continue
        for policy in mine:
            for rule in policy["spec"].get("ingress", []):
                if not rule.get("from"):
                    yield f"{_name(policy)}: lets everybody to {_name(workload)}"


def _lets(rules, key, labels, port):
    """Whether one of a policy's rules lets pods with these labels through to the port."""
    for rule in rules:
        if rule.get("ports") and port not in [p.get("port") for p in rule["ports"]]:
            continue
        peers = rule.get(key)
        if not peers or any("namespaceSelector" not in p and _selects(p.get("podSelector", {}), labels) for p in peers):
            return True
    return False


def _reached(documents, workload, container):
    """(Labels of pods, port) that the flags of a process lead to; a worker sends to workers, too."""
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    for name, value in arguments(container):
        for address in value.split(",") if name in ("state_store", "workers") else []:
            service = services.get(address.removeprefix("dns:").rpartition(":")[0].rpartition(".")[2])
            if service is not None:
                yield service["selector"], int(address.rpartition(":")[2])
        if name == "stage":
            port = dict(arguments(container))["listen"].rpartition(":")[2]
            yield workload["spec"]["template"]["metadata"]["labels"], int(port)


def connections(documents):
    """What flags lead to may be reached: out of here, by the policies of who calls, and into there."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]

    def allowed(labels, direction, key, peer, port):
        mine = [p for p in policies if _selects(p["podSelector"], labels) and direction in p["policyTypes"]]
        return not mine or any(_lets(p.get(direction.lower(), []), key, peer, port) for p in mine)

    for workload, _, container in _containers(documents):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        for selector, port in _reached(documents, workload, container):
            if not allowed(labels, "Egress", "to", selector, port):
                yield f"{_name(workload)}: no policy lets it out to {selector} at {port}"
            if not allowed(selector, "Ingress", "from", labels, port):
                yield f"{_name(workload)}: no policy of {selector} lets it in at {port}"
        out = {p.get("port") for policy in policies if _selects(policy["podSelector"], labels)
               for rule in policy.get("egress", []) for p in rule.get("ports", [])}
        if 53 not in out:
            yield f"{_name(workload)}: no policy lets it ask for names"
        collector = dict(arguments(container)).get("otlp_traces_endpoint")
        if collector is not None and int(collector.rpartition(":")[2]) not in out:
            yield f"{_name(workload)}: no policy lets it out to {collector}"


def hardening(documents):
    for workload, pod, container in _containers(documents):
        outside, inside = pod.get("securityContext", {}), container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": outside.get("runAsNonRoot") is True,
            "runAsUser 10001": outside.get("runAsUser") == 10001,
            "seccompProfile": outside.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "readOnlyRootFilesystem": inside.get("readOnlyRootFilesystem") is True,
            "no allowPrivilegeEscalation": inside.get("allowPrivilegeEscalation") is False,
            "drop ALL": inside.get("capabilities", {}).get("drop") == ["ALL"],
            "no service account token": pod.get("automountServiceAccountToken") is False,
        }
        for what, there in wanted.items():
            if not there:
                yield f"{_name(workload)}: {what} is missing"
        for mount in container.get("volumeMounts", []):
            if mount["name"] in ("model", "tls", "api-keys") and mount.get("readOnly") is not True:
                yield f"{_name(workload)}: the volume {mount['name']} is not read-only"


def resources(documents):
    for workload, _, container in _containers(documents):
        have = container.get("resources", {})
        for what in ("cpu", "memory"):
            if what not in have.get("requests", {}):
                yield f"{_name(workload)}: no request of {what}"
        if "memory" not in have.get("limits", {}):
            yield f"{_name(workload)}: no limit of memory"
        gpu = dict(arguments(container)).get("device", "").startswith("cuda")
        if gpu != ("nvidia.com/gpu" in have.get("limits", {})):
            yield f"{_name(workload)}: --device and nvidia.com/gpu do not agree"


def images(documents):
    """By digest, so that what was tested is what runs; what was built here by a name that no registry has."""
    for workload, _, container in _containers(documents):
        image = container["image"]
        if not image.startswith("localhost/") and not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield f"{_name(workload)}: the image {image} is not named by its digest"


def security_flags(documents):
    for workload, _, container in _containers(documents):
        names = [name for name, _ in arguments(container)]
        for flag in ("tls_certificate", "tls_key", "tls_authorities", "health_listen"):
            if flag not in names:
                yield f"{_name(workload)}: no --{flag}"


def flags(documents, known):
    """`known`: the flags of each command. Every flag exists, once."""
    for workload, _, container in _containers(documents):
        command = container["command"][0].rpartition("/")[2]
        names = [name for name, _ in arguments(container)]
        for name in names:
            if name not in known.get(command, ()):
                yield f"{_name(workload)}: {command} has no flag --{name}"
        for name in {n for n in names if names.count(n) > 1}:
            yield f"{_name(workload)}: --{name} stands there twice"


def replicas(documents):
    """Whole pipelines, and as many as routers: one without a pipeline is never ready, and a rollout waits for it."""
    counts = {w["metadata"]["name"]: w["spec"].get("replicas", 1) for w in workloads(documents)}
    fewest = {d["spec"]["scaleTargetRef"]["name"]: d["spec"].get("minReplicaCount", 0)
              for d in documents if d["kind"] == "ScaledObject"}
    for workload, _, container in _containers(documents):
        name, count = workload["metadata"]["name"], counts[workload["metadata"]["name"]]
        if name == "router" and count < 2:
            yield f"{_name(workload)}: one router is none while it restarts"
        stage = dict(arguments(container)).get("stage", "")
        if not stage.startswith("ordinal/"):
            continue
        stages = int(stage.removeprefix("ordinal/"))
        if count % stages:
            yield f"{_name(workload)}: {count} replicas make no whole pipelines of --stage={stage}"
        for what, workers in (("replicas", count), ("minReplicaCount", fewest.get(name, count))):
            if workers // stages < counts.get("router", 0):
                yield f"{_name(workload)}: {what} {workers} make fewer pipelines than {counts['router']} routers"


CHECKS = [schema, custom_resources, selectors, references, probes, grace, budgets, network, connections, hardening,
          resources, images, security_flags, replicas]


def check_all(documents, known):
    found = [(check.__name__, message) for check in CHECKS for message in check(documents)]
    return found + [("flags", message) for message in flags(documents, known)]

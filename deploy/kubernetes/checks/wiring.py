"""Names and ports that one manifest uses of another, or of its own."""
import re

from checks.manifests import arguments, containers, of_kind, pods, ports, selects, title, workloads

# Services that are looked up for the addresses of all pods; by processes, of those, too, that start or end.
HEADLESS = {"routers": False, "workers": True, "state-stores": True}


def namespaces(documents):
    """One for all: names are looked up, and policies hold, within it."""
    usual = workloads(documents)[0]["metadata"].get("namespace")
    for document in documents:
        mine = document["metadata"].get("namespace")
        if mine is None or mine != usual:
            yield f"{title(document)}: namespace {mine}, and that of the others is {usual}"


def selectors(documents):
    templates = [t["metadata"]["labels"] for _, t in pods(documents)]
    for workload, template in pods(documents):
        labels = template["metadata"]["labels"]
        if not selects(workload["spec"]["selector"], labels):
            yield f"{title(workload)}: its selector does not match its own template"
        if workload["metadata"]["name"] != labels.get("app.kubernetes.io/name"):
            yield f"{title(workload)}: its pods are labelled {labels.get('app.kubernetes.io/name')}"
        for other in workloads(documents):
            if other is not workload and selects(other["spec"]["selector"], labels):
                yield f"{title(other)}: its selector matches pods of {title(workload)}, too"
        monitors = of_kind(documents, "PodMonitor")
        if monitors and not any(selects(m["spec"]["selector"], labels) for m in monitors):
            yield f"{title(workload)}: no PodMonitor selects its pods"
    for document in documents:
        if document["kind"] == "Service":
            selector = {"matchLabels": document["spec"].get("selector", {})}
        elif document["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selector = document["spec"]["selector"]
        elif document["kind"] == "NetworkPolicy":
            selector = document["spec"]["podSelector"]
        else:
            continue
        if not any(selects(selector, labels) for labels in templates):
            yield f"{title(document)}: selects no pod"


def services(documents):
    """A Service leads to the port that processes listen at, by the same number: pods are reached by their own names."""
    encrypted = any("tls_certificate" in dict(arguments(c)) for _, _, c in containers(documents))
    for service in of_kind(documents, "Service"):
        spec, selector = service["spec"], {"matchLabels": service["spec"].get("selector", {})}
        for port in spec["ports"]:
            target = port.get("targetPort", port["port"])
            for _, template in pods(documents):
                if not selects(selector, template["metadata"]["labels"]):
                    continue
                there = ports(template["spec"]["containers"][0])
                number = there.get(target) if isinstance(target, str) else target
                if number != there.get("grpc") or number != port["port"]:
                    yield f"{title(service)}: port {port['port']} leads to {target}, and the pods have {there}"
            if encrypted and port.get("appProtocol") == "kubernetes.io/h2c":
                yield f"{title(service)}: h2c is not encrypted, and the processes are"
        peers = HEADLESS.get(service["metadata"]["name"])
        if (spec.get("clusterIP") == "None") != (peers is not None):
            yield f"{title(service)}: clusterIP {spec.get('clusterIP')}: whether single pods are found is for its users"
        if spec.get("publishNotReadyAddresses", False) != bool(peers):
            yield f"{title(service)}: processes ask each other while they start and end; clients ask who takes calls"
    for monitor in of_kind(documents, "PodMonitor"):
        for endpoint in monitor["spec"].get("podMetricsEndpoints") or [{}]:
            for workload, template in pods(documents):
                if (selects(monitor["spec"]["selector"], template["metadata"]["labels"])
                        and endpoint.get("port") not in ports(template["spec"]["containers"][0])):
                    yield f"{title(monitor)}: {title(workload)} has no port {endpoint.get('port')}"


def identities(documents):
    """Every process is called as its pod is: leases, logs and metrics name it, and a worker's stage follows from it."""
    for workload, _, container in containers(documents):
        if dict(arguments(container)).get("name") != "$(POD_NAME)":
            yield f"{title(workload)}: --name is not $(POD_NAME)"
        if [e["name"] for e in container.get("env", [])] != ["POD_NAME"]:
            yield f"{title(workload)}: its environment is POD_NAME, once: what else it is told are flags and files"
        known = {e["name"]: e.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                 for e in container.get("env", [])}
        for _, value in arguments(container):
            for variable in re.findall(r"\$\((\w+)\)", value):
                if known.get(variable) != "metadata.name":
                    yield f"{title(workload)}: $({variable}) is not the name of the pod"


def _pod_hosts(documents):
    """Names of the pods that have one."""
    for workload in workloads(documents):
        if workload["kind"] == "StatefulSet":
            for ordinal in range(workload["spec"].get("replicas", 1)):
                yield f'{workload["metadata"]["name"]}-{ordinal}.{workload["spec"]["serviceName"]}'


def _addresses(documents, workload, name, value):
    """What is wrong with --state_store and --workers."""
    known = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "Service")}
    addresses = [a.removeprefix("dns:").rpartition(":") for a in value.split(",")]
    for host, _, port in addresses:
        spec = known.get(host.rpartition(".")[2])
        if spec is None or port not in [str(p["port"]) for p in spec.get("ports", [])]:
            yield f"{title(workload)}: --{name}={value}: no Service with that port"
    named = sorted(host for host, _, _ in addresses if "." in host)
    there = sorted(host for host in _pod_hosts(documents) if named and
                   host.rpartition(".")[2] == named[0].rpartition(".")[2])
    if named != there:
        yield f"{title(workload)}: --{name} names {named}, and there are {there}"


def references(documents):
    """Names that one manifest uses of another."""
    known = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "Service")}
    accounts = {d["metadata"]["name"] for d in of_kind(documents, "ServiceAccount")}
    targets = {(d["kind"], d["metadata"]["name"]) for d in workloads(documents)}
    for workload, pod, container in containers(documents):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        if workload["kind"] == "StatefulSet":
            own = known.get(workload["spec"]["serviceName"], {"selector": {}})
            if not selects({"matchLabels": own.get("selector", {})}, labels):
                yield f"{title(workload)}: no Service {workload['spec']['serviceName']} of its pods"
        if pod.get("serviceAccountName") not in accounts:
            yield f"{title(workload)}: no ServiceAccount {pod.get('serviceAccountName')}"
        volumes = {v["name"] for v in pod.get("volumes", [])}
        volumes |= {v["metadata"]["name"] for v in workload["spec"].get("volumeClaimTemplates", [])}
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{title(workload)}: mounts a volume {mount['name']} that there is not"
        listened = ports(container)
        if len(set(listened.values())) != len(container.get("ports", [])):
            yield f"{title(workload)}: ports of one name or number: {listened}"
        if set(listened) != {"grpc", "metrics", "health"}:
            yield f"{title(workload)}: its ports are grpc, metrics and health, and here are {sorted(listened)}"
        for name, value in arguments(container):
            if name in ("state_store", "workers"):
                yield from _addresses(documents, workload, name, value)
            which = {"listen": "grpc", "metrics_listen": "metrics", "health_listen": "health"}.get(name)
            if which and value != f"0.0.0.0:{listened.get(which)}":
                yield f"{title(workload)}: --{name}={value}, and its port {which} is {listened.get(which)}"
            if value.startswith("/") and not any(value.startswith(m["mountPath"] + "/") for m in mounts):
                yield f"{title(workload)}: --{name}={value} is in no volume"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            port = container.get(probe, {}).get("grpc", {}).get("port")
            if port is not None and port != listened.get("health"):
                yield f"{title(workload)}: {probe} asks port {port}, which does not answer health"
    for scaled in of_kind(documents, "ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        if (target.get("kind", "Deployment"), target["name"]) not in targets or target.get("apiVersion") != "apps/v1":
            yield f"{title(scaled)}: scales {target['name']}, which there is not"

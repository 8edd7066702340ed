"""Who may connect to whom."""
from checks.manifests import arguments, containers, of_kind, pods, ports, selects, title

NAMES = 53  # The port of DNS.


def _of(documents, labels):
    return [p for p in of_kind(documents, "NetworkPolicy") if selects(p["spec"]["podSelector"], labels)]


def _is_nccl(policy, rule, key, documents):
    """Workers with GPUs meet each other at any port: nobody else does."""
    gpus = {w["metadata"]["name"] for w, _, c in containers(documents)
            if dict(arguments(c)).get("device", "").startswith("cuda")}
    own = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}} for name in gpus]
    return {"podSelector": policy["spec"]["podSelector"]} in own and bool(rule.get(key)) and all(
        peer in own for peer in rule[key])


def _rule(policy, direction, rule, documents):
    """A rule names ports and who is meant: pods, Prometheus, or the cluster's names."""
    key = "from" if direction == "Ingress" else "to"
    numbers = {p.get("port") for p in rule.get("ports", [])}
    if (not numbers or None in numbers) and not _is_nccl(policy, rule, key, documents):
        yield f"{title(policy)}: {direction} at every port"
    for port in rule.get("ports", []):
        if port.get("protocol", "TCP") != "TCP" and port.get("port") != NAMES:
            yield f"{title(policy)}: {port['protocol']} at {port.get('port')}, and the processes speak TCP"
    for peer in rule.get(key, []):
        space, pod = peer.get("namespaceSelector"), peer.get("podSelector")
        if NAMES in numbers:
            if space != {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}:
                yield f"{title(policy)}: names are those of kube-system, not of {peer}"
        elif pod is not None and not pod.get("matchLabels") or space == {} and not pod:
            yield f"{title(policy)}: {direction} for whole namespaces"
    ours = {number for _, _, container in containers(documents) for number in ports(container).values()}
    if direction == "Egress" and not rule.get(key) and numbers & (ours | {NAMES}):
        yield f"{title(policy)}: out to everybody at {sorted(numbers & (ours | {NAMES}))}"


# Who calls whom, by the name of the pods. Routers take calls of everybody, Prometheus comes by its own policy.
CALLERS = {"worker": {"router", "worker"}, "state-store": {"router", "worker"}}


def _named(peer):
    """The name of the pods that a peer is, of this namespace; None: others, or all."""
    labels = peer.get("podSelector", {}).get("matchLabels", {})
    return labels.get("app.kubernetes.io/name") if "namespaceSelector" not in peer and len(labels) == 1 else None


def _callers(policy, workload, there):
    """Nobody but who has to."""
    name = workload["metadata"]["name"]
    for rule in policy["spec"].get("ingress", []):
        numbers = {p.get("port") for p in rule.get("ports", [])}
        for peer in rule.get("from", []):
            if numbers == {there.get("metrics")}:
                if peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name") != "prometheus":
                    yield f"{title(policy)}: metrics are for Prometheus, not for {peer}"
            elif _named(peer) not in CALLERS.get(name, set()):
                yield f"{title(policy)}: lets {peer} to {title(workload)}"
    called = {target for target, callers in CALLERS.items() if name in callers}
    for rule in policy["spec"].get("egress", []):
        for peer in rule.get("to", []):
            if "namespaceSelector" not in peer and _named(peer) not in called:
                yield f"{title(policy)}: lets {title(workload)} out to {peer}"


def network(documents):
    """Every pod is closed but for what is said: both ways, and never to everybody inside on the processes' ports."""
    for workload, template in pods(documents):
        labels, there = template["metadata"]["labels"], ports(template["spec"]["containers"][0])
        mine = _of(documents, labels)
        if {t for p in mine for t in p["spec"]["policyTypes"]} != {"Ingress", "Egress"}:
            yield f"{title(workload)}: no NetworkPolicy closes it both ways"
        for_clients = False
        for policy in mine:
            yield from _callers(policy, workload, there)
            for rule in policy["spec"].get("ingress", []):
                numbers = [p.get("port") for p in rule.get("ports", [])]
                if not rule.get("from") and numbers == [there.get("grpc")]:
                    for_clients = True
                elif not rule.get("from"):
                    yield f"{title(policy)}: lets everybody to {title(workload)}"
                for number in numbers:
                    if number not in there.values():
                        yield f"{title(policy)}: {title(workload)} has no port {number}"
        if for_clients != (workload["metadata"]["name"] == "router"):
            yield f"{title(workload)}: routers alone take calls of everybody"
    for policy in of_kind(documents, "NetworkPolicy"):
        for direction in ("Ingress", "Egress"):
            rules = policy["spec"].get(direction.lower())
            if (rules is not None) != (direction in policy["spec"]["policyTypes"]):
                yield f"{title(policy)}: policyTypes and the rules for {direction} do not agree"
            for rule in rules or []:
                yield from _rule(policy, direction, rule, documents)


def _lets(rules, key, labels, port):
    """Whether one of a policy's rules lets pods with these labels through to the port."""
    for rule in rules:
        numbers = [p.get("port") for p in rule.get("ports", []) if p.get("protocol", "TCP") == "TCP"]
        if rule.get("ports") and port not in numbers:
            continue
        peers = rule.get(key)
        if not peers or any("namespaceSelector" not in p and selects(p.get("podSelector", {}), labels) for p in peers):
            return True
    return False


def _reached(documents, workload, container):
    """(Labels of pods, port) that the flags of a process lead to; a worker sends to workers, too."""
    services = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "Service")}
    for name, value in arguments(container):
        for address in value.split(",") if name in ("state_store", "workers") else []:
            service = services.get(address.removeprefix("dns:").rpartition(":")[0].rpartition(".")[2])
            port = address.rpartition(":")[2]
            if service is not None and port.isdigit():
                yield service.get("selector", {}), int(port)
        if name == "stage":
            yield workload["spec"]["template"]["metadata"]["labels"], ports(container).get("grpc")


def _outside(container):
    """Ports of others that the flags of a process lead to."""
    flags = dict(arguments(container))
    for name, usual in (("catalog", "5432"), ("s3_endpoint", "443"), ("otlp_traces_endpoint", "4317")):
        if "://" in flags.get(name, ""):
            where = flags[name].partition("://")[2].partition("/")[0].rpartition("@")[2]
            yield name, int(where.rpartition(":")[2] if ":" in where else usual)


def _lets_prometheus(policy, there):
    for rule in policy["spec"].get("ingress", []):
        if there.get("metrics") in [p.get("port") for p in rule.get("ports", [])]:
            for peer in rule.get("from", []):
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if "namespaceSelector" in peer and labels.get("app.kubernetes.io/name") == "prometheus":
                    return True
    return False


def connections(documents):
    """What flags lead to may be reached: out of here, by the policies of who calls, and into there."""
    def allowed(labels, direction, key, peer, port):
        mine = [p["spec"] for p in _of(documents, labels) if direction in p["spec"]["policyTypes"]]
        return not mine or any(_lets(p.get(direction.lower(), []), key, peer, port) for p in mine)

    for workload, _, container in containers(documents):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        for selector, port in _reached(documents, workload, container):
            if not allowed(labels, "Egress", "to", selector, port):
                yield f"{title(workload)}: no policy lets it out to {selector} at {port}"
            if not allowed(selector, "Ingress", "from", labels, port):
                yield f"{title(workload)}: no policy of {selector} lets it in at {port}"
        out = {(p.get("protocol", "TCP"), p.get("port")) for policy in _of(documents, labels)
               for rule in policy["spec"].get("egress", []) for p in rule.get("ports", [])}
        if not {("UDP", NAMES), ("TCP", NAMES)} <= out:
            yield f"{title(workload)}: no policy lets it ask for names"
        for name, port in _outside(container):
            if ("TCP", port) not in out:
                yield f"{title(workload)}: no policy lets it out to --{name}, port {port}"
        mine = _of(documents, labels)
        if of_kind(documents, "PodMonitor") and not any(_lets_prometheus(p, ports(container)) for p in mine):
            yield f"{title(workload)}: no policy lets Prometheus in at its metrics"

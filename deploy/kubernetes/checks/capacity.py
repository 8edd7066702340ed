"""What pods ask for, how many there are, and where they run."""
from checks.manifests import arguments, command, containers, of_kind, pods, quantity, selects, title, workloads


def resources(documents):
    for workload, _, container in containers(documents):
        have = container.get("resources", {})
        for part, needed in (("requests", ("cpu", "memory")), ("limits", ("memory",))):
            for what in needed:
                if not quantity(have.get(part, {}).get(what, "")):
                    yield f"{title(workload)}: {part} of {what} are {have.get(part, {}).get(what)}"
        asked, limit = (quantity(have.get(p, {}).get("memory", "")) or 0 for p in ("requests", "limits"))
        if asked > limit:
            yield f"{title(workload)}: asks for more memory than its limit"
        gpu = dict(arguments(container)).get("device", "").startswith("cuda")
        gpus = [have.get(part, {}).get("nvidia.com/gpu") for part in ("requests", "limits")]
        if gpus != (["1", "1"] if gpu else [None, None]):
            yield f"{title(workload)}: --device and nvidia.com/gpu do not agree: {gpus}"


def spread(documents):
    """Over machines and zones, where there are several."""
    for workload, template in pods(documents):
        constraints = template["spec"].get("topologySpreadConstraints", [])
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone"):
            mine = [c for c in constraints if c.get("topologyKey") == key]
            if len(mine) != 1 or mine[0].get("maxSkew") != 1:
                yield f"{title(workload)}: is not spread evenly over {key}"
            elif not selects(mine[0].get("labelSelector", {}), template["metadata"]["labels"]):
                yield f"{title(workload)}: is spread over {key} by what others run"
            elif mine[0].get("whenUnsatisfiable") != "ScheduleAnyway":
                yield f"{title(workload)}: does not start where there is but one {key}"
        if len(constraints) != 2:
            yield f"{title(workload)}: is spread over machines and zones, and nothing else"


def _stages(documents):
    """(Workload, number of stages) of workers."""
    for workload, _, container in containers(documents):
        if command(container) != "worker":
            continue
        kind, _, count = dict(arguments(container)).get("stage", "").partition("/")
        if kind != "ordinal" or not count.isdigit() or int(count) < 1:
            yield workload, None
        else:
            yield workload, int(count)


def replicas(documents):
    """Whole pipelines, and as many as routers: one without a pipeline is never ready, and a rollout waits for it."""
    counts = {w["metadata"]["name"]: w["spec"].get("replicas", 1) for w in workloads(documents)}
    if counts.get("router", 0) < 2:
        yield "Deployment/router: one router is none while it restarts"
    for workload in workloads(documents):
        if counts[workload["metadata"]["name"]] < 1:
            yield f"{title(workload)}: nothing runs"
    if not of_kind(documents, "StatefulSet") or "state-store" not in counts:
        yield "no state-store"
    for workload, _, container in containers(documents):
        if "data_dir" in dict(arguments(container)):
            if workload["spec"].get("replicas", 1) != 1 or not workload["spec"].get("volumeClaimTemplates"):
                yield f"{title(workload)}: an embedded store is one, with a volume of its own"
    for workload, stages in _stages(documents):
        count = counts[workload["metadata"]["name"]]
        if stages is None:
            yield f"{title(workload)}: --stage has to be ordinal/S, a pod's own by its number"
        elif count % stages:
            yield f"{title(workload)}: {count} replicas make no whole pipelines of {stages} stages"
        elif count // stages < counts.get("router", 0):
            yield f"{title(workload)}: replicas {count} make fewer pipelines than {counts['router']} routers"


def scaling(documents):
    """By whole pipelines, at least as many as routers, by a number that Prometheus has."""
    counts = {w["metadata"]["name"]: w["spec"].get("replicas", 1) for w in workloads(documents)}
    stages = {w["metadata"]["name"]: s for w, s in _stages(documents)}
    records = {rule["record"] for d in of_kind(documents, "PrometheusRule")
               for g in d["spec"].get("groups", []) for rule in g.get("rules", []) if "record" in rule}
    for scaled in of_kind(documents, "ScaledObject"):
        spec, target = scaled["spec"], scaled["spec"]["scaleTargetRef"]["name"]
        least, most = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
        for what, workers in (("minReplicaCount", least), ("maxReplicaCount", most)):
            if stages.get(target) and workers % stages[target]:
                yield f"{title(scaled)}: {what} {workers} make no whole pipelines of {stages[target]} stages"
        if stages.get(target) and least // stages[target] < counts.get("router", 0):
            yield f"{title(scaled)}: minReplicaCount {least} make fewer pipelines than {counts['router']} routers"
        if not least <= counts.get(target, 0) <= most:
            yield f"{title(scaled)}: {counts.get(target)} replicas are not within {least} and {most}"
        if spec.get("cooldownPeriod", 300) < 60 or not 5 <= spec.get("pollingInterval", 30) <= 60:
            yield f"{title(scaled)}: pipelines come and go faster than they start, or too late"
        if not spec.get("triggers"):
            yield f"{title(scaled)}: nothing triggers it"
        for trigger in spec.get("triggers", []):
            fields = trigger.get("metadata", {})
            if trigger.get("type") != "prometheus" or not fields.get("serverAddress", "").startswith("http://"):
                yield f"{title(scaled)}: asks no Prometheus"
            if fields.get("query") not in records:
                yield f"{title(scaled)}: {fields.get('query')} is none of the recording rules"
            if fields.get("threshold") != "1" or trigger.get("metricType", "AverageValue") != "AverageValue":
                yield f"{title(scaled)}: the rule gives workers, so the threshold is one a worker"
            if fields.get("ignoreNullValues") != "false":
                yield f"{title(scaled)}: no result would count as zero"

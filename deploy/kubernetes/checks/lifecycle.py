"""How pods start, are found alive, are replaced and end."""
from checks.manifests import arguments, containers, of_kind, pods, seconds, selects, title

# Of each probe: the least and the most seconds until its verdict, periodSeconds * failureThreshold. A start may take
# as long as a file takes to be read; a busy process is alive; what takes no work is left soon.
WINDOWS = {"startupProbe": (60, 3600), "livenessProbe": (30, 300), "readinessProbe": (2, 15)}


def probes(documents):
    """Three that differ: a process that waits for others is not restarted, one that hangs gets no work."""
    for workload, _, container in containers(documents):
        missing = [p for p in WINDOWS if "grpc" not in container.get(p, {})]
        if missing:
            yield f"{title(workload)}: no {', '.join(missing)}"
            continue
        live, ready = container["livenessProbe"]["grpc"], container["readinessProbe"]["grpc"]
        if live.get("service") != "live" or container["startupProbe"]["grpc"].get("service") != "live":
            yield f"{title(workload)}: startup and liveness have to ask for the service live"
        if ready.get("service", "") != "":
            yield f"{title(workload)}: readiness has to ask for the process as a whole, service \"\""
        for probe, (least, most) in WINDOWS.items():
            period, failures = container[probe].get("periodSeconds", 10), container[probe].get("failureThreshold", 3)
            if not least <= period * failures <= most or failures < 2:
                yield (f"{title(workload)}: {probe} decides after {failures} times {period} s; "
                       f"it has to be twice at least, and {least} to {most} s")
        if any(container[probe].get("timeoutSeconds", 1) < 1 for probe in WINDOWS):
            yield f"{title(workload)}: a probe without time for an answer"
        if container["livenessProbe"].get("timeoutSeconds", 1) < 3:
            yield f"{title(workload)}: a busy machine may take seconds to answer a livenessProbe"


def grace(documents):
    """Between SIGTERM and SIGKILL there has to be time for preStop, the drain and its end."""
    for workload, pod, container in containers(documents):
        drain = seconds(dict(arguments(container)).get("drain_timeout", ""))
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        have = pod.get("terminationGracePeriodSeconds", 30)
        if drain is None:
            yield f"{title(workload)}: no --drain_timeout in seconds"
        elif have <= before + drain + 5:
            yield f"{title(workload)}: {have} s of grace for {before} s of preStop and {drain} s of drain"
        elif drain < 5:
            yield f"{title(workload)}: {drain} s of drain: states are not saved in that"
        # Whoever is found by a Service with an address of its own serves on until it is out of the endpoints.
        labels = workload["spec"]["template"]["metadata"]["labels"]
        found = [s for s in of_kind(documents, "Service") if s["spec"].get("clusterIP") != "None"
                 and selects({"matchLabels": s["spec"].get("selector", {})}, labels)]
        if found and before < 2 and workload["spec"].get("replicas", 1) > 1:
            yield f"{title(workload)}: no preStop, so {title(found[0])} sends calls to pods that have ended"


def rollouts(documents):
    """Pods are replaced one by one, the next when the last one is ready; a pipeline's stages start together."""
    for workload, _ in pods(documents):
        spec = workload["spec"]
        if workload["kind"] == "Deployment":
            strategy = spec.get("strategy", {})
            rolling = strategy.get("rollingUpdate", {})
            if strategy.get("type") != "RollingUpdate" or rolling != {"maxSurge": 0, "maxUnavailable": 1}:
                yield (f"{title(workload)}: strategy {strategy}: a router beyond the pipelines is never ready, "
                       "so one has to go before the new one comes, and no more than one at a time")
        elif spec.get("updateStrategy", {}).get("type", "RollingUpdate") != "RollingUpdate":
            yield f"{title(workload)}: updateStrategy {spec['updateStrategy']}: a rollout would do nothing"
        if spec.get("replicas", 1) > 1 and spec.get("minReadySeconds", 0) < 2:
            yield f"{title(workload)}: no minReadySeconds: the next goes before the last one has got work"
        if (workload["kind"] == "StatefulSet" and spec.get("replicas", 1) > 1
                and spec.get("podManagementPolicy") != "Parallel"):
            yield f"{title(workload)}: not Parallel, so one that does not get ready keeps all others from starting"


def budgets(documents):
    for workload, template in pods(documents):
        mine = [d for d in of_kind(documents, "PodDisruptionBudget")
                if selects(d["spec"]["selector"], template["metadata"]["labels"])]
        if len(mine) != 1:
            yield f"{title(workload)}: {len(mine)} PodDisruptionBudgets"
        for budget in mine:
            if "minAvailable" in budget["spec"] or budget["spec"].get("maxUnavailable") != 1:
                yield f"{title(budget)}: maxUnavailable has to be 1: anything else blocks drains or stops pipelines"
            if budget["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
                yield f"{title(budget)}: a pod that is not ready could keep its node from being drained"

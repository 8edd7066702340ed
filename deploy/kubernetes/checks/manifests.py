"""What is read out of manifests, as kustomize renders them: a list of documents."""
import re


def group(document):
    api = document["apiVersion"]
    return api.split("/")[0] if "/" in api else ""


def title(document):
    return f'{document.get("kind")}/{document.get("metadata", {}).get("name")}'


def of_kind(documents, *kinds):
    return [d for d in documents if d["kind"] in kinds]


def workloads(documents):
    return of_kind(documents, "Deployment", "StatefulSet")


def pods(documents):
    for workload in workloads(documents):
        yield workload, workload["spec"]["template"]


def containers(documents):
    for workload, template in pods(documents):
        for container in template["spec"]["containers"]:
            yield workload, template["spec"], container


def arguments(container):
    """--name=value arguments as a list of pairs."""
    pairs = []
    for argument in container.get("args", []):
        name, _, value = argument.lstrip("-").partition("=")
        pairs.append((name, value))
    return pairs


def command(container):
    return (container.get("command") or [""])[0].rpartition("/")[2]


def ports(container):
    return {p.get("name", ""): p["containerPort"] for p in container.get("ports", [])}


def selects(selector, labels):
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and all(labels.get(k) == v for k, v in wanted.items())


def seconds(text):
    match = re.fullmatch(r"(\d+)(s|m)", text)
    return int(match[1]) * (60 if match[2] == "m" else 1) if match else None


def quantity(text):
    """A Kubernetes quantity as a number, or None."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i)?", str(text))
    if not match:
        return None
    unit = match[2] or ""
    if unit == "m":
        return float(match[1]) / 1000
    base = 1024 if unit.endswith("i") else 1000
    return float(match[1]) * base ** ("KMGTPE".index(unit[0].upper()) + 1 if unit else 0)

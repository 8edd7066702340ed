"""Whether the API server, and the operators whose kinds are used, would take them."""
import importlib

from checks.manifests import group, title

SCHEMA_VERSIONS = ["1.30.0", "1.37.0"]
CUSTOM_GROUPS = {
    "monitoring.coreos.com": "cloudcoil.models.prometheus_operator",
    "keda.sh": "cloudcoil.models.keda",
    "cert-manager.io": "cloudcoil.models.cert_manager",
}
_WORKLOAD = ["spec.template.metadata.labels", "spec.template.spec.containers"]
NEEDED = {
    "Deployment": _WORKLOAD,
    "StatefulSet": _WORKLOAD,
    "Service": ["spec.selector", "spec.ports"],
    "PodDisruptionBudget": ["spec.selector.matchLabels"],
    "NetworkPolicy": ["spec.podSelector.matchLabels", "spec.policyTypes"],
}


def schema(documents):
    import kubernetes_validate

    for document in documents:
        if missing := [field for field in ("apiVersion", "kind") if not isinstance(document.get(field), str)]:
            yield f"{title(document)}: no {missing[0]}"
            continue
        if not document.get("metadata", {}).get("name"):
            yield f"{title(document)}: no metadata.name"
        if group(document) in CUSTOM_GROUPS:
            continue
        for version in SCHEMA_VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = "/".join(str(part) for part in error.path)
                yield f"{title(document)} at {version}: {where}: {error.message[:200]}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{title(document)}: no schema of that kind and version: {error}"
        yield from _absent(document)


def _absent(document):
    """What the schemas leave out and whoever reads on does not."""
    for path in NEEDED.get(document["kind"], []):
        found = document
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not found:
            yield f"{title(document)}: no {path}"


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
        module = CUSTOM_GROUPS.get(group(document))
        if module is None:
            continue
        version = document["apiVersion"].split("/")[-1]
        try:
            model = getattr(importlib.import_module(f"{module}.{version}"), document["kind"])
        except (ImportError, AttributeError):
            yield f"{title(document)}: {document['apiVersion']} has no such kind"
            continue
        try:
            kept = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            yield f"{title(document)}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            continue
        if "spec" not in document:
            yield f"{title(document)}: no spec"
        for path in _lost(document.get("spec", {}), kept.get("spec", {}), "spec"):
            yield f"{title(document)}: unknown field {path}"

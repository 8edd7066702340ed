"""What a process may do, what it is told, and from which image it comes."""
import re

from checks.manifests import arguments, command, containers, of_kind, title

# What each program cannot do without, or would do otherwise than a cluster means it: flags, `|` between either.
NEEDED = {
    "router": ["listen", "metrics_listen", "health_listen", "workers", "state_store", "tokenizer", "api_keys"],
    "worker": ["listen", "metrics_listen", "health_listen", "stage", "model", "state_store", "slots"],
    "state_store": ["listen", "metrics_listen", "health_listen", "data_dir|catalog", "data_dir|records"],
}
# What secrets and claims hold: README.md, services/docs/operating.md.
FILES = {
    **{f"{role}-tls": {"tls.crt", "tls.key", "ca.crt"} for role in ("router", "worker", "state-store")},
    "api-keys": {"api_keys", "tenants"},
    "state-store-backends": {"catalog_password", "s3_credentials"},
    "model": {"model", "tokenizer"},
}
# Which of them a workload may read, besides the certificate of its role.
OWN = {"router": {"api-keys"}, "worker": set(), "state-store": {"state-store-backends"}}
ROLES = {"router-tls": "router", "worker-tls": "worker", "state-store-tls": "store", "operator-tls": "operator"}
TLS_FLAGS = {"tls_certificate": "tls.crt", "tls_key": "tls.key", "tls_authorities": "ca.crt"}


def hardening(documents):
    for workload, pod, container in containers(documents):
        outside, inside = pod.get("securityContext", {}), container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": outside.get("runAsNonRoot") is True,
            "runAsUser 10001": outside.get("runAsUser") == 10001,
            "runAsGroup 10001": outside.get("runAsGroup") == 10001,
            "fsGroup 10001, which reads the secrets": outside.get("fsGroup") == 10001,
            "fsGroupChangePolicy, or a start walks through a whole store": outside.get("fsGroupChangePolicy")
            == "OnRootMismatch",
            "seccompProfile": outside.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "readOnlyRootFilesystem": inside.get("readOnlyRootFilesystem") is True,
            "no allowPrivilegeEscalation": inside.get("allowPrivilegeEscalation") is False,
            "drop ALL": inside.get("capabilities", {}) == {"drop": ["ALL"]},
            "no service account token": pod.get("automountServiceAccountToken") is False,
            "no enableServiceLinks": pod.get("enableServiceLinks") is False,
        }
        for what, there in wanted.items():
            if not there:
                yield f"{title(workload)}: {what} is missing"
        for own in ("runAsUser", "runAsGroup", "runAsNonRoot", "privileged", "seccompProfile"):
            if own in inside:
                yield f"{title(workload)}: {own} of the container overrides that of the pod"
        for shared in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            if pod.get(shared):
                yield f"{title(workload)}: {shared}"
    for account in of_kind(documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)}: gives a token to processes that do not talk to the Kubernetes API"


def volumes(documents):
    """Secrets and models are read only, a secret by its process alone, the certificate that of its role."""
    for workload, pod, container in containers(documents):
        mounts = {m["name"]: m for m in container.get("volumeMounts", [])}
        for volume in pod.get("volumes", []):
            if set(volume) - {"name"} not in ({"secret"}, {"persistentVolumeClaim"}):
                yield f"{title(workload)}: the volume {volume['name']} is neither a secret nor a claim"
            if volume["name"] not in mounts:
                yield f"{title(workload)}: the volume {volume['name']} is not mounted"
            elif mounts[volume["name"]].get("readOnly") is not True:
                yield f"{title(workload)}: the volume {volume['name']} is not read-only"
            claim, secret = volume.get("persistentVolumeClaim"), volume.get("secret")
            if claim is not None and claim.get("readOnly") is not True:
                yield f"{title(workload)}: the claim {claim.get('claimName')} is not read-only"
            if secret is not None and secret.get("defaultMode", 0o644) != 0o440:
                yield f"{title(workload)}: everybody in the pod may read the secret of {volume['name']}"
            source = (claim or {}).get("claimName") or (secret or {}).get("secretName")
            folder = mounts.get(volume["name"], {}).get("mountPath", "") + "/"
            for name, value in arguments(container):
                if value.startswith(folder) and value.removeprefix(folder) not in FILES.get(source, ()):
                    yield f"{title(workload)}: --{name}={value}: {source} has no such file"
            name = workload["metadata"]["name"]
            if volume["name"] == "tls" and (secret or {}).get("secretName") != f"{name}-tls":
                yield f"{title(workload)}: its certificate is not that of its role, {name}-tls"
            if secret is not None and secret.get("secretName") not in OWN.get(name, set()) | {f"{name}-tls"}:
                yield f"{title(workload)}: the secret {secret.get('secretName')} is not its own"
        places = [(m["name"], m.get("mountPath")) for m in container.get("volumeMounts", [])]
        for name, place in places:
            if place != f"/{name}" or [n for n, _ in places].count(name) > 1:
                yield f"{title(workload)}: {name} belongs to /{name}, once, and is at {place}"
    claims = {v["persistentVolumeClaim"]["claimName"] for _, pod, _ in containers(documents)
              for v in pod.get("volumes", []) if "persistentVolumeClaim" in v}
    if len(claims) > 1:
        yield f"routers and workers read other claims: {sorted(claims)}"


def _hours(text):
    match = re.fullmatch(r"(\d+)h", text)
    return int(match[1]) if match else 0


def _issuers(documents):
    """Every certificate's issuer is there, and every authority's own certificate."""
    issued = {d["spec"]["secretName"]: d["spec"] for d in of_kind(documents, "Certificate")}
    issuers = {(d["kind"], d["metadata"]["name"]) for d in of_kind(documents, "Issuer", "ClusterIssuer")}
    for certificate in of_kind(documents, "Certificate"):
        spec = certificate["spec"]
        by = (spec["issuerRef"].get("kind", "Issuer"), spec["issuerRef"]["name"])
        if by not in issuers:
            yield f"{title(certificate)}: no {'/'.join(by)}"
        lasts, early = _hours(spec.get("duration", "2160h")), _hours(spec.get("renewBefore", "720h"))
        if not 0 < early < lasts or early < 168:
            yield f"{title(certificate)}: {lasts} h, renewed {early} h before: the alert comes a week before its end"
    for issuer in of_kind(documents, "Issuer"):
        if "selfSigned" in issuer["spec"]:
            continue
        authority = issued.get(issuer["spec"].get("ca", {}).get("secretName"))
        if authority is None or authority.get("isCA") is not True:
            yield f"{title(issuer)}: no Certificate of an authority makes its secret"


def certificates(documents):
    """One of each role, for the secret that the workload reads, with the identity that others know it by."""
    issued = {d["spec"]["secretName"]: d["spec"] for d in of_kind(documents, "Certificate")}
    if not issued:
        return
    yield from _issuers(documents)
    for secret, role in ROLES.items():
        spec = issued.get(secret)
        if spec is None:
            yield f"no Certificate for {secret}"
            continue
        if [bool(re.fullmatch(rf"spiffe://[^/]+/rwkv/{role}", uri)) for uri in spec.get("uris", [])] != [True]:
            yield f"{secret}: its URIs {spec.get('uris')} are not of the role {role}, and of no other"
        if sorted(spec.get("usages", [])) != ["client auth", "digital signature", "server auth"]:
            yield f"{secret}: servers call each other, so it is for both, and no more: {spec.get('usages')}"
        if spec.get("isCA"):
            yield f"{secret}: whoever has it could sign certificates of any role"
        if any(name.endswith(".rwkv.internal") or "*" in name for name in spec.get("dnsNames", [])):
            yield f"{secret}: a name says a role, too, or more than its own: {spec.get('dnsNames')}"
        if role == "router":
            behind = {d["metadata"]["name"] for d in of_kind(documents, "Service")
                      if d["spec"]["selector"].get("app.kubernetes.io/name") == "router"}
            if not behind <= set(spec.get("dnsNames", [])):
                yield f"{secret}: clients know it as {sorted(behind)}, it is for {spec.get('dnsNames')}"


def images(documents):
    """By digest, so that what was tested is what runs; what was built here by a name that no registry has."""
    for workload, _, container in containers(documents):
        image = container.get("image", "")
        if not image.startswith("localhost/") and not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield f"{title(workload)}: the image {image} is not named by its digest"


def security_flags(documents):
    for workload, _, container in containers(documents):
        values = dict(arguments(container))
        for flag, file in TLS_FLAGS.items():
            if values.get(flag, "").rpartition("/")[2] != file:
                yield f"{title(workload)}: --{flag} is not {file} of its secret"


def programs(documents):
    """One container a pod, with one of the programs, and the flags that it needs."""
    for workload, pod, container in containers(documents):
        if len(pod["containers"]) != 1 or container["name"] != workload["metadata"]["name"]:
            yield f"{title(workload)}: one container of its own name is what a pod has"
        have = {name for name, value in arguments(container) if value}
        if command(container) not in NEEDED or len(container["command"]) != 1:
            yield f"{title(workload)}: {container.get('command')} is none of our programs"
        for flag in NEEDED.get(command(container), []):
            if not have & set(flag.split("|")):
                yield f"{title(workload)}: no --{flag.replace('|', ' and no --')}"
        if "catalog" in have and not {"catalog_password_file", "s3_endpoint", "s3_credentials_file"} <= have:
            yield f"{title(workload)}: stores that share name a password, an S3 and its credentials"


def flags(documents, known):
    """`known`: the flags of each command. Every flag exists, once."""
    for workload, _, container in containers(documents):
        names = [name for name, _ in arguments(container)]
        for name in names:
            if name not in known.get(command(container), ()):
                yield f"{title(workload)}: {command(container)} has no flag --{name}"
        for name in {n for n in names if names.count(n) > 1}:
            yield f"{title(workload)}: --{name} stands there twice"

"""Parts that the manifests may have. What the schemas know and this does not is a part that no check looks at: an init
container, a port of the machine, a Service of type LoadBalancer, a claim that goes with its workload, a second kind of
workload. Whoever adds one here adds what has to hold of it to the checks.
"""
from checks.manifests import title

ANY = object()
_META = {"name": ANY, "namespace": ANY, "labels": ANY}
_SELECTOR = {"matchLabels": ANY}
_PROBE = {"grpc": {"port": ANY, "service": ANY}, "periodSeconds": ANY, "timeoutSeconds": ANY, "failureThreshold": ANY}
_CONTAINER = {
    "name": ANY, "image": ANY, "imagePullPolicy": ANY, "command": ANY, "args": ANY,
    "env": {"name": ANY, "valueFrom": {"fieldRef": {"fieldPath": ANY}}},
    "ports": {"name": ANY, "containerPort": ANY},
    "startupProbe": _PROBE, "livenessProbe": _PROBE, "readinessProbe": _PROBE,
    "lifecycle": {"preStop": {"sleep": {"seconds": ANY}}},
    "resources": {"requests": ANY, "limits": ANY},
    "securityContext": {"allowPrivilegeEscalation": ANY, "readOnlyRootFilesystem": ANY, "capabilities": {"drop": ANY},
                        # Refused by the check `hardening`, with words.
                        "runAsUser": ANY, "runAsGroup": ANY, "runAsNonRoot": ANY, "privileged": ANY,
                        "seccompProfile": ANY},
    "volumeMounts": {"name": ANY, "mountPath": ANY, "readOnly": ANY},
}
_POD = {
    "serviceAccountName": ANY, "automountServiceAccountToken": ANY, "enableServiceLinks": ANY,
    "securityContext": {"runAsNonRoot": ANY, "runAsUser": ANY, "runAsGroup": ANY, "fsGroup": ANY,
                        "fsGroupChangePolicy": ANY, "seccompProfile": {"type": ANY}},
    "terminationGracePeriodSeconds": ANY,
    "topologySpreadConstraints": {"maxSkew": ANY, "topologyKey": ANY, "whenUnsatisfiable": ANY,
                                  "labelSelector": _SELECTOR},
    "containers": _CONTAINER,
    "volumes": {"name": ANY, "secret": {"secretName": ANY, "defaultMode": ANY},
                "persistentVolumeClaim": {"claimName": ANY, "readOnly": ANY}},
    # Refused by the check `hardening`, with words.
    "hostNetwork": ANY, "hostPID": ANY, "hostIPC": ANY, "shareProcessNamespace": ANY,
    # Where it runs, and what may pull its image, is the operator's affair.
    "affinity": ANY, "imagePullSecrets": ANY, "nodeSelector": ANY, "priorityClassName": ANY, "tolerations": ANY,
}
_TEMPLATE = {"metadata": {"labels": ANY}, "spec": _POD}
_PORTS = {"protocol": ANY, "port": ANY}
_PEER = {"podSelector": _SELECTOR, "namespaceSelector": _SELECTOR}
SPECS = {
    "Deployment": {"replicas": ANY, "minReadySeconds": ANY, "selector": _SELECTOR, "template": _TEMPLATE,
                   "strategy": {"type": ANY, "rollingUpdate": {"maxSurge": ANY, "maxUnavailable": ANY}}},
    "StatefulSet": {"replicas": ANY, "minReadySeconds": ANY, "selector": _SELECTOR, "template": _TEMPLATE,
                    "serviceName": ANY, "podManagementPolicy": ANY, "updateStrategy": {"type": ANY},
                    "volumeClaimTemplates": {"metadata": _META, "spec": {"accessModes": ANY, "resources": ANY,
                                                                         "storageClassName": ANY}}},
    "Service": {"selector": ANY, "clusterIP": ANY, "publishNotReadyAddresses": ANY,
                "ports": {"name": ANY, "port": ANY, "targetPort": ANY, "protocol": ANY, "appProtocol": ANY}},
    "NetworkPolicy": {"podSelector": _SELECTOR, "policyTypes": ANY, "ingress": {"from": _PEER, "ports": _PORTS},
                      "egress": {"to": _PEER, "ports": _PORTS}},
    "PodDisruptionBudget": {"selector": _SELECTOR, "maxUnavailable": ANY, "unhealthyPodEvictionPolicy": ANY,
                            "minAvailable": ANY},  # Refused by the check `budgets`, with words.
    "ScaledObject": {"scaleTargetRef": {"apiVersion": ANY, "kind": ANY, "name": ANY}, "minReplicaCount": ANY,
                     "maxReplicaCount": ANY, "pollingInterval": ANY, "cooldownPeriod": ANY,
                     "triggers": {"type": ANY, "metricType": ANY,
                                  "metadata": {"serverAddress": ANY, "query": ANY, "threshold": ANY,
                                               "ignoreNullValues": ANY}}},
    "PodMonitor": {"selector": _SELECTOR, "podMetricsEndpoints": {"port": ANY, "interval": ANY}},
    "PrometheusRule": {"groups": {"name": ANY, "rules": {"record": ANY, "alert": ANY, "expr": ANY, "for": ANY,
                                                         "labels": ANY, "annotations": ANY}}},
    "Certificate": {"secretName": ANY, "isCA": ANY, "commonName": ANY, "duration": ANY, "renewBefore": ANY,
                    "privateKey": {"algorithm": ANY, "size": ANY, "rotationPolicy": ANY}, "usages": ANY, "uris": ANY,
                    "dnsNames": ANY, "issuerRef": {"name": ANY, "kind": ANY}},
    "Issuer": {"selfSigned": ANY, "ca": {"secretName": ANY}},
}


def _unknown(value, shape, path):
    if shape is ANY:
        return
    for element in value if isinstance(value, list) else [value]:
        for key, below in element.items() if isinstance(element, dict) else ():
            if key not in shape:
                yield f"{path}.{key}"
            else:
                yield from _unknown(below, shape[key], f"{path}.{key}")


def parts(documents):
    for document in documents:
        kind = document["kind"]
        if kind == "ServiceAccount":
            shape = {"apiVersion": ANY, "kind": ANY, "metadata": _META, "automountServiceAccountToken": ANY}
        elif kind in SPECS:
            shape = {"apiVersion": ANY, "kind": ANY, "metadata": _META, "spec": SPECS[kind]}
        else:
            yield f"{title(document)}: no check knows this kind"
            continue
        for path in _unknown(document, shape, ""):
            yield f"{title(document)}: no check knows the part {path[1:]}"

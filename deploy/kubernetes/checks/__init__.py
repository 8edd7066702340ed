"""Checks of rendered manifests. Each has a name, and says what it found; none needs a cluster.

A manifest is a list of documents as kustomize renders them. `check_all` gives (check, message) pairs. What the API
server would refuse is told alone: the others read fields that it demands.
"""
from checks.capacity import replicas, resources, scaling, spread
from checks.lifecycle import budgets, grace, probes, rollouts
from checks.network import connections, network
from checks.parts import parts
from checks.schemas import custom_resources, schema
from checks.security import certificates, flags, hardening, images, programs, security_flags, volumes
from checks.wiring import identities, namespaces, references, selectors, services

SCHEMAS = [schema, custom_resources]
CHECKS = [parts, namespaces, selectors, services, identities, references, probes, grace, rollouts, budgets, network,
          connections, hardening, volumes, certificates, images, security_flags, programs, resources, spread, replicas,
          scaling]


def check_all(documents, known):
    """`known`: the flags of each program."""
    refused = [(check.__name__, message) for check in SCHEMAS for message in check(documents)]
    if refused:
        return refused
    found = [(check.__name__, message) for check in CHECKS for message in check(documents)]
    return found + [("flags", message) for message in flags(documents, known)]

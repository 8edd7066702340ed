"""Namespaces of a test's own: network, mounts, processes. What it starts ends with it and disturbs nothing outside."""
import os
import subprocess
import sys

INSIDE = "RWKV_CONTROL_PLANEINSIDE"


def _unshare():
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return command if os.getuid() == 0 else command + ["--map-root-user"]


def why_not():
    """None, or why this machine does not let us have namespaces, a bridge and pairs of network devices."""
    script = "ip link set lo up && ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1 && " \
        "mount -t tmpfs tmpfs /run && ip netns add try"
    try:
        tried = subprocess.run(_unshare() + ["sh", "-c", script], capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        return str(error)
    return None if tried.returncode == 0 else f"no namespaces of its own: {tried.stderr.strip()}"


def enter():
    """Returns in a process inside; the one outside waits for it, and ends as it does."""
    if os.environ.get(INSIDE) and os.getpid() == 1:
        return
    os.environ[INSIDE] = "1"
    sys.exit(subprocess.run(_unshare() + [sys.executable, *sys.argv], stdin=subprocess.DEVNULL).returncode)

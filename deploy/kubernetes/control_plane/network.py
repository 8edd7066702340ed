"""The pods' network: a bridge, a network namespace a pod, names of Services and pods (DNS), and addresses of Services.

A Service's own address is served by a proxy, which gives each connection to a ready pod by chance. Without a ready pod
connections are refused, as kube-proxy does it.
"""
import asyncio
import random
import socket
import struct
import subprocess
import threading

from control_plane import Watch

BRIDGE, GATEWAY, PODS, SERVICES, DNS = "pods", "10.244.0.1", "10.244.0.0/16", "10.96.0.0/24", "10.96.0.254"
DOMAIN = "cluster.local"
TTL = 5  # Seconds, CoreDNS's own.


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {result.stderr.strip()}")


def subsets(endpoints, port_name):
    """(address, target name or None, port) of each ready one."""
    for subset in endpoints.get("subsets") or []:
        port = next((p["port"] for p in subset.get("ports") or [] if p.get("name") == port_name), None)
        for address in subset.get("addresses") or []:
            yield address["ip"], address.get("hostname"), port


class Network:
    def __init__(self, api):
        run("ip", "link", "set", "lo", "up")
        # `ip netns` keeps its names there.
        run("mount", "-t", "tmpfs", "tmpfs", "/run")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        run("ip", "route", "add", "local", SERVICES, "dev", "lo")
        self._next = 1
        self._lock = threading.Lock()
        self._names = {}
        dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        dns.bind((DNS, 53))
        threading.Thread(target=self._answer_names, args=(dns,), daemon=True).start()
        self._loop = asyncio.new_event_loop()
        self._listeners, self._backends = {}, {}
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._services = Watch(api, "/api/v1/services", self._changed)
        self._endpoints = Watch(api, "/api/v1/endpoints", self._changed)
        self._services.start()
        self._endpoints.start()

    # ---- Pods. ------------------------------------------------------------------------------------------------------
    def add_pod(self):
        """(name of a network namespace, address) of a new pod; addresses do not come twice."""
        with self._lock:
            self._next += 1
            number = self._next
        name, address = f"pod{number}", f"10.244.{number // 250}.{number % 250 + 1}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"veth{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", f"veth{number}", "master", BRIDGE, "up")
        for command in (["link", "set", "lo", "up"], ["address", "add", f"{address}/16", "dev", "eth0"],
                        ["link", "set", "eth0", "up"], ["route", "add", "default", "via", GATEWAY]):
            run("ip", "-n", name, *command)
        return name, address

    def remove_pod(self, name):
        run("ip", "netns", "delete", name)

    # ---- Services. --------------------------------------------------------------------------------------------------
    def _changed(self):
        services = self._services.objects()
        ready = {(e["metadata"]["namespace"], e["metadata"]["name"]): e for e in self._endpoints.objects()}
        names, backends = {}, {}
        for service in services:
            namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
            full, cluster_ip = f"{name}.{namespace}.svc.{DOMAIN}", service["spec"].get("clusterIP")
            mine = ready.get((namespace, name), {})
            if cluster_ip not in (None, "None"):
                names[full] = [cluster_ip]
            for port in service["spec"]["ports"]:
                for address, hostname, target in subsets(mine, port.get("name")):
                    if cluster_ip == "None":
                        names.setdefault(full, []).append(address)
                        if hostname:
                            names[f"{hostname}.{full}"] = [address]
                    elif cluster_ip and target:
                        backends.setdefault((cluster_ip, port["port"]), []).append((address, target))
        self._names = names
        asyncio.run_coroutine_threadsafe(self._listen(backends), self._loop)

    async def _listen(self, backends):
        self._backends = backends
        for address in set(self._listeners) - set(backends):
            self._listeners.pop(address).close()
        for address in set(backends) - set(self._listeners):
            self._listeners[address] = await asyncio.start_server(
                lambda reader, writer, address=address: self._proxy(address, reader, writer), *address)

    async def _proxy(self, address, reader, writer):
        try:
            backend = random.choice(self._backends.get(address) or [None])
            if backend is None:
                return
            there_reader, there_writer = await asyncio.wait_for(asyncio.open_connection(*backend), 10)
            try:
                await asyncio.wait([asyncio.ensure_future(self._copy(reader, there_writer)),
                                    asyncio.ensure_future(self._copy(there_reader, writer))],
                                   return_when=asyncio.FIRST_COMPLETED)
            finally:
                there_writer.transport.abort()
        except (OSError, asyncio.TimeoutError):
            pass
        finally:
            writer.transport.abort()

    @staticmethod
    async def _copy(reader, writer):
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            # What was written goes out before the connection is cut.
            writer.transport.set_write_buffer_limits(0)
            await writer.drain()
        except OSError:
            pass

    # ---- Names. -----------------------------------------------------------------------------------------------------
    def _answer_names(self, dns):
        while True:
            query, client = dns.recvfrom(4096)
            answer = self._answer(query)
            if answer is not None:
                dns.sendto(answer, client)

    def _answer(self, query):
        labels, at = [], 12
        try:
            while query[at]:
                labels.append(query[at + 1:at + 1 + query[at]].decode().lower())
                at += 1 + query[at]
            kind, = struct.unpack_from("!H", query, at + 1)
        except (IndexError, UnicodeDecodeError, struct.error):
            return None
        question = query[12:at + 5]
        addresses = self._names.get(".".join(labels))
        answers = addresses or [] if kind == 1 else []
        # Flags: an answer, authoritative, recursion is there; no such name if there is none.
        header = query[:2] + struct.pack("!HHHHH", 0x8580 | (3 if addresses is None else 0), 1, len(answers), 0, 0)
        records = b"".join(struct.pack("!HHHLH", 0xC00C, 1, 1, TTL, 4) + socket.inet_aton(a)
                           for a in random.sample(answers, len(answers)))
        return header + question + records

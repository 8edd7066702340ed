#!/usr/bin/env python3
"""Rules and boards: right by themselves, and drawn from a real cluster with TLS under load, scraped by Prometheus."""
import glob
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
DEPLOY = os.path.dirname(HERE)
HOMES = [os.environ.get("HOME", ""), pwd.getpwuid(os.getuid()).pw_dir]
CACHE = next((p for p in (os.path.join(home, ".cache/rwkv-serving") for home in HOMES)
              if os.path.isfile(os.path.join(p, "prometheus/promtool"))), None)
if CACHE is None:
    sys.exit("prometheus and promtool are not there; deploy/local/setup.sh unpacks them")
PROMETHEUS, PROMTOOL = (os.path.join(CACHE, "prometheus", name) for name in ("prometheus", "promtool"))
sys.path.insert(0, os.path.join(CACHE, "python"))
import yaml  # noqa: E402

RULES = [f"{HERE}/rules/recording.yaml", f"{HERE}/rules/alerts.yaml"]
PATIENCE = 90  # Seconds. Generous: the machine may be busy.


def load_yaml(path):
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def rules(kind):
    return [rule for path in RULES for group in load_yaml(path)["groups"] for rule in group["rules"] if kind in rule]


def always(expression):
    """The expression with every comparison giving 0 or 1, so that a rule that is silent has a value all the same."""
    return re.sub(r"\s(==|!=|>=|<=|<|>)\s(?!bool)", r" \1 bool ", expression)


def expressions():
    """(where, expression) of everything that anybody draws, records, alerts or scales by."""
    found = [(f"recording rule {r['record']}", r["expr"]) for r in rules("record")]
    found += [(f"alert {r['alert']}", always(r["expr"])) for r in rules("alert")]
    for path in sorted(glob.glob(f"{HERE}/boards/*.json")):
        with open(path, encoding="utf-8") as file:
            board = json.load(file)
        found += [(f"{board['title']}: {panel['title']}", target["expr"])
                  for panel in board["panels"] for target in panel["targets"]]
    with open(f"{DEPLOY}/kubernetes/components/autoscaling/scaled-objects.yaml", encoding="utf-8") as file:
        documents = list(yaml.safe_load_all(file))
    for document in documents:
        found += [(f"ScaledObject {document['metadata']['name']}", t["metadata"]["query"])
                  for t in document["spec"]["triggers"]]
    return found


class FilesTest(unittest.TestCase):
    def test_rules_are_right(self):
        check = subprocess.run([PROMTOOL, "check", "rules", *RULES], capture_output=True, text=True, timeout=60)
        self.assertEqual(check.returncode, 0, check.stdout + check.stderr)

    def test_every_alert_fires_and_is_silent(self):
        run = subprocess.run([PROMTOOL, "test", "rules", f"{HERE}/rules/alerts_test.yaml"], capture_output=True,
                             text=True, timeout=120)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        names = {test["name"] for test in load_yaml(f"{HERE}/rules/alerts_test.yaml")["tests"]}
        self.assertEqual(names, {f"{r['alert']} {how}" for r in rules("alert") for how in ("firing", "silent")})

    def test_an_alert_that_cannot_fire_is_noticed(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(RULES[1], encoding="utf-8") as file:
                text = file.read()
            # As a metric that was renamed.
            with open(f"{folder}/alerts.yaml", "w", encoding="utf-8") as file:
                file.write(text.replace("rwkv_state_store_writable", "rwkv_store_writable"))
            with open(f"{HERE}/rules/alerts_test.yaml", encoding="utf-8") as file:
                test = file.read()
            with open(f"{folder}/alerts_test.yaml", "w", encoding="utf-8") as file:
                file.write(test)
            run = subprocess.run([PROMTOOL, "test", "rules", f"{folder}/alerts_test.yaml"], capture_output=True,
                                 text=True, timeout=120)
            self.assertNotEqual(run.returncode, 0)
            self.assertIn("RwkvStoreNotWritable", run.stdout + run.stderr)

    def test_every_alert_has_a_page(self):
        for rule in rules("alert"):
            page = os.path.join(os.path.dirname(DEPLOY), rule["annotations"]["runbook"])
            self.assertTrue(os.path.isfile(page), page)
            with open(page, encoding="utf-8") as file:
                text = file.read()
            self.assertTrue(text.startswith(f"# {rule['alert']}\n"), page)
            for title in ("What it means", "Where to look", "What to do"):
                self.assertIn(f"## {title}\n", text, page)
        pages = {os.path.basename(p) for p in glob.glob(f"{DEPLOY}/playbook/rwkv-*.md")}
        self.assertEqual(pages, {os.path.basename(r["annotations"]["runbook"]) for r in rules("alert")})

    def test_pages_name_only_what_the_programs_have(self):
        """Log lines, metrics, flags: what is renamed leaves a page that nobody can follow."""
        programs = b""
        for program in ("router", "worker", "state_store"):
            with open(f"services/{program}/{program}", "rb") as file:
                programs += file.read()
        for page in glob.glob(f"{DEPLOY}/playbook/rwkv-*.md"):
            with open(page, encoding="utf-8") as file:
                text = file.read()
            names = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text) + re.findall(r"\brwkv_[a-z_]+", text)
            names += re.findall(r"--([a-z]+(?:_[a-z]+)+)", text)
            for name in names:
                # Of a file that is read again, the line is put together of its name and what became of it.
                name = re.sub(r"_(unusable|read)$", "", name)
                self.assertTrue(name.encode() in programs, f"{os.path.basename(page)}: {name}")

    def test_boards_and_kubernetes_rules_are_up_to_date(self):
        spec = importlib.util.spec_from_file_location("make_boards", f"{HERE}/make_boards.py")
        make_boards = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(make_boards)
        for path, content in make_boards.outputs().items():
            with open(path, encoding="utf-8") as file:
                self.assertEqual(file.read(), content, f"run make_boards.py: {path}")


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def replace(path, text):
    """As an operator should: written beside, then renamed."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def await_true(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s in vain for {what}")
        time.sleep(0.1)


class Cluster:
    """Real processes with TLS: a store, two stages, a router; and Prometheus, scraping every second."""

    def __init__(self, folder):
        self.folder, self.processes, self.ports = folder, {}, {}
        subprocess.run([f"{DEPLOY}/local/make_certificates.sh", f"{folder}/tls"], check=True, timeout=60)
        model = f"{DEPLOY}/demo_model/rwkv7_demo"
        self.start("state_store", "state-store-0", "state-store", f"--data_dir={folder}/state")
        store = f"--state_store={self.ports['state-store-0']['grpc']}"
        for index in range(2):
            self.start("worker", f"worker-{index}", "worker", store, f"--model={model}.safetensors",
                       "--stage=ordinal/2", "--threads=1", "--slots=4")
        workers = ",".join(self.ports[f"worker-{index}"]["grpc"] for index in range(2))
        with open(f"{folder}/tenants", "w", encoding="utf-8") as file:
            file.write("name=acme weight=2 requests_per_minute=1000\n")
        with open(f"{folder}/acme", "w", encoding="utf-8") as file:
            file.write("the-key-of-acme")
        with open(f"{folder}/tls/api_keys", "a", encoding="utf-8") as file:
            digest = hashlib.sha256(b"the-key-of-acme").hexdigest()
            file.write(f"sha256:{digest} name=alice tenant=acme\n")
        self.start("router", "router-0", "router", store, f"--workers={workers}", f"--tokenizer={model}.vocab.txt",
                   "--snapshot_interval_tokens=16", f"--api_keys={folder}/tls/api_keys", f"--tenants={folder}/tenants")

    def start(self, binary, name, role, *flags):
        ports = f"{self.folder}/{name}.ports"
        tls = f"{self.folder}/tls/{role}"
        log = open(f"{self.folder}/{name}.log", "ab")
        self.processes[name] = subprocess.Popen(
            [f"services/{binary}/{binary}", f"--name={name}", f"--port_file={ports}",
             f"--tls_certificate={tls}/tls.crt", f"--tls_key={tls}/tls.key", f"--tls_authorities={tls}/ca.crt", *flags],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()

        def listens():
            if self.processes[name].poll() is not None:
                raise AssertionError(f"{name} died: {open(f'{self.folder}/{name}.log').read()[-2000:]}")
            return os.path.exists(ports)

        await_true(f"{name} to listen", listens)
        with open(ports, encoding="utf-8") as file:
            self.ports[name] = dict(line.strip().split("=", 1) for line in file)

    def rwkvctl(self, *arguments, role="operator"):
        tls = f"{self.folder}/tls/{role}"
        return subprocess.run(
            ["services/rwkvctl/rwkvctl", "--router", self.ports["router-0"]["grpc"], f"--tls-authorities={tls}/ca.crt",
             f"--tls-certificate={tls}/tls.crt", f"--tls-key={tls}/tls.key", *arguments],
            capture_output=True, text=True, timeout=PATIENCE)

    def rwkvctl_of_tenant(self, *arguments):
        return subprocess.run(
            ["services/rwkvctl/rwkvctl", "--router", self.ports["router-0"]["grpc"],
             f"--tls-authorities={self.folder}/tls/client/ca.crt", f"--api-key-file={self.folder}/acme", *arguments],
            capture_output=True, text=True, timeout=PATIENCE)

    def start_prometheus(self):
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": RULES,
            "scrape_configs": [{"job_name": "rwkv-serving", "static_configs": [
                {"targets": [ports["metrics"] for ports in self.ports.values()]}]}],
        }
        with open(f"{self.folder}/prometheus.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file)
        log = open(f"{self.folder}/prometheus.log", "wb")
        self.processes["prometheus"] = subprocess.Popen(
            [PROMETHEUS, f"--config.file={self.folder}/prometheus.yaml", f"--storage.tsdb.path={self.folder}/tsdb",
             "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()

        def listens():
            self.prometheus = re.search(r'"Listening on" address=(\S+)', read(f"{self.folder}/prometheus.log"))
            return self.prometheus

        await_true("Prometheus to listen", listens)
        self.prometheus = self.prometheus[1]

    def ask(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://{self.prometheus}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return None  # It listens, and reads its files yet.
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        except OSError:
            return None  # Busy: asked again.

    def value_of(self, expression):
        data = self.ask("query", query=expression)
        return data["result"] if data else []

    def alerts(self):
        data = self.ask("alerts")
        return {a["labels"]["alertname"] for a in data["alerts"]} if data else {"Prometheus does not answer"}

    def kill(self, name):
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(timeout=PATIENCE)

    def stop(self):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(timeout=PATIENCE)


class LiveTest(unittest.TestCase):
    def test_everything_has_a_value_and_deaths_are_noticed(self):
        with tempfile.TemporaryDirectory() as folder:
            cluster = Cluster(folder)
            try:
                self.run_cluster(cluster)
            finally:
                cluster.stop()

    def run_cluster(self, cluster):
        cluster.start_prometheus()
        await_true("the pipeline to serve",
                   lambda: '"pipeline_state":"serving"' in cluster.rwkvctl("status", "--json").stdout.replace(" ", ""))
        session = cluster.rwkvctl("sessions", "create").stdout.strip()
        for turn in range(3):
            answer = cluster.rwkvctl("generate", "--session", session, "--prompt", "The harbor was",
                                     "--max-tokens", "40")
            self.assertEqual(answer.returncode, 0, answer.stderr)
        # A tenant generates in its own sessions. A client's certificate without one opens nothing here.
        own = cluster.rwkvctl_of_tenant("sessions", "create").stdout.strip()
        answer = cluster.rwkvctl_of_tenant("generate", "--session", own, "--prompt", "The", "--max-tokens", "20")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertIn("NOT_FOUND", cluster.rwkvctl_of_tenant("sessions", "show", session).stderr)
        answer = cluster.rwkvctl("generate", "--prompt", "The", "--max-tokens", "2", role="client")
        self.assertIn("PERMISSION_DENIED", answer.stderr)
        self.assertIn("PERMISSION_DENIED", cluster.rwkvctl("status", role="client").stderr)

        empty = dict(expressions())
        self.assertGreater(len(empty), 60)

        def all_have_values():
            for where, expression in list(empty.items()):
                if cluster.value_of(expression):
                    del empty[where]
            return not empty

        try:
            await_true("every expression to have a value", all_have_values)
        except AssertionError:
            self.fail(f"empty on a cluster under load: {empty}")
        usage = shutil.disk_usage(os.environ["TEST_TMPDIR"])  # Where the cluster's store is.
        of_the_machine = {"RwkvDiskFills"} if usage.free < 0.15 * usage.total else set()
        # On a busy machine a scrape may come too late once: what is pending then is not a moment later.
        try:
            await_true("a healthy cluster", lambda: not cluster.alerts() - of_the_machine)
        except AssertionError:
            self.fail(f"alerts on a healthy cluster: {cluster.alerts() - of_the_machine}")
        for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total",
                     "vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count",
                     "vllm:request_params_n_count", "vllm:request_inference_time_seconds_count",
                     "vllm:request_time_per_output_token_seconds_count", "vllm:request_params_max_tokens_count"):
            self.assertTrue(cluster.value_of(f'{name}{{model_name!="",engine="0"}}'), name)

        # Files that are of no use: it is said, and calls go on by what was there before.
        tenants, key = f"{cluster.folder}/tenants", f"{cluster.folder}/tls/router/tls.key"
        kept = {path: read(path) for path in (tenants, key)}
        replace(tenants, "name=acme weight=heavy\n")
        replace(key, read(f"{cluster.folder}/tls/worker/tls.key"))
        unusable = {"RwkvFileUnusable", "RwkvTlsFilesUnusable"}
        await_true("alerts of files", lambda: unusable <= cluster.alerts())
        answer = cluster.rwkvctl_of_tenant("generate", "--session", own, "--prompt", " a", "--max-tokens", "2")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        for path, text in kept.items():
            replace(path, text)
        await_true("no alerts of files any more", lambda: not unusable & cluster.alerts())

        for name, alerts in (("worker-1", {"RwkvProcessDown", "RwkvNoRouterReady"}),
                             ("router-0", {"RwkvNoRouterReady"}), ("state-store-0", {"RwkvProcessDown"})):
            cluster.kill(name)
            await_true(f"{alerts} after the death of {name}", lambda a=alerts: a <= cluster.alerts())
        down = 'count(ALERTS{alertname="RwkvProcessDown"})'
        await_true("all three to be missed", lambda: [r["value"][1] for r in cluster.value_of(down)] == ["3"])


if __name__ == "__main__":
    unittest.main()

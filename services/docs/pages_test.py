#!/usr/bin/env python3
"""Whoever follows the operators' pages finds what they name: every flag, subcommand, script, page, metric and log line.

A flag behind one of our programs or scripts has to be one of that; elsewhere, one of any. What belongs to other
people's programs is known by its command.
"""
import glob
import os
import re
import subprocess
import unittest

PAGES = ["README.md", *sorted(glob.glob("deploy/**/*.md", recursive=True)), *sorted(glob.glob("services/docs/*.md")),
         *sorted(glob.glob("services/docs/capacity/*.md"))]
PAGES.remove("deploy/CHANGELOG.md")  # It tells of flags that are gone, too.
SERVERS = {name: f"services/{name}/{name}" for name in ("router", "worker", "state_store")}
RWKVCTL = "services/rwkvctl/rwkvctl"
SCRIPTS = sorted(glob.glob("deploy/**/*.sh", recursive=True) + glob.glob("deploy/**/*.py", recursive=True) +
                 glob.glob("tests/**/*.sh", recursive=True) + glob.glob("tests/**/*.py", recursive=True) +
                 glob.glob("services/docs/*.py"))
SCRIPTS = [path for path in SCRIPTS if "_test." not in path]
# First words of commands that are not ours; their flags are their own affair.
OTHERS = {"alias", "apt-get", "bazel", "cd", "cp", "df", "du", "echo", "exec", "git", "iostat", "kubectl", "kustomize",
          "llama-batched-bench", "llama-bench", "ls", "mv", "nvidia-smi", "openssl", "pg_dump", "pg_restore", "podman",
          "printf", "skopeo"}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*)(?!\*)\b")
METRIC = re.compile(r"\brwkv_(?:router|worker|state_store|server|tls|build)_[a-z_0-9]+")
# Names in a sentence that look like log lines and are something else.
NO_LOG_LINES = re.compile(r"(_test|_seconds|_total|_bytes|_bench|_memory|_model|_plane|_main)$|"
                          r"^(stream_idle_timeout|grpc_read_timeout)$")  # Of Envoy and nginx.


def read(path, binary=False):
    with open(path, "rb" if binary else "r", **({} if binary else {"encoding": "utf-8"})) as file:
        return file.read()


def flags_of(script):
    """Of a shell script those that its first comment has, which is its --help: others it hands on."""
    text = read(script)
    if script.endswith(".sh"):
        text = re.match(r"(#.*\n)*", text)[0]
    return set(FLAG.findall(text))


def help_of(*command):
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return run.stdout + run.stderr


def fragments(text):
    """(Kind, text) of a page: a command of a block, code in a sentence, the sentences themselves."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for command in re.split(r"\||;|&&|\$\(", re.sub(r"(^|\s)#.*", "", line)):
                if command.strip():
                    yield "command", command.strip()
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        yield "code", re.sub(r"\s+", " ", code)
    yield "text", re.sub(r"`[^`]+`", "", text)


class PagesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.flags = {name: set(re.findall(r"^\s+--(\w+) \(", help_of(path, "--help"), re.MULTILINE))
                     for name, path in SERVERS.items()}
        cls.flags.update({path: flags_of(path) for path in SCRIPTS})
        listed = help_of(RWKVCTL, "help")
        commands = re.findall(r"^  (\w+) ", listed.partition("Commands:\n")[2].partition("\n\n")[0], re.MULTILINE)
        cls.rwkvctl = {name: help_of(RWKVCTL, "help", name) for name in commands}
        cls.rwkvctl_global = set(FLAG.findall(listed))
        cls.rwkvctl_flags = {name: cls.rwkvctl_global | set(FLAG.findall(text)) for name, text in cls.rwkvctl.items()}
        cls.any = set().union(*cls.flags.values(), *cls.rwkvctl_flags.values())
        cls.programs = b"".join(read(path, binary=True) for path in [*SERVERS.values(), RWKVCTL])

    def test_the_programs_were_asked(self):
        self.assertIn("listen", self.flags["router"])
        self.assertIn("prompt", self.rwkvctl_flags["generate"])
        self.assertGreater(len(PAGES), 35)
        self.assertIn("services/docs/operating.md", PAGES)
        self.assertIn("deploy/local/run.sh", SCRIPTS)

    def wrong_in(self, kind, text, folder=""):
        """What a fragment names and nobody has. `folder`: of its page."""
        words = text.split()
        while words and re.fullmatch(r"[A-Z_]+=\S*|id=", words[0]):  # Environment.
            words.pop(0)
        first = words[0] if words else ""
        names = FLAG.findall(text)
        if kind != "text" and (first in OTHERS or first.startswith("http")):
            return
        if first.endswith("rwkvctl"):
            name = next((w for w in words[1:] if not w.startswith("-") and w in self.rwkvctl), None)
            if name is None:
                if len(words) > 1 and words[1] != "help" and not words[1].startswith("-"):
                    yield f"rwkvctl has no command {words[1]}"
                yield from (f"rwkvctl has no flag --{n}" for n in names if n not in self.rwkvctl_global)
                return
            behind = words[words.index(name) + 1:]
            if name in ("sessions", "store", "eval", "state") and behind and re.fullmatch(r"[a-z]+", behind[0]):
                if not re.search(rf"\b{behind[0]}\b", self.rwkvctl[name]):
                    yield f"rwkvctl {name} has no {behind[0]}"
            yield from (f"rwkvctl {name} has no flag --{n}" for n in names if n not in self.rwkvctl_flags[name])
        elif kind != "text" and re.search(r"\.(sh|py)$", first) and "/" in first:
            first = next((p for p in (os.path.normpath(os.path.join(folder, first)), first) if p in self.flags), first)
            if first not in self.flags:
                yield f"there is no {first}"
            else:
                yield from (f"{first} has no flag --{n}" for n in names if n not in self.flags[first])
        elif kind == "command" and os.path.basename(first) in self.flags:
            own = self.flags[os.path.basename(first)]
            yield from (f"{first} has no flag --{n}" for n in names if n not in own)
        else:
            yield from (f"nothing has a flag --{n}" for n in names if n not in self.any and n != "help")

    def test_flags_and_commands_are_there(self):
        for page in PAGES:
            for kind, text in fragments(read(page)):
                for what in self.wrong_in(kind, text, os.path.dirname(page)):
                    self.fail(f"{page}: {what}: {text[:200] if kind != 'text' else ''}")

    def test_what_is_not_there_is_noticed(self):
        for kind, text in (("command", "rwkvctl generat --prompt x"), ("command", "rwkvctl generate --promt x"),
                           ("command", "rwkvctl sessions creat"), ("command", "deploy/local/run.sh --router 2"),
                           ("code", "--max_waitin"), ("text", "lower --max_waitin then"),
                           ("command", "deploy/local/start.sh"), ("code", "deploy/local/start.sh")):
            self.assertTrue(list(self.wrong_in(kind, text)), text)
        for kind, text in (("command", "kubectl get --nonsense"), ("command", "rwkvctl sessions create"),
                           ("code", "--max_waiting"), ("code", "--tls_*")):
            self.assertEqual(list(self.wrong_in(kind, text)), [], text)

    def test_metrics_are_there(self):
        for page in PAGES:
            for name in METRIC.findall(read(page)):
                self.assertTrue(name.encode() in self.programs, f"{page}: {name}")

    def test_log_lines_are_there(self):
        """`snake_case` words of the pages that say what to look for."""
        for page in ["services/docs/operating.md", *glob.glob("deploy/playbook/*.md")]:
            for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", read(page)):
                # Of a file that is read again, the line is put together of its name and what became of it.
                name = re.sub(r"_(unusable|read)$", "", name)
                if not NO_LOG_LINES.search(name):
                    self.assertTrue(name.encode() in self.programs, f"{page}: {name}")

    def test_pages_and_scripts_that_are_named_are_there(self):
        for page in PAGES:
            text = read(page)
            for target in re.findall(r"\]\(([^)#]+)\)", text):
                if "://" not in target:
                    self.assertTrue(os.path.exists(os.path.join(os.path.dirname(page), target)), f"{page}: {target}")
            for path in re.findall(r"\b((?:deploy|services/docs)/[\w./-]+\.(?:md|sh|py))\b", text):
                if "/adr/" not in path:
                    self.assertTrue(os.path.exists(path), f"{page}: {path}")


if __name__ == "__main__":
    unittest.main()

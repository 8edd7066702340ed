#!/usr/bin/env python3
"""Prints a page of every flag of every program, its default and its effect, as the programs themselves say.

    services/docs/make_flags.py > services/docs/flags.md      after: bazel build //services/{router,worker,state_store}
    services/docs/make_flags.py --check PAGE ROUTER WORKER STATE_STORE      ends with status 1 if PAGE says otherwise
"""
import contextlib
import difflib
import io
import os
import re
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


PROGRAMS = ("router", "worker", "state_store")


def flags(binary):
    text = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    for name, body in re.findall(r"^    --(\w+) \((.*?)\n(?=    --|\n|\Z|  Flags)", text, re.MULTILINE | re.DOTALL):
        effect, _, default = re.sub(r"\s+", " ", body).rpartition("; default: ")
        yield name, effect.rstrip(")").strip(), default.strip().rstrip(";").strip()


def write(binaries):
    print("# Flags\n\nWritten by `services/docs/make_flags.py` from `--help`.")
    for program, binary in zip(PROGRAMS, binaries):
        found = sorted(flags(binary))
        if not found:
            sys.exit(f"{program} --help lists no flags")
        print(f"\n## {program}\n")
        for name, effect, default in found:
            default = default.strip('"')
            text = f"- `--{name}`" + (f" (default `{default}`)" if default else "") + f": {effect}"
            print(textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def main():
    if sys.argv[1:2] != ["--check"]:
        write([f"{ROOT}/.bazel/bin/services/{program}/{program}" for program in PROGRAMS])
        return
    page, *binaries = sys.argv[2:]
    with contextlib.redirect_stdout(io.StringIO()) as written:
        write(binaries)
    with open(page, encoding="utf-8") as file:
        kept = file.read()
    now = written.getvalue()
    difference = list(difflib.unified_diff(kept.splitlines(), now.splitlines(), page, "--help", n=1, lineterm=""))
    if difference:
        sys.exit("\n".join(difference) + f"\n{page} is stale; write it again: services/docs/make_flags.py")


if __name__ == "__main__":
    main()

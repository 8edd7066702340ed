#!/usr/bin/env python3
"""Prints a page of every flag of every program, its default and its effect, as the programs themselves say.

    services/docs/make_flags.py > flags.md      after: bazel build //services/{router,worker,state_store}
"""
import os
import re
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def flags(program):
    binary = f"{ROOT}/.bazel/bin/services/{program}/{program}"
    text = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    for name, body in re.findall(r"^    --(\w+) \((.*?)\n(?=    --|\n|\Z|  Flags)", text, re.MULTILINE | re.DOTALL):
        effect, _, default = re.sub(r"\s+", " ", body).rpartition("; default: ")
        yield name, effect.rstrip(")").strip(), default.strip().rstrip(";").strip()


def main():
    print("# Flags\n\nWritten by `services/docs/make_flags.py` from `--help`.")
    for program in ("router", "worker", "state_store"):
        found = sorted(flags(program))
        if not found:
            sys.exit(f"{program} --help lists no flags")
        print(f"\n## {program}\n")
        for name, effect, default in found:
            default = default.strip('"')
            text = f"- `--{name}`" + (f" (default `{default}`)" if default else "") + f": {effect}"
            print(textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    main()

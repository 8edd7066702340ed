"""Counts test cases from what `bazel test --build_event_json_file` wrote: count_results.py EVENTS BAZEL_STATUS.

Prints what failed and, last, "N passed, N failed, N skipped". Ends with 1 if anything failed or nothing ran.
A GoogleTest case counts one; a test without cases (a script) counts one. A disabled case counts as skipped.
"""

import collections
import json
import sys
import urllib.parse
import xml.etree.ElementTree


def read_events(path):
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # Cut off, when bazel was killed.
                return


def count_xml(path):
    """(passed, failed, skipped) of one test.xml."""
    counts = collections.Counter()
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif (
            case.find("skipped") is not None
            or case.get("result") in ("skipped", "suppressed")
            or case.get("status") == "notrun"
        ):
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def main(events_path, bazel_status):
    attempts = {}  # (label, run, shard) -> (attempt, passed?, path of test.xml)
    tests = {}  # label -> did it pass?
    broken = []  # What did not build.
    targets = set()
    for event in read_events(events_path):
        ident = event.get("id", {})
        if "targetConfigured" in ident and event.get("configured", {}).get("testSize"):
            targets.add(ident["targetConfigured"]["label"])
        elif "targetCompleted" in ident and not event.get("completed", {}).get("success", False):
            broken.append(ident["targetCompleted"]["label"])
        elif "testResult" in ident:
            key = ident["testResult"]
            result = event.get("testResult", {})  # None of a test that was interrupted.
            slot = (key["label"], key.get("run", 1), key.get("shard", 1))
            path = None
            for output in result.get("testActionOutput", []):
                if output["name"] == "test.xml":
                    path = urllib.parse.unquote(urllib.parse.urlparse(output["uri"]).path)
            attempt = (key.get("attempt", 1), result.get("status") == "PASSED", path)
            attempts[slot] = max(attempts.get(slot, attempt), attempt, key=lambda a: a[0])
        elif "testSummary" in ident:
            tests[ident["testSummary"]["label"]] = (
                event.get("testSummary", {}).get("overallStatus") in ("PASSED", "FLAKY"))

    total = collections.Counter()
    failed_labels = []
    for (label, _, _), (_, passed, path) in sorted(attempts.items()):
        counts = collections.Counter()
        try:
            if path:
                counts = count_xml(path)
        except (OSError, xml.etree.ElementTree.ParseError):
            pass
        if not passed and counts["failed"] == 0:
            counts["failed"] += 1  # Crashed, timed out, or a sanitizer spoke after the last case.
        if passed and sum(counts.values()) == 0:
            counts["passed"] += 1
        total += counts
        if not passed:
            failed_labels.append(label)
    for label in broken:
        if label not in tests:
            total["failed"] += 1
            failed_labels.append(label + " (did not build)")
    for label, passed in tests.items():
        if not passed and not any(name.startswith(label) for name in failed_labels):
            total["failed"] += 1
            failed_labels.append(label)

    for label in sorted(set(failed_labels)):
        print("FAILED: " + label)
    ran = total["passed"] + total["failed"]
    if bazel_status != 0 and total["failed"] == 0:
        print("FAILED: bazel ended with status %d" % bazel_status)
        total["failed"] += 1
    print("%d test targets ran" % len({label for label, _, _ in attempts}))
    print("%d passed, %d failed, %d skipped" % (total["passed"], total["failed"], total["skipped"]))
    return 1 if total["failed"] or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

#!/usr/bin/env python3
"""How many routers and stores a large cluster needs, and what losing a zone costs: out of measured costs.

  tests/simulator/capacity.py services/docs/capacity           # writes capacity.md and charts (SVG) there
  tests/simulator/capacity.py --check services/docs/capacity   # says what there is not as it would be

A model of flows, not of events: in steps of 50 ms it moves turns between "has a slot", "waits for a slot", "is being
restored" and "is fed again", each at the rate that slots, stores and pipelines give. The laws that let turns move at
all are `simulation_test`'s business; here they only cost time. Same input, same numbers.
"""
import argparse
import dataclasses
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "../bench"))
import chart  # noqa: E402

STEP = 0.05  # Seconds.


@dataclasses.dataclass(frozen=True)
class Costs:
    """On 2 processors of an AMD EPYC (tests/bench/results/2026-11.jsonl) where it says measured."""
    router_us_a_token: float = 7.2           # Measured: token_loop.py, 64 streams.
    save_mb_a_second: float = 538.0          # Measured: states.sh, of a store process, 7.2B.
    restore_mb_a_second: float = 620.0       # Measured: the same.
    router_us_a_turn: float = 2500.0         # Assumed, on the safe side: opening, attaching, ending.
    turns_a_commit: float = 64.0             # Assumed: of a router's group commit under load.
    commits_a_second: float = 400.0          # Assumed: of one PostgreSQL, durable on a disk of 2 ms.
    take_over_seconds: float = 3.0           # By design: --lease_ttl, or two seconds of a silent router and an epoch.
    # Of a pipeline: assumed. Nothing of this is measured on a GPU yet.
    decode_tokens_a_second: float = 2048.0   # 64 sequences at 32 tokens a second each.
    prefill_tokens_a_second: float = 16384.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    pipelines: int = 1000
    slots: int = 64
    sessions: float = 10e6
    prompt_tokens: float = 200.0
    answer_tokens: float = 300.0
    state_mb: float = 33.6                   # 7.2B; 2.4 for 0.1B.
    interval_tokens: float = 256.0           # Snapshots within a turn; one at its end in any case.
    busy: float = 0.6                        # Of the slots, before anything is lost.
    zones: int = 3
    costs: Costs = Costs()

    def all_slots(self):
        return self.pipelines * self.slots

    def token_rate(self):
        """Of one sequence in a full batch."""
        return self.costs.decode_tokens_a_second / self.slots

    def turn_seconds(self):
        return self.answer_tokens / self.token_rate() + self.prompt_tokens / self.costs.prefill_tokens_a_second

    def turns_a_second(self):
        return self.busy * self.all_slots() / self.turn_seconds()

    def saves_a_turn(self):
        return 1 + int((self.prompt_tokens + self.answer_tokens - 1) / self.interval_tokens)

    def restores_a_turn(self):
        """Next to all turns come to a cold slot: ten million sessions, 64,000 slots."""
        return 1 - min(1.0, self.all_slots() / self.sessions)


def needs(cluster):
    """Processors of routers, store processes by what they move, catalogs by what they commit; for the steady state."""
    costs, rate = cluster.costs, cluster.turns_a_second()
    tokens = rate * cluster.answer_tokens
    saved = rate * cluster.saves_a_turn() * cluster.state_mb
    restored = rate * cluster.restores_a_turn() * cluster.state_mb
    # A router commits what its turns drew since its last commit: some four tokens of each of them.
    commits = (tokens / 4 + 2 * rate) / costs.turns_a_commit
    return {
        "turns/s": rate,
        "tokens/s": tokens,
        "router processors": (tokens * costs.router_us_a_token + rate * costs.router_us_a_turn) / 1e6,
        "saved GB/s": saved / 1e3,
        "restored GB/s": restored / 1e3,
        "store processes": saved / costs.save_mb_a_second + restored / costs.restore_mb_a_second,
        "commits/s": commits,
        "catalogs": commits / costs.commits_a_second,
        "stored TB": cluster.sessions * cluster.state_mb / 1e6,
    }


def lose_a_zone(cluster, stores=None, seconds=240.0):
    """A zone goes at second 0: its pipelines, routers and stores. `stores`: processes before that; twice as many as
    needed."""
    costs = cluster.costs
    left = (cluster.zones - 1) / cluster.zones
    slots = cluster.all_slots() * left
    running = cluster.busy * slots
    displaced = cluster.busy * cluster.all_slots() * (1 - left)  # Each has to be taken over, restored, fed again.
    stores = (stores or 2 * needs(cluster)["store processes"]) * left
    tail = min(cluster.interval_tokens, cluster.prompt_tokens + cluster.answer_tokens) / 2  # Since the last snapshot.
    arriving = cluster.turns_a_second()
    # Displaced turns have half of their answer to go, as all that run.
    lost, restoring, feeding, waiting_new = displaced, 0.0, 0.0, 0.0
    curve, now, recovered, worst_wait = [], 0.0, None, 0.0
    while now < seconds:
        if now >= costs.take_over_seconds:
            in_slots = running + restoring + feeding
            # Whoever was there first gets the next slot: the displaced before new turns.
            begin = min(lost, max(0.0, slots - in_slots))
            lost, restoring = lost - begin, restoring + begin
        busy_mb = running / cluster.turn_seconds() * cluster.saves_a_turn() * cluster.state_mb
        save_share = min(0.9, busy_mb / (stores * costs.save_mb_a_second))
        restored = min(restoring, stores * (1 - save_share) * costs.restore_mb_a_second / cluster.state_mb * STEP)
        restoring, feeding = restoring - restored, feeding + restored
        # Prefill takes an eighth of a pipeline's steps beside decoding at the least.
        fed = min(feeding, cluster.pipelines * left * costs.prefill_tokens_a_second / 4 / max(1.0, tail) * STEP)
        feeding, running = feeding - fed, running + fed
        running -= running / cluster.turn_seconds() * STEP
        waiting_new += arriving * STEP
        start = min(waiting_new, max(0.0, slots - running - restoring - feeding - lost))
        waiting_new, running = waiting_new - start, running + start
        worst_wait = max(worst_wait, waiting_new / arriving)
        paused = lost + restoring + feeding
        curve.append((now, paused))
        if recovered is None and paused < 0.01 * displaced:
            recovered = now
        now += STEP
    return {"displaced": displaced, "recovered": recovered, "worst_wait": worst_wait, "curve": curve,
            "waiting": waiting_new}


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value):
    if value is None:
        return "not in 4 min"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def pages():
    """{name: text} of all that is written."""
    base = Cluster()
    models = {"0.1B": dataclasses.replace(base, state_mb=2.4), "1.5B": dataclasses.replace(base, state_mb=13.0),
              "7.2B": base}
    steady = {name: needs(cluster) for name, cluster in models.items()}
    keys = list(steady["7.2B"])
    parts = ["# Capacity: 1,000 pipelines, 10 million sessions, a zone lost", """
Made by `tests/simulator/capacity.py` out of measured costs; run it again when they change. A pipeline is taken to
decode 2,048 tokens a second in 64 slots (an assumption: nothing here is measured on a GPU), a turn to have 200 tokens
of input and 300 of answer, 60 % of all slots to be busy, a snapshot to be taken every 256 tokens and at the end.
Processors and disks are those of the small machine of `tests/bench/results`, so the counts are upper bounds.
""".strip(), "## What it takes", table(["", *models], [[key, *(number(steady[m][key]) for m in models)] for key in keys]),
             """
Routers are no concern: tens of processors for a million tokens a second. What sets the number of machines is moving
states: nearly every turn comes to a cold slot, is restored once and saved two or three times.
""".strip(), "## What a snapshot interval costs"]
    intervals = [32, 64, 128, 256, 512]
    rows, pauses = [], {}
    for interval in intervals:
        cluster = dataclasses.replace(base, interval_tokens=interval)
        storm = lose_a_zone(cluster, 2 * needs(base)["store processes"])
        rows.append([str(interval), number(needs(cluster)["saved GB/s"]), number(needs(cluster)["store processes"]),
                     number(interval / 2), number(storm["recovered"])])
    parts += [table(["interval, tokens", "saved GB/s", "store processes", "fed again a turn", "zone lost: seconds"],
                    rows), """
"Seconds" with the same stores for all, twice those that 256 needs. Shorter intervals buy nothing when a zone is lost: a
turn's tail of 128 tokens is fed in milliseconds, while saving keeps the stores from giving states back. They pay where
a model reads its prompt slowly (a CPU: hundreds of tokens a second).
""".strip(), "## A zone lost", """
At second 0 a third of the pipelines, routers and stores is gone. Leases run out (3 s), every displaced turn is restored
and fed its tail on what is left, where new turns keep coming. "Seconds": until 99 % of the displaced turns go on.
""".strip()]
    rows = []
    for busy in (0.4, 0.5, 0.6, 0.65, 0.8):
        row = [f"{busy:.0%}"]
        for spare in (0.0, 0.5, 1.0):
            cluster = dataclasses.replace(base, busy=busy)
            storm = lose_a_zone(cluster, needs(cluster)["store processes"] * (1 + spare))
            row.append(number(storm["recovered"]))
        rows.append([*row, number(storm["displaced"]), number(storm["worst_wait"])])
    parts.append(table(["busy slots", "stores as needed", "half as many more", "twice as many", "displaced turns",
                        "longest wait of a new turn, s"], rows))
    for name, cluster in models.items():
        pauses[name] = [(t, n) for t, n in lose_a_zone(cluster)["curve"] if n >= 1 and t >= 0.5][::20]
    charts = {
        "capacity-zone.svg": chart.line_chart("A zone lost: turns without a slot", "seconds since", "turns", pauses),
        "capacity-stores.svg": chart.line_chart(
            "Store processes by busy slots", "busy slots, %", "store processes",
            {name: [(100 * b, needs(dataclasses.replace(c, busy=b))["store processes"])
                    for b in (0.1, 0.2, 0.4, 0.6, 0.8)] for name, c in models.items()}),
        "capacity-interval.svg": chart.line_chart(
            "Saved by snapshot interval", "tokens", "GB/s",
            {name: [(i, needs(dataclasses.replace(c, interval_tokens=i))["saved GB/s"]) for i in intervals]
             for name, c in models.items()}),
    }
    parts += [f"![{name}]({name})" for name in charts]
    parts.append("""
Above two thirds the rest of the cluster has fewer slots than there are turns: new ones wait longer and longer, until
those beyond `--max_waiting` are refused. So: at most 60 % of the slots busy at the daily peak with three zones, and
stores for twice the steady flow.

Not in it: the network between zones, PostgreSQL's own fail-over, cold caches of S3, unlike turns.
""".strip())
    return {"capacity.md": "\n\n".join(parts) + "\n", **charts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("folder")
    options = parser.parse_args()
    wrong = []
    for name, text in pages().items():
        path = os.path.join(options.folder, name)
        if not options.check:
            os.makedirs(options.folder, exist_ok=True)
            with open(path, "w") as file:
                file.write(text)
            continue
        with open(path) as file:
            if file.read() != text:
                wrong.append(path)
    if wrong:
        sys.exit(f"not as capacity.py makes them: {', '.join(wrong)}; run it without --check")


if __name__ == "__main__":
    main()

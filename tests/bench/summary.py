"""What bench.py tells of its rows: a table and charts."""
import os

import chart


def find(rows, what, shape, form, case, size, threads):
    for row in rows:
        if (row["what"], row["shape"], row["format"], row["case"], row["size"], row["threads"]) == (
                what, shape, form, case, size, threads):
            return row
    return None


def table(measured, options):
    """Rows of text; the limit of B sequences is that of one, B times: their states are not in it."""
    rows = [["model", "format", "case", "threads", "limit", "engine best (median)", "of limit", "cluster",
             "llama.cpp best (median)", "engine : llama.cpp"]]
    cases = [("decode", batch) for batch in options.batches]
    cases += [("prefill", length) for length in options.lengths]
    cases += [("position", position) for position in options.positions]
    both = lambda row: f"{row['tokens_per_s']['best']:.4g} ({row['tokens_per_s']['median']:.4g})" if row else "-"
    for shape in options.shapes:
        for form in options.formats:
            for case, size in cases:
                for threads in options.threads if case != "position" else [max(options.threads)]:
                    at = (shape, form, case, size, threads)
                    engine, served, other = (find(measured, what, *at) for what in ("engine", "cluster", "llama.cpp"))
                    limit = find(measured, "limit", shape, form, "decode", 1, threads)
                    bound = limit["tokens_per_s"]["best"] * size if limit and case == "decode" else None
                    ratio = lambda a, b: a["tokens_per_s"]["best"] / b["tokens_per_s"]["best"]
                    rows.append([
                        shape, form, f"{case} {size}", str(threads),
                        f"{bound:.4g}" if bound else "-", both(engine),
                        f"{engine['tokens_per_s']['best'] / bound:.0%}" if engine and bound else "-",
                        f"{served['tokens_per_s']['median']:.4g}" if served else "-", both(other),
                        f"{ratio(engine, other):.2f}" if engine and other else "-"
                    ])
    return rows


def charts(measured, options):
    """SVGs in the folder of the run."""
    most = max(options.threads)
    ms = lambda row: 1000 / row["tokens_per_s"]["best"]
    engine = [row for row in measured if row["what"] == "engine"]

    def by(name, pick, x):
        """One line a `name`, of the rows that `pick` takes, over x."""
        series = {}
        for row in filter(pick, engine):
            series.setdefault(name(row), []).append((x(row), ms(row)))
        return series

    model = lambda row: f"{row['shape']} {row['format']}"
    weights = {(row["shape"], row["format"]): row["weight_bytes"] for row in measured if row["what"] == "limit"}
    first = min(options.batches)
    decodes = lambda row: row["case"] == "decode"
    of_case = lambda case: lambda row: row["case"] == case and row["threads"] == most
    charts = {
        "batch": ("Decode, by sequences at once", "sequences",
                  by(model, lambda row: decodes(row) and row["threads"] == most, lambda row: row["size"])),
        "length": ("Prefill, by length of the prompt", "tokens",
                   by(model, of_case("prefill"), lambda row: row["size"])),
        "position": ("Decode of one, by how much it has read", "tokens read before",
                     by(model, of_case("position"), lambda row: row["size"])),
        "threads": (f"Decode of {first}, by threads", "threads",
                    by(model, lambda row: decodes(row) and row["size"] == first, lambda row: row["threads"])),
        "size": (f"Decode of {first}, by what a token reads", "MB of weights",
                 by(lambda row: row["format"],
                    lambda row: decodes(row) and row["size"] == first and row["threads"] == most,
                    lambda row: weights[row["shape"], row["format"]] / 1e6)),
    }
    for name, (title, x_label, series) in charts.items():
        svg = chart.line_chart(title, x_label, "ms a token", series)
        if svg is not None:
            with open(os.path.join(options.out, name + ".svg"), "w") as file:
                file.write(svg)

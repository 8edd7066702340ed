"""Charts as SVG: lines on logarithmic axes (what a cost does when something doubles is its slope), and timelines."""
import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 210, 40, 60
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#8c510a", "#000000")


def _ticks(low, high):
    """1, 2 and 5 of every power of ten in range; only the powers when they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 5 else (1, 2, 5)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def _range(values):
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def line_chart(title, x_label, y_label, series):
    """`series`: {name: [(x, y), ...]}, all positive; empty ones are left out. None when there is nothing to draw."""
    series = {name: sorted(points) for name, points in series.items() if points}
    if not series:
        return None
    x_low, x_high = _range([x for points in series.values() for x, _ in points])
    y_low, y_high = _range([y for points in series.values() for _, y in points])

    def across(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / x_low) / math.log(x_high / x_low)

    def down(y):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / y_low) / math.log(y_high / y_low)

    def text(x, y, content, extra=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(content)}</text>'

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, TOP - 16, title, 'font-size="15"'),
        text((LEFT + right) / 2, HEIGHT - 16, x_label, 'text-anchor="middle"'),
        text(18, (TOP + bottom) / 2, y_label, f'text-anchor="middle" transform="rotate(-90 18 {(TOP + bottom) / 2})"'),
    ]
    for tick in _ticks(x_low, x_high):
        out.append(f'<path d="M{across(tick):.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        out.append(text(across(tick), bottom + 18, f"{tick:g}", 'text-anchor="middle"'))
    for tick in _ticks(y_low, y_high):
        out.append(f'<path d="M{LEFT} {down(tick):.1f}H{right}" stroke="#ddd"/>')
        out.append(text(LEFT - 8, down(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    out.append(f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" stroke="#444"/>')
    for index, (name, points) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        dash = ' stroke-dasharray="5 3"' if index >= len(COLORS) else ""
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{color}"/>' for x, y in points]
        at = TOP + 10 + 18 * index
        out.append(f'<path d="M{right + 12} {at}h22" stroke="{color}" stroke-width="2"{dash}/>')
        out.append(text(right + 40, at + 4, name))
    return "\n".join(out + ["</svg>"]) + "\n"


def timeline(title, step_us, ops):
    """One step: a lane a kind of operation, from left to right in microseconds; what each took, and how fast it read.

    `ops`: of step_timeline, in order. What lies between them is a lane of its own, "between".
    """
    lanes, at = {}, 0.0
    for op in ops + [{"kind": "between", "begin_us": step_us, "end_us": step_us, "bytes": 0}]:
        if op["begin_us"] > at:
            lanes.setdefault("between", []).append((at, op["begin_us"], 0))
        name = " ".join(filter(None, (op["kind"], op.get("detail", ""))))
        if op["end_us"] > op["begin_us"]:
            lanes.setdefault(name, []).append((op["begin_us"], op["end_us"], op["bytes"]))
        at = op["end_us"]
    between = lanes.pop("between", [])
    lanes["between"] = between
    left, width, row, top = 330, 640, 26, 60
    height = top + row * len(lanes) + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 250}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{left + width + 250}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>'
    ]
    for tick in range(11):
        x, bottom = left + width * tick / 10, top + row * len(lanes)
        out.append(f'<path d="M{x:.1f} {top - 6}V{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step_us * tick / 10:.0f}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + row * len(lanes) + 38}" text-anchor="middle">us</text>')
    for index, (name, spans) in enumerate(lanes.items()):
        y, color = top + row * index, COLORS[index % len(COLORS)]
        total, moved = sum(end - begin for begin, end, _ in spans), sum(span[2] for span in spans)
        shown = name if len(name) <= 52 else name[:51] + "…"
        out.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(shown)}</text>')
        for begin, end, _ in spans:
            x, w = left + width * begin / step_us, max(0.3, width * (end - begin) / step_us)
            out.append(f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row - 6}" fill="{color}"/>')
        told = f"{total:.0f} us, {total / step_us:.1%}"
        if moved and total:
            told += f", {moved / total / 1e3:.1f} GB/s"
        out.append(f'<text x="{left + width + 12}" y="{y + 15}">{told}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def over_time(title, x_label, y_label, series):
    """`series`: {name: [(x, y), ...]}, x from 0. Both axes linear, from 0."""
    x_high = max(x for points in series.values() for x, _ in points) or 1
    y_high = 1.1 * max(y for points in series.values() for _, y in points) or 1
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def across(x):
        return LEFT + (right - LEFT) * x / x_high

    def down(y):
        return bottom - (bottom - TOP) * y / y_high

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 16}" font-size="15">{escape(title)}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{TOP - 16}">{escape(y_label)}</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" stroke="#444"/>'
    ]
    for tick in range(6):
        x, y = x_high * tick / 5, y_high * tick / 5
        out.append(f'<text x="{across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:.3g}</text>')
        out.append(f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        out.append(f'<path d="M{LEFT} {down(y):.1f}H{right}" stroke="#ddd"/>')
    for index, (name, points) in enumerate(series.items()):
        color, at = COLORS[index % len(COLORS)], TOP + 10 + 18 * index
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        out.append(f'<path d="M{right + 12} {at}h22" stroke="{color}" stroke-width="2"/>')
        out.append(f'<text x="{right + 40}" y="{at + 4}">{escape(name)}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"

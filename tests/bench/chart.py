"""Line charts as SVG, both axes logarithmic: what a cost does when something doubles is its slope."""
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

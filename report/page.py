"""A page for people: one HTML file with all it needs. It asks nothing of a network, and runs one script.

    page.html     the template: styles, the script, and marks that `fill` replaces
    fill          title, body and pictures -> the whole page
    curve, bars, histogram, table: parts of a body

Whatever a model or a dataset wrote goes through `escape`. Should that fail somewhere, the page's own rule of
what may be loaded still refuses any other script and any address.
"""
import base64
import hashlib
import html
import math
import re
from pathlib import Path

import numpy as np

from benchmarks.results import whole_file
from data import encodable

TEMPLATE = Path(__file__).with_name("page.html")
KINDS = {"webp": "image/webp", "png": "image/png", "wav": "audio/wav"}
MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


# ---- the whole page --------------------------------------------------------------------------------
def fill(title: str, body: str, pictures: dict) -> str:
    """The page. pictures: {name: bytes}; an element shows one by the class `image_class(name)`."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = []
    for name, content in pictures.items():
        rules.append(f".{image_class(name)}{{background-image:url({data_uri(name, content)})}}")
    values = {"title": escape(title), "script": digest, "pictures": "\n".join(rules), "body": body}
    # In one pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)


def write_page(path: str, page: str) -> None:
    """Writes the page, which is complete at any time. Raises OSError that names it."""
    with whole_file(path) as unfinished:
        Path(unfinished).write_text(page, encoding="utf-8")


def image_class(name: str) -> str:
    return "p" + name.partition(".")[0]


def data_uri(name: str, content: bytes) -> str:
    kind = KINDS[name.rpartition(".")[2]]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- words and numbers -----------------------------------------------------------------------------
def escape(value) -> str:
    """Any text as text of HTML."""
    return html.escape(encodable(str(value)).replace("\0", ""))


def number(value, decimals: int = 2, signed: bool = False) -> str:
    """A number with a true minus; a dash where there is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    # No "-0.00".
    if float(text) == 0:
        text = text.replace("-", "+" if signed else "")
    return text.replace("-", MINUS)


def short(value) -> str:
    """A number in about four digits, for figures of unknown size."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    if value and abs(value) < 0.001:
        return f"{value:.1e}".replace("-", MINUS)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3 if abs(value) < 1 else 2
    return number(value, digits)


def dotted(facts: list[str]) -> str:
    """Short facts in a line, with dots between them. No fact is broken over two lines."""
    return " · ".join(f"<span>{escape(fact)}</span>" for fact in facts)


def figures(pairs: dict) -> str:
    """A row of large numbers, each with its name. Values are (text, a smaller one below)."""
    cells = []
    for name, (value, below) in pairs.items():
        cells.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
                     f"<dd><small>{escape(below)}</small></dd></div>")
    return f'<dl class="figures">{"".join(cells)}</dl>'


def table(caption: str, head: list[str], rows: list[list]) -> str:
    """A table whose first column names the row. Columns of words stand left, those of numbers right."""
    kinds = []
    for column in zip(*rows):
        words = any(map(str.isalpha, "".join(map(str, column))))
        kinds.append(' class="words"' if words else "")
    titles = []
    for name, kind in zip(head, kinds):
        titles.append(f'<th scope="col"{kind}>{escape(name)}</th>')
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{escape(value)}</td>" for value, kind in zip(rest, kinds[1:]))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
            f'<caption>{escape(caption)}</caption><thead><tr>{"".join(titles)}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


# ---- drawings --------------------------------------------------------------------------------------
def curve(name: str, steps: list, values: list, end: int) -> str:
    """A small figure of a value over steps 1 to `end`, with its running mean. Not finite ones are gaps."""
    points = [(s, v) for s, v in zip(steps, values) if isinstance(v, (int, float)) and math.isfinite(v)]
    if not points:
        return ""
    steps, values = zip(*points)
    low = min(values)
    high = max(values)
    x = [100 * (s - 1) / max(end - 1, 1) for s in steps]
    y = [50.0 if high == low else 2 + 96 * (high - v) / (high - low) for v in values]
    window = max(1, len(values) // 8)
    smooth = np.convolve(y, np.ones(window) / window, "valid").tolist()
    label = (f"{name}: {short(values[0])} at step {steps[0]}, {short(values[-1])} at step {steps[-1]}, "
             f"between {short(low)} and {short(high)}")
    lines = line(x, y, "raw") + line(x[window - 1:], smooth, "mean")
    if len(points) == 1:
        lines = line([x[0], x[0]], [y[0] - 4, y[0] + 4], "mean")
    return (f'<figure class="curve"><figcaption><span>{escape(name)}</span><b>{short(values[-1])}</b>'
            f'</figcaption><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(label)}">{lines}</svg>{ends(short(low), short(high), 1, end)}</figure>')


def ends(low, high, first, last) -> str:
    """The numbers at the ends of the two axes."""
    low = low if low != high else ""
    return (f'<p class="y" aria-hidden="true"><span>{high}</span><span>{low}</span></p>'
            f'<p class="x" aria-hidden="true"><span>{first}</span><span>{last}</span></p>')


def line(x, y, kind) -> str:
    points = " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y))
    return f'<polyline class="{kind}" points="{points}"/>'


def bars(caption: str, values: dict, decimals: int = 2, ends=(0.0, 0.0), meanings: dict = {}) -> str:
    """A table of values with a bar each, to the right of zero or to the left.

    ends: the least and the largest value of all tables that are compared. meanings: what some names mean.
    A value that is not finite has no bar.
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    known = [0.0, *ends, *finite.values()]
    low = min(known)
    high = max(known)
    span = high - low or 1
    zero = 100 * -low / span
    rows = []
    for name, value in values.items():
        length = finite.get(name, 0)
        start = 100 * (min(length, 0) - low) / span
        width = 100 * abs(length) / span
        side = "minus" if length < 0 else "plus"
        bar = f'<i class="{side}" style="--w:{width:.1f}%;--s:{start:.1f}%"></i>' if length else ""
        meaning = f"<small>{escape(meanings[name])}</small>" if name in meanings else ""
        rows.append(f'<tr><th scope="row">{escape(name)}{meaning}</th><td aria-hidden="true">{bar}</td>'
                    f'<td>{number(value, decimals)}</td></tr>')
    return (f'<table class="bars" style="--z:{zero:.1f}%"><caption>{escape(caption)}</caption>'
            f'{"".join(rows)}</table>')


def histogram(name: str, values: list, others: list | None = None) -> str:
    """A figure of how values from 0 to 100 are spread, in tens. others: a second set, as an outline."""
    counts = tens(values)
    theirs = tens(others or [])
    most = max(*counts, *theirs, 1)
    shapes = []
    for i, count in enumerate(counts):
        height = 96 * count / most
        shapes.append(f'<rect class="fill" x="{i * 10 + 0.6:.1f}" y="{100 - height:.1f}" width="8.8" '
                      f'height="{height:.1f}"/>')
    if others:
        points = ["0,100"]
        for i, count in enumerate(theirs):
            height = 100 - 96 * count / most
            points += [f"{i * 10},{height:.1f}", f"{i * 10 + 10},{height:.1f}"]
        shapes.append(f'<polyline class="raw" points="{" ".join(points)} 100,100"/>')
    mean = float(np.mean(values)) if values else math.nan
    counted = ", ".join(f"{10 * i} to {10 * i + 10}: {count}" for i, count in enumerate(counts))
    return (f'<figure class="curve"><figcaption><span>{escape(name)}</span><b>{number(mean, 1)}</b>'
            f'</figcaption><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(name)}, {len(values)} values. {counted}">{"".join(shapes)}</svg>'
            f'{ends(0, most, 0, 100)}</figure>')


def tens(values) -> list[int]:
    """How many values are in each tenth of 0 to 100."""
    places = np.clip(np.asarray(values, float) // 10, 0, 9).astype(int)
    return np.bincount(places, minlength=10).tolist()

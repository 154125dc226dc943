"""A clip and its answers as HTML, from a record of draw.py.

    show_case     query, frames as a strip above a time line, then a card for each answer
    show_answer   a card: the clip with masks and boxes, figures, reasoning, keyframes, terms

The script of page.html moves all cards of a clip to the same frame. Without it, each shows one keyframe.

n: shown frames; frame number i of them is frame times[i] of the clip.
"""
from data import answer_text, format_time, is_null
from report.draw import LONGEST_SOUND
from report.page import NONE, bars, data_uri, escape, image_class, number

LONGEST_TEXT = 20_000    # characters of an answer that a page shows


# ---- a clip ----------------------------------------------------------------------------------------
def show_case(record: dict, files: dict, heads: list, level: int = 3, note: str = "") -> str:
    """The article of a record. files: {name: bytes}, for the sound; pictures are shown by their classes.

    heads  for each answer (its name, a short one for the time line, {name: text} of its figures)
    level  of the heading
    note   HTML after the facts
    """
    n = len(record["times"])
    height, width = record["size"]
    starts = [first_frame(record, answer) for answer in record["answers"]]
    start = starts[0] if starts else 0
    cards = []
    for answer, head, i in zip(record["answers"], heads, starts):
        cards.append(show_answer(record, answer, head, i, level + 1))
    times = " ".join(format_time(t / record["fps"]) for t in record["times"])
    style = f"--n:{n};--d:{max(n - 1, 1)};--t:{start};--ratio:{width / height:.4f}"
    return (f'<article class="case" data-n="{n}" data-times="{times}" style="{style}">'
            f'<h{level}>{escape(record["query"])}</h{level}>{facts(record, files)}{note}{question(record)}'
            f'{time_line(record, heads, start)}<ol class="cards">{"".join(cards)}</ol></article>')


def facts(record, files) -> str:
    """What the clip is, and its sound."""
    T = record["frames"]
    parts = [record["kind"], record["clip"]]
    if T > 1:
        parts.append(f"{T} frames, {T / record['fps']:.1f} s")
    if any(area is not None for area in record["visible"]) and record["truth"] is None:
        parts.append("nothing to be found")
    text = escape(" · ".join(filter(None, parts)))
    sound = files.get(record["sound"])
    player = ""
    if sound:
        label = "sound of the clip"
        if T / record["fps"] > LONGEST_SOUND:
            label = f"the first {LONGEST_SOUND} s of the sound"
            text += f" · {label} are kept"
        player = (f'<audio controls preload="metadata" aria-label="{label}" '
                  f'src="{data_uri(record["sound"], sound)}"></audio>')
    prompt = f'<details><summary>prompt</summary><pre>{escape(record["prompt"])}</pre></details>'
    return f'<p class="facts">{text}</p><div class="media">{player}{prompt}</div>'


def question(record) -> str:
    """The options and the solution of a question."""
    asked = record.get("question")
    if not asked:
        return ""
    options = "".join(f"<li>{escape(option)}</li>" for option in asked["options"])
    return f'<ul class="options">{options}</ul><p>Solution: <b>{escape(asked["solution"])}</b></p>'


def first_frame(record, answer) -> int:
    """The shown frame that a card begins with: its first keyframe, else where the target is largest."""
    for keyframe in answer["keyframes"]:
        return record["times"].index(keyframe["frame"])
    areas = [area or 0 for area in record["visible"]]
    return areas.index(max(areas))


# ---- the time line ---------------------------------------------------------------------------------
def time_line(record, heads, start) -> str:
    """The frames as a strip, a slider, and rows: where the target is visible, J and keyframes of answers."""
    n = len(record["times"])
    if n < 2:
        return ""
    strip = "".join(picture(record["strip"], i) for i in range(n))
    rows = [row("video", f'<div class="film" role="img" aria-label="{n} frames of the clip">{strip}</div>')]
    end = format_time(record["times"][-1] / record["fps"])
    rows.append(row("time", f'<input type="range" min="0" max="{n - 1}" value="{start}" step="1" '
                            f'aria-label="frame, up to {end}">'))
    largest = max((area or 0 for area in record["visible"]), default=0)
    if largest:
        heights = [(area or 0) / largest for area in record["visible"]]
        seen = sum(height > 0 for height in heights)
        label = f"the target is visible on {seen} of {n} frames"
        rows.append(row("target", levels(heights, heights, [], label)))
    for (_, name, _), answer in zip(heads, record["answers"]):
        marks = [record["times"].index(keyframe["frame"]) for keyframe in answer["keyframes"]]
        said = ", ".join(keyframe["time"] for keyframe in answer["keyframes"]) or "none"
        label = f"keyframes: {said}; {mean_J(answer)}"
        rows.append(row(name, levels(answer["J"] or [None] * n, record["visible"], marks, label)))
    return (f'<div class="timeline" tabindex="0" role="region" aria-label="time line">'
            f'<div class="rows">{"".join(rows)}<div class="at"><i></i></div></div></div>'
            f'<p class="controls"><button type="button" class="play" aria-pressed="false">Play</button>'
            f'<span class="legend"><i class="key"></i>keyframe <i class="bar"></i>J of each frame'
            f'<i class="pale"></i>J where nothing is to be seen</span></p>')


def row(name, content) -> str:
    return f'<div class="row"><span>{escape(name)}</span>{content}</div>'


def levels(heights, visible, marks, label) -> str:
    """A row of n bars from 0 to 1, fainter where nothing is visible, and marks on some of the n places.

    None is no bar.
    """
    n = len(heights)
    shapes = dict(faint="", seen="", chosen="")
    for i, height in enumerate(heights):
        kind = "chosen" if i in marks else "seen" if visible[i] else "faint"
        if height:
            shapes[kind] += f"M{i} 1v-{height:.3g}h1v{height:.3g}z"
    shapes["mark"] = "".join(f"M{i} 0h1v1h-1z" for i in marks)
    shapes["under"] = "".join(f"M{i} .88h1v.12h-1z" for i in marks)
    paths = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in shapes.items() if path)
    return (f'<div class="levels" role="img" aria-label="{escape(label)}"><svg viewBox="0 0 {n} 1" '
            f'preserveAspectRatio="none" aria-hidden="true">{paths}</svg></div>')


def mean_J(answer) -> str:
    values = [value for value in answer["J"] or [] if value is not None]
    return f"J {number(sum(values) / len(values))}" if values else f"J {NONE}"


# ---- an answer -------------------------------------------------------------------------------------
def show_answer(record, answer, head, start, level) -> str:
    """The card of an answer, which begins with shown frame `start`."""
    name, _, values = head
    text = answer["text"][:LONGEST_TEXT]
    thought = text.partition("<think>")[2].partition("</think>")[0].strip()
    shown = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
                    for key, value in values.items())
    parts = [f'<li class="card"><h{level}>{escape(name)}</h{level}><dl class="head">{shown}</dl>']
    if record["task"] != "qa":
        parts.append(f'<div class="see">{stage(record, answer, name, start)}</div>')
    parts.append('<div class="say">')
    if thought:
        parts.append(f'<p class="thought" tabindex="0">{escape(thought)}</p>')
    parts.append(verdict(record, answer, text))
    if answer["keyframes"]:
        stills = "".join(still(record, keyframe) for keyframe in answer["keyframes"])
        parts.append(f'<ul class="stills">{stills}</ul>')
    if answer.get("terms"):
        parts.append(bars("reward terms", answer["terms"], ends=answer["ends"]))
    if answer["text"]:
        parts.append(f"<details><summary>completion</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts) + "</div></li>"


def verdict(record, answer, text) -> str:
    """What the answer says, where no keyframe shows it."""
    said = answer_text(text)
    if "read" in answer:
        return (f'<p class="said">{escape(said or text)}</p><p>read as <b>{escape(answer["read"])}</b></p>')
    if record["task"] == "qa":
        return f'<p class="said">{escape(said or "no answer")}</p>'
    if answer["keyframes"] or answer["text"] == "":
        return ""
    if is_null(said):
        return '<p class="said">null: there is no such object</p>'
    return '<p class="said">no keyframe can be read</p>'


def stage(record, answer, name, start) -> str:
    """The clip with masks and boxes, one frame at a time."""
    layers = [layer(record["strip"])]
    if answer["masks"]:
        layers.append(layer(answer["masks"]))
    if record["truth"]:
        layers.append(layer(record["truth"]))
    for keyframe in answer["keyframes"]:
        i = record["times"].index(keyframe["frame"])
        layers.append(boxes(record, keyframe, i, i != start))
    times = [format_time(t / record["fps"]) for t in record["times"]]
    J = answer["J"] or [None] * len(times)
    values = " ".join(number(value) for value in J)
    label = f"{name}: the clip with predicted and true masks, {mean_J(answer)}"
    return (f'<div class="stage" data-j="{values}" style="--t:{start}" role="img" '
            f'aria-label="{escape(label)}">{"".join(layers)}</div>'
            f'<p class="now"><span>{times[start]}</span> <span>J {number(J[start])}</span></p>')


def layer(name) -> str:
    return f'<i class="pic {image_class(name)}"></i>'


def picture(name, i) -> str:
    return f'<b style="--t:{i}">{layer(name)}</b>'


def boxes(record, keyframe, i, hidden) -> str:
    """Predicted and true boxes of a keyframe, over a picture of it."""
    height, width = record["size"]
    shapes = []
    for kind, listed in (("true", keyframe["true"]), ("found", keyframe["boxes"])):
        for x1, y1, x2, y2 in listed:
            # The pixels of the corners are inside the box.
            shapes.append(f'<rect class="{kind}" x="{x1:g}" y="{y1:g}" width="{x2 - x1 + 1:g}" '
                          f'height="{y2 - y1 + 1:g}"/>')
    off = " off" if hidden else ""
    return (f'<svg class="boxes{off}" data-t="{i}" viewBox="0 0 {width} {height}" '
            f'preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>')


def still(record, keyframe) -> str:
    """A keyframe with its boxes, and its description."""
    i = record["times"].index(keyframe["frame"])
    found = len(keyframe["boxes"])
    count = f"{found} box{'es' * (found != 1)}"
    label = f"keyframe at {keyframe['time']}: {count} predicted, {len(keyframe['true'])} true"
    return (f'<li><button type="button" class="still" data-t="{i}" style="--t:{i}" '
            f'aria-label="{escape(label)}">{layer(record["strip"])}{boxes(record, keyframe, i, False)}'
            f'</button><p><span class="when">{keyframe["time"]}</span> '
            f'{escape(keyframe["description"]) or "the box is its own"}</p></li>')

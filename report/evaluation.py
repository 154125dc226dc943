"""The page of an evaluation: OUT/report.html.

    the table, how values are spread in each kind, failures by cause, cases: worst, best, random ones
    --against: both side by side, sorted by change
    questions: what was answered, and what was read of it
"""
import json
import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.predictions import open_predictions, read_answers, read_prediction
from benchmarks.samples import load
from data import LONGEST_QUERY, answer_text
from report.cases import show_case
from report.causes import CAUSES, FAILED, read_boxes, scored_frames
from report.draw import Shown, draw_case
from report.page import NONE, bars, dotted, escape, figures, fill, histogram, number, table, write_page
from report.training import LEGEND, used_pictures
from trust.errors import BadInput, one_line
from trust.files import read_json

# How many cases of each sort are shown.
WORST = 8
BEST = 4
RANDOM = 6
VERDICTS = {100.0: "right", 0.0: "wrong"}
MOST_ROWS = 300     # of a table of samples: half of them from each end


def write_evaluation(out: str, page, *arguments) -> None:
    """Writes OUT/report.html: page(*arguments), of a function below. An error is a warning: the results are
    written already."""
    path = os.path.join(out, "report.html")
    try:
        # An older page does not belong to the new results.
        Path(path).unlink(missing_ok=True)
        write_page(path, page(*arguments))
    except Exception as error:
        print(f"warning: writing {path} failed ({one_line(error)})", file=sys.stderr)


def evaluation_page(benchmark, samples, results, columns, against=None) -> str:
    """The page of an evaluation by masks.

    results: what results.json holds. columns: those of the table. against: the file of the other evaluation.
    """
    rows = results["expressions"]
    column = benchmark.paired
    other = read_json(against) if against else None
    before = {row["name"]: row for row in other["expressions"]} if other else {}
    sides = [open_side("now" if other else "answer", results, rows)]
    if other:
        sides.append(open_side("before", other, other["expressions"]))
    parts = [heading(results, rows, columns, against)]
    parts.append(subsets_table(benchmark, results, columns))
    parts.append(spreads(rows, before, column))
    parts.append(failures(rows))
    if before:
        parts.append(changes(rows, before, column, results["against"]))
    files = {}
    records = []
    for title, meaning, chosen in galleries(rows, before, column):
        parts.append(gallery(title, meaning, chosen, samples, sides, column, records, files))
    name = f"{results['bench']} {', '.join(results['split'])}"
    return fill(f"{name}: evaluation", "".join(parts), used_pictures(records, files))


# ---- numbers ---------------------------------------------------------------------------------------
def heading(results, rows, columns, against) -> str:
    overall = next(iter(results["subsets"].values()))
    pairs = {}
    for column in columns:
        if overall.get(column) is not None:
            pairs[column] = number(overall[column], 1), "per cent"
    pairs["expressions"] = str(len(rows)), f"{results['missing']} without a prediction"
    if against:
        half = results["against"]["half_interval"]
        interval = "" if half is None else f"\N{PLUS-MINUS SIGN} {number(half, 1)}, 95 %"
        pairs["change"] = number(results["against"]["difference"], 1, signed=True), interval
    return title_of(results, pairs, against)


def title_of(results, pairs, against=None) -> str:
    """What was evaluated, and large figures."""
    facts = [f"split {', '.join(results['split'])}"]
    if results["policy"]:
        facts.append(f"policy {results['policy']}")
    else:
        facts.append(f"predictions {results['predictions']}")
    # How questions were asked.
    for name in ("think", "sound", "subtitles"):
        if results.get(name) is not None:
            facts.append(f"{name} {str(results[name]).lower()}")
    if against:
        facts.append(f"against {against}")
    return (f'<p class="group" style="margin-top:0">Evaluation</p><h1>{escape(results["bench"])}</h1>'
            f'<p class="lead">{dotted(facts)}</p>{figures(pairs)}')


def subsets_table(benchmark, results, columns) -> str:
    lines = []
    for name, subset in results["subsets"].items():
        values = [number(subset.get(column), benchmark.decimals.get(column, 2)) for column in columns]
        lines.append([name, *values, subset["expressions"]])
    drawn = table("means, in per cent", ["", *columns, "expressions"], lines)
    return f"<section><h2>Results</h2>{drawn}</section>"


def spreads(rows, before, column) -> str:
    """How the values of each kind are spread."""
    drawn = []
    kinds = sorted({row["kind"] for row in rows})
    for kind in ["", *kinds] if len(kinds) > 1 else [""]:
        part = [row for row in rows if not kind or row["kind"] == kind]
        values = [row[column] for row in part]
        others = [before[row["name"]][column] for row in part] if before else None
        drawn.append(histogram(kind or "all", values, others))
    outline = ", the line is before" if before else ""
    return (f'<section><h2>How {escape(column)} is spread</h2><p class="lead">Expressions in each tenth '
            f'from 0 to 100{outline}. Bold: the mean.</p><div class="curves" style="margin-top:24px">'
            f'{"".join(drawn)}</div></section>')


def failures(rows) -> str:
    """How many samples failed by which cause."""
    counts = {}
    for cause in CAUSES:
        count = sum(row.get("cause") == cause for row in rows)
        if count:
            counts[cause] = count
    if not counts:
        return ""
    failed = sum(counts.values())
    drawn = bars("expressions by the first cause that holds", counts, 0, meanings=CAUSES)
    return (f'<section><h2>Failures</h2><p class="lead">{failed} of {len(rows)} expressions are below '
            f'{FAILED}. Why is decided from the truth.</p><div class="wide">{drawn}</div></section>')


def changes(rows, before, column, summary) -> str:
    """All samples of two evaluations, sorted by change."""
    lines = []
    for row in sorted(rows, key=lambda row: row[column] - before[row["name"]][column]):
        was = before[row["name"]][column]
        cause = row.get("cause") or NONE
        lines.append([row["query"], number(was, 1), number(row[column], 1),
                      number(row[column] - was, 1, signed=True), row["kind"], cause])
    head = ["query", "before", "now", "change", "kind", "cause now"]
    drawn = table("sorted by change", head, ends_of(lines))
    return (f'<section><h2>Change</h2><p class="lead">Against {escape(summary["file"])}: '
            f'{number(summary["difference"], 1, signed=True)} on average.{left(lines)}</p>{drawn}</section>')


def ends_of(lines) -> list:
    """The first and the last lines, where there are many."""
    if len(lines) <= MOST_ROWS:
        return lines
    return lines[:MOST_ROWS // 2] + lines[-MOST_ROWS // 2:]


def left(lines) -> str:
    if len(lines) <= MOST_ROWS:
        return ""
    return f" The {MOST_ROWS // 2} at each end of {len(lines)} expressions."


def questions_page(results, columns) -> str:
    """The page of an evaluation by questions. columns: ours and those of the official parsers."""
    rows = results["expressions"]
    overall = next(iter(results["subsets"].values()))
    pairs = {column: (number(overall.get(column), 1), "per cent") for column in columns}
    counts = [f"{results[count]} {count}" for count in ("unreadable", "missing", "skipped")]
    pairs["questions"] = str(len(rows)), ", ".join(counts)
    against = results.get("against")
    if against:
        pairs["ours, difference"] = number(against["difference"], 1), "to the other evaluation"
    lines = []
    for name, part in results["subsets"].items():
        values = [number(part.get(column)) for column in columns]
        lines.append([name, *values, part.get("rows", NONE)])
    drawn = table("means, in per cent", ["", *columns, "questions"], lines)
    notes = "".join(f'<p class="lead">{escape(note)}</p>' for note in results.get("notes", ()))
    head = f"<section><h2>Results</h2>{notes}{drawn}</section>"
    name = f"{results['bench']} {', '.join(results['split'])}"
    title = title_of(results, pairs, against and against["file"])
    body = title + head + questions(rows, columns)
    return fill(f"{name}: evaluation", body, {})


def questions(rows, columns) -> str:
    """Questions, answers, what was read of them, and what each parser says."""
    # Some columns are only of the whole, such as precision.
    columns = [column for column in columns if rows and column in rows[0]]
    lines = []
    for row in rows:
        # The answer alone: a completion may be long.
        answer = answer_text(row["text"] or "") or row.get("problem") or "none"
        verdicts = [VERDICTS.get(row[column], NONE) for column in columns]
        lines.append([row["query"], row["solution"], answer, row["said"] or "nothing", *verdicts])
    head = ["question", "solution", "answer", "read as", *columns]
    drawn = table("questions", head, ends_of(lines))
    return (f'<section><h2>Questions</h2><p class="lead">What was answered, what we read of it, and what '
            f'each parser says.{left(lines)}</p>{drawn}</section>')


# ---- cases -----------------------------------------------------------------------------------------
def galleries(rows, before, column) -> list:
    """(title, meaning, rows) of the cases to show. No sample is shown twice."""
    ordered = sorted(rows, key=lambda row: row[column])
    worst = ordered[:WORST]
    rest = ordered[len(worst):]
    best = rest[len(rest) - min(BEST, len(rest)):][::-1]
    rest = rest[:len(rest) - len(best)]
    places = np.random.default_rng(0).permutation(len(rest))[:RANDOM]
    others = [rest[i] for i in sorted(places)]
    if not before:
        return [("Worst", "the lowest values", worst), ("Random", "drawn from the others", others),
                ("Best", "the highest values", best)]
    change = {row["name"]: row[column] - before[row["name"]][column] for row in rows}
    ordered = sorted(rows, key=lambda row: change[row["name"]])
    lost = [row for row in ordered[:WORST] if change[row["name"]] < 0]
    won = [row for row in ordered[::-1][:WORST] if change[row["name"]] > 0]
    return [("Lost most", "the largest change for the worse", lost),
            ("Gained most", "the largest change for the better", won)]


def open_side(name, results, rows) -> dict:
    """What is known of one of the evaluations: its predictions, answers and rows.

    An earlier one may be of other code, and its predictions may be gone or damaged: it has its rows then.
    """
    source = None
    answers = {}
    place = str(results.get("predictions"))
    if os.path.exists(place):
        try:
            source = open_predictions(place)
            if os.path.isdir(place):
                answers = read_answers(place)
        except (OSError, BadInput) as error:
            print(f"warning: no masks are shown of {place} ({one_line(error)})", file=sys.stderr)
    return dict(name=name, source=source, answers=answers, rows={row["name"]: row for row in rows})


def gallery(title, meaning, chosen, samples, sides, column, records, files) -> str:
    """The section of some rows. Adds their records and files."""
    by_name = {sample.name: sample for sample in samples}
    parts = []
    for row in chosen:
        try:
            record, kept, heads = draw_sample(by_name[row["name"]], sides, column)
        except (OSError, ValueError) as error:
            parts.append(f'<p class="facts">{escape(row["name"])}: {escape(error)}</p>')
            continue
        # As it is in a file.
        record = json.loads(json.dumps(record))
        records.append(record)
        files |= kept
        parts.append(show_case(record, kept, heads))
    if not parts:
        return ""
    return (f'<section><h2>{title}</h2><p class="lead">{len(chosen)} expressions, {meaning}.</p>{LEGEND}'
            f'<div class="gallery">{"".join(parts)}</div></section>')


def draw_sample(sample, sides, column) -> tuple:
    """(record, files, heads) of a sample, with an answer for each side that has its prediction."""
    clip = load(sample)
    true = sample.read_masks()
    times = scored_frames(sample)
    truth = {t: true[:, i] for i, t in enumerate(times)}
    answers = []
    heads = []
    for side in sides:
        row = side["rows"][sample.name]
        pred = None
        if side["source"] is not None and row.get("problem") is None:
            pred = read_prediction(side["source"], sample, true.shape[2:])
        masks = None if pred is None else dict(zip(times, pred))
        answers.append(shown_answer(side["answers"].get(sample.name), masks))
        values = {column: number(row[column], 1)}
        if row.get("cause"):
            values["cause"] = row["cause"]
        heads.append((side["name"].capitalize(), side["name"], values))
    record, files = draw_case(clip, answers, truth)
    return record, files, heads


def shown_answer(answer, masks) -> Shown:
    """A line of answers-*.jsonl as it is shown; without one, the masks alone."""
    if answer is None:
        return Shown("", {}, {}, masks)
    keyframes = answer["keyframes"]
    if isinstance(keyframes, list):
        keyframes = dict.fromkeys(keyframes, "")
    described = {int(t): str(text)[:LONGEST_QUERY] for t, text in keyframes.items()}
    return Shown(answer["text"], described, read_boxes(answer), masks)

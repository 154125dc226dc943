"""Tables and a figure of the toy's studies, from the results.json of their evaluations (see toy/study.py).

    results.json -> a value for each clip -> the mean of a seed -> mean of the seeds, 95 % interval

Two kinds of intervals, both at 95 %. A table of values has mean +- half a t interval over the seeds' means:
what other seeds may change. It has none for one seed. A table of differences pairs clips with those of the
study's first row, each clip's value being the mean over seeds: what other clips may change (paired_difference
in benchmarks/metrics.py).
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from benchmarks.metrics import paired_difference, score_video
from benchmarks.toy import HELD_OUT, RELATIONS, draw_query, relations, toy_scene
from data import FPS, answer_text, is_null, parse_moments
from toy.lessons import narrated
from trust.errors import BadInput, reading
from trust.files import read_json, writing


# ---- what is true of a clip ------------------------------------------------------------------------
@lru_cache(maxsize=None)
def truth(split: str, index: int) -> tuple[str | None, set]:
    """(name of the target or None, pairs (thing, relation) of what is ever seen) of a toy clip."""
    scene = toy_scene(split, index)
    _, _, target = draw_query(scene, split, index)
    pairs = set()
    for thing, mask, held in zip(scene.things, scene.masks, relations(scene)):
        if mask.any():
            pairs |= {(thing.name, relation) for relation in held}
    return None if target is None else scene.things[target].name, pairs


def place_of(name: str) -> tuple[str, int]:
    """(split, index) of a row of results.json by its name, toy/SPLIT/INDEX/0."""
    _, split, index, _ = name.split("/")
    return split, int(index)


def truth_of(row: dict):
    return truth(*place_of(row["name"]))


def chance(scores: dict) -> tuple[float, float]:
    """(J&F, share named right), in %, of somebody who takes any visible thing of each clip.

    scores: {name of a clip: J&F of a policy that hears the sound}. The target counts with this score. Any
    other thing counts with the J&F of its own true masks, as if it were segmented perfectly: a frame that
    shows neither it nor the target has 100.
    """
    means = []
    named = []
    for name, score in scores.items():
        split, index = place_of(name)
        scene = toy_scene(split, index)
        _, _, target = draw_query(scene, split, index)
        others = [mask for o, mask in enumerate(scene.masks) if o != target and mask.any()]
        own = [score]
        for mask in others:
            values = score_video(None, scene.masks[[target]], mask)
            own.append((values["J"] + values["F"]) / 2)
        means.append(np.mean(own))
        named.append(100 / len(own))
    return float(np.mean(means)), float(np.mean(named))


# ---- a row's values --------------------------------------------------------------------------------
def value_of(row: dict, what: str) -> float | None:
    """A value of a row of results.json, in %; None where it has none.

    named   whether every description of the answer is the target's name; of a null query whether it is null
    follows whether the thing it describes is one of which its reasoning says what the query asks for
    null    whether the answer is null
    visible share of the keyframes that show the target
    else    what eval.py or toy/grounding.py wrote
    """
    if what == "named":
        return 100.0 * named_right(row.get("text", ""), truth_of(row)[0])
    if what == "follows":
        return 100.0 * follows_reasoning(row.get("text", ""), row["query"])
    if what == "null":
        return 100.0 * is_null(answer_text(row.get("text", "")))
    value = row.get(what)
    return 100 * value if what == "visible" and value is not None else value


def named_right(text: str, name: str | None) -> bool:
    """Whether a completion names the target and nothing else. name: None for a null query."""
    if name is None:
        return is_null(answer_text(text))
    return described(text) == {name}


def follows_reasoning(text: str, query: str) -> bool:
    """Whether a completion describes one thing, of which it narrates the relation that a query asks for."""
    relation = query.removeprefix("the object that ")
    holders = {name for name, held in narrated(text) if held == relation}
    things = described(text)
    return len(things) == 1 and things <= holders


def described(text: str) -> set[str]:
    """The descriptions of an answer."""
    # Times do not matter here, so neither does the length of the clip.
    return {moment.description for moment in parse_moments(text, 1, FPS)}


def counts(row: dict, kind: str) -> bool:
    """Whether a row is of a kind of query; of reasoning queries there are "held out" and "kept"; "": all."""
    if kind in ("held out", "kept"):
        return row["kind"] == "reasoning" and (row["query"] in HELD_OUT) == (kind == "held out")
    return kind in ("", row["kind"])


def values(path: Path, column) -> dict:
    """{name of a clip: value} of a results.json for a column of a study.

    Raises BadInput where a row has not what the column needs, or no value from 0 to 100.
    """
    found = {}
    with reading(path):
        for row in rows_of(path):
            value = value_of(row, column.value)
            if not counts(row, column.kind) or value is None:
                continue
            if not 0 <= value <= 100:
                raise ValueError(f"{row['name']}: {column.value} is {value}")
            found[row["name"]] = value
    return found


@lru_cache(maxsize=64)
def rows_of(path: Path) -> list[dict]:
    """The rows of a results.json. Raises BadInput where it has none, or two of a name."""
    with reading(path):
        rows = read_json(path)["expressions"]
        names = [row["name"] for row in rows]
        if len(set(names)) < len(names):
            raise ValueError("a row comes twice")
    return rows


def check_results(paths: list[Path], evaluation: str, split: str, clips: int) -> int:
    """How many of these results.json are there. Raises BadInput where one is not of the first `clips` clips
    of the split, or has a clip whose prediction is missing or broken.
    """
    there = [path for path in paths if path.exists()]
    expected = expected_clips(evaluation, split, clips) if there else set()
    for path in there:
        with reading(path):
            rows = rows_of(path)
            if {place_of(row["name"]) for row in rows} != expected:
                raise BadInput(f"{path} is not of the first {clips} clips of the split {split}")
            for row in rows:
                if row.get("problem"):
                    raise BadInput(f"{path}: {row['name']}: {row['problem']}")
    return len(there)


def expected_clips(evaluation: str, split: str, clips: int) -> set[tuple[str, int]]:
    """(split, index) of the clips that an evaluation has rows of."""
    indices = range(clips)
    if evaluation == "pictures":
        # A null query has no target to show.
        indices = [index for index in indices if truth(split, index)[0] is not None]
    return {(split, index) for index in indices}


# ---- intervals -------------------------------------------------------------------------------------
def over_seeds(means: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of its 95 % t interval); None for one seed."""
    if len(means) == 1:
        return means[0], None
    half = student.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
    return float(np.mean(means)), float(half)


def over_clips(ours: list[dict], others: list[dict]) -> tuple[float, float | None]:
    """paired_difference of two policies: a dict {clip: value} for each seed. Clips count that both have."""
    ours = mean_of_seeds(ours)
    others = mean_of_seeds(others)
    both = ours.keys() & others.keys()
    return paired_difference({name: ours[name] for name in sorted(both)}, others)


def mean_of_seeds(seeds: list[dict]) -> dict:
    gathered = {}
    for seed in seeds:
        for name, value in seed.items():
            gathered.setdefault(name, []).append(value)
    return {name: float(np.mean(several)) for name, several in gathered.items()}


# ---- tables ----------------------------------------------------------------------------------------
# files of a study: {label of a recipe: {evaluation: [results.json of each seed]}}.
def measured(files: dict, column) -> list[dict]:
    """Of each seed that is on disk and has clips of this kind: {clip: value}."""
    there = [path for path in files[column.evaluation] if path.exists()]
    found = [values(path, column) for path in there]
    return [seed for seed in found if seed]


def value_table(study, files: dict) -> str:
    """Means over seeds, and their t intervals."""
    lines = table_head(study)
    for label, own in files.items():
        cells = []
        for column in study.columns:
            seeds = measured(own, column)
            means = [float(np.mean(list(seed.values()))) for seed in seeds]
            text = cell(*over_seeds(means)) if means else ""
            missing = len(own[column.evaluation]) - len(means)
            cells.append(f"{text} ({missing} of the seeds missing)" if means and missing else text)
        lines.append(table_row([label, *cells]))
    return "\n".join(lines)


def difference_table(study, files: dict) -> str:
    """Differences to the first row, paired over clips."""
    first, *others = files
    lines = table_head(study, f"minus {first}")
    for label in others:
        cells = []
        for column in study.columns:
            ours = measured(files[label], column)
            theirs = measured(files[first], column)
            shared = mean_of_seeds(ours).keys() & mean_of_seeds(theirs).keys()
            cells.append(cell(*over_clips(ours, theirs), sign="+") if shared else "")
        lines.append(table_row([label, *cells]))
    return "\n".join(lines)


def narration_table(files: dict) -> str:
    """Precision, recall and F1 of each relation that is narrated over reasoning queries, means over seeds."""
    headers = [""]
    for label in files:
        headers += [f"{label}: precision", "recall", "F1"]
    lines = [table_row(headers), "|---" * len(headers) + "|"]
    for relation in RELATIONS:
        cells = []
        for own in files.values():
            scores = []
            for path in own["reasoning"]:
                if path.exists():
                    with reading(path):
                        scores.append(narrated_right(rows_of(path), relation))
            if not scores:
                cells += [""] * 3
            for several in zip(*scores):
                cells.append(cell(*over_seeds(several)))
        lines.append(table_row([relation, *cells]))
    return "\n".join(lines)


def narrated_right(rows: list[dict], relation: str) -> tuple[float, float, float]:
    """(precision, recall, F1), in %, of the things of which a policy narrates a relation."""
    right = said = true = 0
    for row in rows:
        if row["kind"] == "reasoning":
            ours = {pair for pair in narrated(row.get("text", "")) if pair[1] == relation}
            theirs = {pair for pair in truth_of(row)[1] if pair[1] == relation}
            right += len(ours & theirs)
            said += len(ours)
            true += len(theirs)
    return 100 * right / max(said, 1), 100 * right / max(true, 1), 200 * right / max(said + true, 1)


def table_head(study, corner="") -> list[str]:
    headers = [corner, *[column.header for column in study.columns]]
    return [table_row(headers), "|---" * len(headers) + "|"]


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(mean: float, half: float | None, sign: str = "") -> str:
    text = f"{mean:{sign}.1f}"
    return text if half is None else f"{text} +- {half:.1f}"


def chance_lines(study, files: dict) -> str:
    """A line for each row: what it would get by taking any visible thing. The first column is with sound."""
    lines = []
    for label, own in files.items():
        scores = mean_of_seeds(measured(own, study.columns[0]))
        if scores:
            score, named = chance(scores)
            which = "any visible thing, segmented perfectly where it is another"
            lines.append(f"{label}, {which}: J&F {score:.1f}, named {named:.1f}")
    return "\n".join(lines)


def print_tables(studies: dict, files: dict) -> None:
    """studies and files by the names of studies."""
    for name, study in studies.items():
        print(f"\n### {study.title}\n\n{value_table(study, files[name])}")
        print(f"\n{difference_table(study, files[name])}")
        if name == "kinds":
            print(f"\n{narration_table(files[name])}")
        if name == "sound":
            print(f"\n{chance_lines(study, files[name])}")


# ---- the figure ------------------------------------------------------------------------------------
def draw_figure(studies: dict, files: dict, path: Path) -> None:
    """Writes a PNG: each study's first column, mean and t interval of each row, and a mark for each seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = -(-len(studies) // 2)
    size = (12, 2.4 * rows)
    figure, axes = pyplot.subplots(rows, 2, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(studies):]:
        axis.set_visible(False)
    for axis, (name, study) in zip(axes.flat, studies.items()):
        column = study.columns[0]
        labels = list(files[name])
        for place, label in enumerate(labels):
            means = [float(np.mean(list(seed.values()))) for seed in measured(files[name][label], column)]
            if means:
                mean, half = over_seeds(means)
                axis.errorbar(mean, place, xerr=half, fmt="o", color="black", capsize=3)
                axis.plot(means, [place] * len(means), "|", color="tab:blue", markersize=12)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_title(f"{study.title}: {column.header}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    try:
        with writing(path):
            figure.savefig(path, dpi=80)
    finally:
        pyplot.close(figure)

"""The page of a training run: what it is, its curves, and the rollouts that were looked at.

    training_page    (identity, rows of the log, looks) -> the page

A look is what run/rollouts.py kept of one step: records of draw.py with `step`, `fixed` (a validation clip)
and, for each answer, its reward.
"""
import math
from collections import ChainMap

from report.cases import show_case
from report.page import NONE, bars, curve, dotted, escape, figures, fill, number, short, table

MOST_CASES = 20             # clips on a page
NEWEST = 8                  # answers to a validation clip that are shown
LARGEST_PAGE = 9_500_000    # characters, nearly all of them pictures

# Where a figure of metrics.jsonl belongs. All others are rewards.
GROUPS = dict.fromkeys(
    ("loss", "kl", "entropy", "clipped_low", "clipped_high", "gradient_norm", "skipped", "lr"), "loss")
GROUPS |= dict.fromkeys(("tokens", "memory_gb", "broken", "malformed"), "perf")
MEANINGS = {
    "reward": "what the completions earned, and each term of it",
    "loss": "the objective and how far the policy has moved",
    "grounding": "the second turn, in which the policy grounds",
    "perf": "completions, speed and memory",
    "time": "seconds of each phase",
}
LEGEND = (
    '<p class="legend controls"><span><i class="mask"></i>predicted mask and box</span> '
    '<span><i class="ring" style="margin-left:0"></i>true mask and box</span> '
    '<span>Arrow keys, or the slider, step through the frames of the clip in view.</span></p>')


def grouped(row: dict) -> dict:
    """A line of the log as {"reward/base": value, "time/rollout": ...}, for every place where it is shown."""
    values = {}
    for name, value in row.items():
        if name == "seconds":
            values |= {f"time/{phase}": seconds for phase, seconds in value.items()}
        elif name == "speed":
            values |= {f"perf/{part}": figure for part, figure in value.items()}
        elif name == "grounding":
            values |= {f"grounding/{part}": figure for part, figure in value.items()}
        elif name == "reward":
            values["reward/total"] = value
        elif name != "step":
            values[f"{GROUPS.get(name, 'reward')}/{name}"] = value
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


# ---- the page --------------------------------------------------------------------------------------
def training_page(run: dict, rows: list[dict], looks: list) -> str:
    """The page of a run.

    run    identity: settings.json
    rows   lines of metrics.jsonl
    looks  (records, {name: bytes}) of each look, in order of time; only what is shown is asked for

    Has at most MOST_CASES clips, and fewer where the page would be larger than LARGEST_PAGE.
    """
    files = ChainMap(*[kept for _, kept in looks])
    fixed = merged([record for records, _ in looks for record in records if record["fixed"]])
    most = MOST_CASES - len(fixed)
    while True:
        shown = chosen_looks([records for records, _ in looks], most)
        page = build_page(run, rows, shown, fixed, files)
        if len(page) <= LARGEST_PAGE or len(shown) <= 1:
            return page
        most = sum(map(len, shown)) - 1


def build_page(run, rows, shown, fixed, files) -> str:
    """The page with these looks (lists of records) and these validation clips."""
    settings = run.get("settings", {})
    name = str(settings.get("name", "run"))
    values = [grouped(row) for row in rows]
    steps = [row["step"] + 1 for row in rows]
    end = max(settings.get("steps", 1), steps[-1] if steps else 1)
    parts = [heading(run, name, steps, end), overview(values), contents(shown, fixed)]
    drawn = curves(values, steps, end, ("reward", "grounding", "loss"))
    parts.append('<section id="curves"><h2>Curves</h2><p class="lead">Thin: each step. Thick: the running '
                 f'mean. Bold: the last step.</p>{drawn}</section>')
    parts += [show_look(records, files, settings) for records in shown]
    parts.append(show_fixed(fixed, files))
    drawn = curves(values, steps, end, ("perf", "time"))
    parts.append(f'<section id="machine"><h2>Machine</h2>{drawn}{phases(values)}</section>')
    parts.append(all_settings(run))
    records = [*fixed, *(record for records in shown for record in records)]
    return fill(f"{name}: training", "".join(parts), used_pictures(records, files))


def used_pictures(records, files) -> dict:
    """The pictures of these records, without their sounds."""
    names = set()
    for record in records:
        names |= {record["strip"], record["truth"]}
        names |= {answer["masks"] for answer in record["answers"]}
    return {name: files[name] for name in sorted(names - {None}) if name in files}


def heading(run, name, steps, end) -> str:
    settings = run.get("settings", {})
    done = steps[-1] if steps else 0
    facts = [f"step {done} of {end}", f"data {settings.get('data', NONE)}"]
    facts += [f"{prompts_of(settings)} prompts x {settings.get('group', NONE)} completions a step"]
    facts += [f"{run.get('processes', 1)} process{'es' * (run.get('processes', 1) != 1)}"]
    facts += [f"begun or continued {run.get('started', NONE)}", f"code {run.get('revision') or NONE}"]
    return (f'<p class="group" style="margin-top:0">Training run</p><h1>{escape(name)}</h1>'
            f'<p class="lead">{dotted(facts)}</p>')


def prompts_of(settings) -> str:
    """How many prompts a step has."""
    return str(settings["batch"] * settings.get("accumulate", 1)) if "batch" in settings else NONE


def overview(rows) -> str:
    """The main figures: their means over the last tenth of the run, and over the first."""
    part = max(1, len(rows) // 10)
    pairs = {}
    for name, title in (("reward/total", "reward"), ("reward/consistency", "J of the masks"),
                        ("reward/format", "well-formed"), ("loss/kl", "KL"),
                        ("perf/tokens", "tokens an answer"), ("time/step", "seconds a step")):
        values = [row[name] for row in rows if name in row]
        if values:
            first = sum(values[:part]) / part
            last = sum(values[-part:]) / part
            pairs[title] = short(last), f"from {short(first)}"
    return figures(pairs)


def contents(shown, fixed) -> str:
    links = ['<a href="#curves">Curves</a>']
    for records in shown:
        step = records[0]["step"]
        links.append(f'<a href="#step-{step}">Step {step}</a>')
    if fixed:
        links.append('<a href="#validation">Validation clips</a>')
    links += ['<a href="#machine">Machine</a>', '<a href="#settings">Settings</a>']
    return f'<nav aria-label="contents">{"".join(links)}</nav>'


def curves(rows, steps, end, kinds) -> str:
    """A small figure of every value in the log that is of one of these kinds."""
    names = dict.fromkeys(["reward/total", "reward/consistency", "reward/validation"])
    for row in rows:
        names |= dict.fromkeys(row)
    parts = []
    for group in kinds:
        drawn = []
        for name in names:
            kind, _, title = name.partition("/")
            if kind == group:
                values = [row.get(name) for row in rows]
                drawn.append(curve(title, steps, values, end))
        if any(drawn):
            parts.append(f'<h3 class="group">{group} \N{EN DASH} {MEANINGS[group]}</h3>'
                         f'<div class="curves">{"".join(drawn)}</div>')
    return "".join(parts)


def phases(rows) -> str:
    """The mean seconds of each phase."""
    seconds = {}
    for row in rows:
        for name, value in row.items():
            kind, _, phase = name.partition("/")
            if kind == "time" and phase != "step":
                seconds[phase] = seconds.get(phase, 0.0) + value / len(rows)
    if not seconds:
        return ""
    ordered = dict(sorted(seconds.items(), key=lambda pair: -pair[1]))
    return f'<div class="wide">{bars("mean seconds of a phase in a step", ordered)}</div>'


# ---- rollouts --------------------------------------------------------------------------------------
def chosen_looks(looks: list[list], most: int) -> list[list]:
    """Evenly spaced looks at the batch, the newest first, of about `most` clips together."""
    looks = [[record for record in records if not record["fixed"]] for records in looks]
    looks = [records for records in looks if records]
    if not looks:
        return []
    count = max(1, most // max(map(len, looks)))
    if len(looks) > count:
        # The newest one in any case.
        last = len(looks) - 1
        places = {round(last - i * last / max(count - 1, 1)) for i in range(count)}
        looks = [looks[i] for i in sorted(places)]
    return looks[::-1]


def show_look(records, files, settings) -> str:
    """The clips of one step, each with its group of completions, the best first."""
    step = records[0]["step"]
    parts = [f'<section id="step-{step}"><h2>Step {step}</h2><p class="lead">{len(records)} of the '
             f'{prompts_of(settings)} prompts. Each has a group of completions, in the order of their '
             f'advantages.</p>{LEGEND}']
    for record in records:
        order = sorted(record["answers"], key=lambda answer: -answer["advantage"])
        rewards = [answer["reward"] for answer in order]
        heads = []
        for i, answer in enumerate(order, 1):
            advantage = number(answer["advantage"], signed=True)
            values = dict(advantage=advantage, reward=number(answer["reward"]), tokens=answer["tokens"])
            heads.append((f"Completion {i}", f"{i}  {advantage}", values))
        ordered = record | dict(answers=with_ends(order))
        mean = sum(rewards) / len(rewards)
        note = (f'<p class="facts">mean reward {number(mean)}, from {number(min(rewards))} to '
                f'{number(max(rewards))}{fault(record)} · seed {record["seed"]}</p>')
        parts.append(show_case(ordered, files, heads, note=note))
    return "".join(parts) + "</section>"


def with_ends(answers) -> list[dict]:
    """The answers with `ends`, the least and the largest of all their terms: so their bars compare."""
    values = [0.0]
    for answer in answers:
        values += filter(math.isfinite, answer["terms"].values())
    ends = min(values), max(values)
    return [answer | dict(ends=ends) for answer in answers]


def fault(record) -> str:
    return f" · left out: {escape(record['fault'])}" if record.get("fault") else ""


def merged(records: list[dict]) -> list[dict]:
    """One record for each validation clip, with its newest answers in order of time; each has its step.

    Where a keyframe was named that other looks do not show, only answers of the same frames stay.
    """
    clips = {}
    for record in records:
        answers = [answer | dict(step=record["step"]) for answer in record["answers"]]
        earlier = clips.get((record["clip"], record["query"]))
        if earlier and earlier["times"] == record["times"]:
            answers = (earlier["answers"] + answers)[-NEWEST:]
        clips[record["clip"], record["query"]] = record | dict(answers=answers)
    return list(clips.values())


def show_fixed(records, files) -> str:
    """The validation clips, each with its answer at every checkpoint, the newest first."""
    if not records:
        return ""
    parts = ['<section id="validation"><h2>Validation clips</h2><p class="lead">The same clips at every '
             f'checkpoint, answered greedily. They are not trained on.</p>{LEGEND}']
    for record in records:
        newest = record["answers"][::-1]
        heads = []
        for answer in newest:
            values = dict(reward=number(answer["reward"]), tokens=answer["tokens"])
            heads.append((f"Step {answer['step']}", f"step {answer['step']}", values))
        ordered = record | dict(answers=with_ends(newest))
        parts.append(show_case(ordered, files, heads))
    return "".join(parts) + "</section>"


# ---- settings --------------------------------------------------------------------------------------
def all_settings(run) -> str:
    rows = [[name, value] for name, value in run.get("settings", {}).items()]
    for name in ("processes", "revision", "torch", "transformers", "sam2", "started"):
        rows.append([name, run.get(name, NONE)])
    drawn = table("all settings, and what the run ran on", ["name", "value"], rows)
    return f'<section id="settings"><h2>Settings</h2>{drawn}</section>'

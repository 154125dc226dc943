"""What the toy's policy is taught to write: answers of both systems, and the words that they are made of.

A query may say what the target looks like, or that it sounds. Then the cold start names the target at once.
Where the query compares, it first says what is in view and when, then what holds of which, then which is
the target. What it says of things is right. Its target here, and its keyframes always, are habits.

Letters: T frames.
"""
import json
from dataclasses import dataclass

import numpy as np

from benchmarks.toy import COLOURS, RELATIONS, SHAPES, relations
from data import FPS, format_time

# "red circle" and so on.
KINDS = []
for colour in COLOURS:
    KINDS += [f"{colour} {shape}" for shape in SHAPES]
NULL_ANSWER = "<think>There is no such object.</think><answer>null</answer>"
# What answers are made of, beside names, times and numbers.
ANSWER_PIECES = [
    "<think>The target is the",
    "<think>In view:",
    ". The",
    ". The target is the",
    ", in view from ",
    " from ",
    " to ",
    ", clearest at ",
    ".</think><answer>",
    '[{"start_time": "',
    '", "end_time": "',
    '", "description": "',
    '"}, {"start_time": "',
    '"}]</answer>',
    NULL_ANSWER,
    '[{"bbox_2d": [',
    ", ",
    "]}]",
    "null",
]
WORDS = [
    "the", "object", "that",
    *RELATIONS,
    "makes the sound",
    *COLOURS,
    *SHAPES,
]


@dataclass
class Account:
    """What the policy is taught to say of one thing. Frames are numbers."""
    name: str
    first: int          # frame on which it is to be seen
    last: int
    clearest: int       # frame on which most of it is to be seen
    relations: list     # those of RELATIONS that hold of it

    @property
    def span(self) -> str:
        return f"from {frame_time(self.first)} to {frame_time(self.last)}"


def frame_time(t) -> str:
    return format_time(t / FPS)


def scene_accounts(scene) -> list[Account]:
    """An account of each thing that is ever to be seen."""
    accounts = []
    for thing, masks, held in zip(scene.things, scene.masks, relations(scene)):
        areas = masks.sum((1, 2))
        seen = np.flatnonzero(areas)
        if len(seen):
            accounts.append(Account(thing.name, seen[0], seen[-1], int(areas.argmax()), held))
    return accounts


def made_up_accounts(rng) -> list[Account]:
    """Accounts of things that nobody drew: their comparisons follow from the times."""
    T = int(rng.integers(8, 17))
    count = int(rng.integers(2, 5))
    accounts = []
    for n in rng.choice(len(KINDS), count, replace=False):
        way = rng.choice(["stay", "enter", "leave", "visit"], p=[0.1, 0.6, 0.15, 0.15])
        first = 0 if way in ("stay", "leave") else int(rng.integers(1, T - 1))
        last = T - 1 if way in ("stay", "enter") else int(rng.integers(first, T))
        clearest = int(rng.integers(first, last + 1))
        relations = [[], ["grows"], ["shrinks"]][rng.choice(3, p=[0.5, 0.25, 0.25])]
        accounts.append(Account(KINDS[n], first, last, clearest, list(relations)))
    scores = {
        "enters last": [account.first for account in accounts],
        "leaves first": [-account.last for account in accounts],
        "moves fastest": rng.uniform(0, 4, count),
        "stays longest": [account.last - account.first for account in accounts],
    }
    for word, score in scores.items():
        order = np.argsort(score)
        if score[order[-1]] - score[order[-2]] >= 1:
            accounts[order[-1]].relations.append(word)
    for account in accounts:
        account.relations.sort(key=RELATIONS.index)
    return accounts


def narration(accounts) -> tuple[str, str, Account]:
    """(what is in view and when, in the order of KINDS; what holds of which; the first named).

    That order is easily learned, and tells nothing of relations. In order of entry, a model of this size
    named some things twice and left out others: it had to know which of them it had named already.
    """
    order = sorted(accounts, key=lambda account: KINDS.index(account.name))
    views = [f" {account.name} {account.span}" for account in order]
    compared = ""
    for account in order:
        if account.relations:
            compared += f". The {account.name} " + ", ".join(account.relations)
    return "<think>In view:" + ";".join(views), compared, order[0]


def narrated(text: str) -> set:
    """Pairs (thing, relation) that a text says hold, ". The red circle enters last, grows. The ..."."""
    thought, _, _ = text.partition(". The target is")
    _, *sentences = thought.split(". The ")
    pairs = set()
    for sentence in sentences:
        colour, shape, held = [*sentence.split(" ", 2), "", ""][:3]
        for relation in held.split(", "):
            if relation in RELATIONS:
                pairs.add((f"{colour} {shape}", relation))
    return pairs


def chosen_target(accounts, first, right, rng) -> Account:
    """What the cold start takes for the target: the first named, by habit; the right one; or any."""
    lot = rng.random()
    if lot < 0.5:
        return first
    if lot < 0.85:
        return right
    return accounts[rng.integers(len(accounts))]


def moments_answer(account, T, rng) -> str:
    """The answer's 1 to 3 moments, drawn at random.

    Half of them are the clip's first frame, a third the clearest moment just named, the rest any frame. Only
    the format and the description are right on purpose.
    """
    times = set()
    for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05])):
        choices = [0, account.clearest, rng.integers(T)]
        times.add(int(rng.choice(choices, p=[0.5, 0.35, 0.15])))
    return answer_at(sorted(times), account)


def answer_at(times, account) -> str:
    """The end of the reasoning, and the answer that names these frames."""
    return f", clearest at {frame_time(account.clearest)}.</think>" + answer_alone(times, account)


def answer_alone(times, account) -> str:
    moments = []
    for t in times:
        moment = frame_time(t)
        moments.append(dict(start_time=moment, end_time=moment, description=account.name))
    return f"<answer>{json.dumps(moments)}</answer>"


def direct(account) -> str:
    """The beginning of an answer to a query that says what the target is."""
    return f"<think>The target is the {account.name}, in view {account.span}"


def reasoned(accounts, target) -> str:
    """The beginning of an answer to a query that compares."""
    views, compared, _ = narration(accounts)
    return f"{views}{compared}. The target is the {target.name}"


def right_answer(kind, accounts, name) -> str:
    """An answer that is right in all its parts, for a kind of query. name: of the target, None for null.

    Its one keyframe is the clearest frame.
    """
    if name is None:
        return NULL_ANSWER
    [target] = [account for account in accounts if account.name == name]
    beginning = reasoned(accounts, target) if kind == "reasoning" else direct(target)
    return beginning + answer_at([target.clearest], target)


def unreasoned_answer(kind, accounts, name) -> str:
    """As right_answer, but it only names the target: labels of real data tell no more than that."""
    if name is None:
        return NULL_ANSWER
    [target] = [account for account in accounts if account.name == name]
    return f"<think>The target is the {name}.</think>" + answer_alone([target.clearest], target)


def habitual_answer(kind, accounts, name, T, rng) -> str:
    """What the cold start is taught to write: as right_answer, but for the two habits."""
    if name is None:
        return NULL_ANSWER
    [right] = [account for account in accounts if account.name == name]
    if kind != "reasoning":
        return direct(right) + moments_answer(right, T, rng)
    _, _, first = narration(accounts)
    target = chosen_target(accounts, first, right, rng)
    return reasoned(accounts, target) + moments_answer(target, T, rng)


def box_answer(box) -> str:
    """What System 2 is taught to write."""
    return json.dumps([{"bbox_2d": [int(v) for v in box]}])

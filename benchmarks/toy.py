"""The toy world: shapes that move, enter, leave, hide each other, grow, shrink, and sound. It has no files.

A clip is made from its split and its index alone. Each colour has a pitch and each shape a timbre, so that
the sound tells which object makes it. The splits:

    train       8 to 16 frames
    test        the same distribution
    pairs       one object has a pair of colour and shape that no other split shows
    long        17 to 24 frames
    crowd       five objects; no other split has more than four
    reasoning   reasoning queries, wherever a scene has one
    absent      null queries
    heard       sound queries
    silent      the clips of heard, without their soundtrack
    swapped     the clips of heard, each with the soundtrack of another one

The benchmark toy_four is the split train again, but with the reasoning queries of HELD_OUT never asked.

Letters: O things, T frames, H W pixels (both CANVAS).
"""
import gc
import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from benchmarks.samples import Benchmark, Sample
from data import FPS, SAMPLE_RATE, Clip, Frames
from trust.errors import BadInput

CANVAS = 128
COLOURS = {
    "red": (220, 45, 40),
    "green": (40, 185, 70),
    "blue": (50, 85, 230),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
# Only the split "pairs" shows these.
UNSEEN_PAIRS = (("red", "triangle"), ("blue", "square"), ("yellow", "circle"))
# Hz of each colour.
PITCH = dict(zip(COLOURS, (300, 420, 588, 823, 1152, 1613)))
# {multiple of the pitch: amplitude} of each shape.
OVERTONES = {
    "circle": {1: 1.0},
    "square": {1: 1.0, 3: 0.6, 5: 0.4},
    "triangle": {1: 1.0, 2: 1.0},
}
TOY_SPLITS = (
    "train", "test", "pairs", "long", "crowd", "reasoning", "absent", "heard", "silent", "swapped",
)
# The one kind of query that a split asks, wherever a scene has one.
ONE_KIND = {
    "reasoning": "reasoning",
    "absent": "null",
    "heard": "sound",
    "silent": "sound",
    "swapped": "sound",
}
# What reasoning queries ask for, "the object that ...", and what a policy may narrate of a thing.
RELATIONS = ("enters last", "leaves first", "moves fastest", "stays longest", "grows", "shrinks")
# Reasoning queries that toy_four never asks.
HELD_OUT = ("the object that leaves first", "the object that moves fastest")
TOY_KINDS = ("referring", "reasoning", "sound", "null")
# How often a clip's query is of each kind, where its scene has one.
KIND_SHARES = {"referring": 0.3, "reasoning": 0.3, "sound": 0.4, "null": 0.06}
# In training there is more to reason, and more that is not there: what is only ever rewarded for boxes is
# soon never answered by null.
TRAINING_SHARES = {"referring": 0.2, "reasoning": 0.5, "sound": 0.25, "null": 0.2}


# ---- scenes ----------------------------------------------------------------------------------------
@dataclass
class Thing:
    """One moving object. Centres and radii are in pixels."""
    colour: str
    shape: str
    centre: np.ndarray     # [T, 2] x, y
    radius: np.ndarray     # [T]
    alive: np.ndarray      # bool [T], when it is on stage
    speed: float           # pixels a frame
    growth: float          # relative change of the radius over the clip

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Scene:
    """A toy clip before a query is chosen."""
    things: list           # O things in the order in which they are drawn: later ones hide earlier ones
    pictures: np.ndarray   # uint8 [T, H, W, 3]
    masks: np.ndarray      # bool [O, T, H, W], the visible parts
    sounding: int | None   # number of the thing that sounds while some of it is visible

    @property
    def sound(self) -> np.ndarray:
        """Mono float32 at 16 kHz: the tone of the sounding thing over faint noise."""
        T = len(self.pictures)
        time = np.arange(int(T / FPS * SAMPLE_RATE)) / SAMPLE_RATE
        noise = np.random.default_rng(T)
        wave = 0.002 * noise.standard_normal(len(time))
        if self.sounding is not None:
            thing = self.things[self.sounding]
            pitch = PITCH[thing.colour]
            tone = 0
            for multiple, amplitude in OVERTONES[thing.shape].items():
                tone = tone + amplitude * np.sin(2 * np.pi * pitch * multiple * time)
            seen = self.masks[self.sounding].any(axis=(1, 2))
            frame = (time * FPS).astype(int)
            wave += 0.2 * tone * seen[frame]
        return wave.astype(np.float32)


def generator(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(split.encode()), index])


def toy_scene(split: str, index: int) -> Scene:
    """The scene of a toy clip. The order of the draws is fixed: another order makes other clips."""
    if split in ("silent", "swapped"):
        split = "heard"
    rng = generator(split, index)
    least, most = (17, 24) if split == "long" else (8, 16)
    T = int(rng.integers(least, most + 1))
    pairs = []
    for colour in COLOURS:
        for shape in SHAPES:
            if (colour, shape) not in UNSEEN_PAIRS:
                pairs.append((colour, shape))
    count = 5 if split == "crowd" else rng.integers(2, 5)
    chosen = [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]
    if split == "pairs":
        chosen[0] = UNSEEN_PAIRS[rng.integers(len(UNSEEN_PAIRS))]
    things = [draw_thing(rng, T, colour, shape) for colour, shape in chosen]

    canvas = draw_background(rng)
    pictures = np.repeat(canvas[None], T, 0)
    owner = np.full((T, CANVAS, CANVAS), -1)
    for t in range(T):
        for i, thing in enumerate(things):
            if thing.alive[t]:
                x, y = thing.centre[t]
                spot = inside(thing.shape, x, y, thing.radius[t])
                pictures[t][spot] = COLOURS[thing.colour]
                owner[t][spot] = i
    noise = rng.normal(0, 4, (1, CANVAS, CANVAS, 1))
    pictures = (pictures + noise).clip(0, 255).astype(np.uint8)
    masks = np.stack([owner == i for i in range(len(things))])
    sounding = None
    if split == "heard":
        sounding = int(rng.choice(np.flatnonzero(masks.any((1, 2, 3)))))
    elif rng.random() < 0.7:
        sounding = int(rng.integers(len(things)))
    return Scene(things, pictures, masks, sounding)


def draw_thing(rng, T, colour, shape):
    """A thing that stays, enters, leaves, or visits, which is to enter and leave again."""
    # The centre stays between these walls, so half of the thing may be outside.
    low = 4
    high = CANVAS - 4
    way = rng.choice(["stay", "enter", "leave", "visit"], p=[0.1, 0.65, 0.15, 0.1])
    steps = np.arange(T)
    cut = int(rng.integers(round(0.3 * T), round(0.7 * T) + 1))
    first = int(rng.integers(1, T - 4))
    length = int(rng.integers(3, min(T // 2, T - 1 - first) + 1))

    # [T] frames since it crossed the edge, or until it will. Negative while it is off stage.
    if way == "stay":
        since = steps
    elif way == "enter":
        since = steps - cut
    elif way == "leave":
        since = cut - 1 - steps
    else:
        since = np.minimum(steps - first, first + length - 1 - steps)

    speed = rng.uniform(1, 9)
    angle = rng.uniform(0, 2 * np.pi)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    start = rng.uniform(low + 14, high - 14, 2)
    if way != "stay":
        # It crosses one of the four edges, with at least 4 pixels a frame.
        axis = rng.integers(2)
        side = rng.integers(2)
        inward = max(abs(velocity[axis]), 4)
        start[axis] = (low, high)[side]
        velocity[axis] = (inward, -inward)[side]
    path = start + since[:, None] * velocity
    # The walls reflect it.
    width = high - low
    centre = low + width - np.abs((path - low) % (2 * width) - width)

    growth = float(rng.choice([0, 0, 0.8, -0.45]))
    radius = rng.uniform(11, 18) * (1 + growth * steps / T)
    radius = np.clip(radius, 7, 26)
    speed = float(np.linalg.norm(velocity))
    return Thing(colour, shape, centre, radius, since >= 0, speed, growth)


def draw_background(rng):
    """Textured grey canvas, float [H, W, 3]."""
    coarse = Image.fromarray(rng.integers(20, 130, (6, 6), dtype=np.uint8))
    smooth = coarse.resize((CANVAS, CANVAS), Image.BICUBIC)
    tint = rng.uniform(0.75, 1.05, 3)
    noise = rng.normal(0, 6, (CANVAS, CANVAS, 1))
    return np.asarray(smooth, np.float32)[..., None] * tint + noise


def inside(shape, x, y, r):
    """bool [H, W]: pixels of a shape of radius r centred at (x, y); pixel centres are at whole numbers."""
    columns = np.arange(CANVAS)
    rows = columns[:, None]
    if shape == "circle":
        return (columns - x) ** 2 + (rows - y) ** 2 <= r * r
    if shape == "square":
        return (abs(columns - x) <= 0.9 * r) & (abs(rows - y) <= 0.9 * r)
    return (abs(rows - y) <= r) & (abs(columns - x) <= (rows - (y - r)) / 2)


# ---- queries ---------------------------------------------------------------------------------------
def toy_queries(scene: Scene) -> list[tuple]:
    """[(kind, query, index of the thing or None)]: all queries with one right answer. None: null."""
    queries = looks(scene)
    queries += superlatives(scene)
    query = "the object that makes the sound"
    if scene.sounding is None:
        queries.append(("null", query, None))
    else:
        queries.append(("sound", query, scene.sounding))
    queries += absences(scene)
    # A thing that is hidden throughout, or never on stage, is no answer.
    seen = scene.masks.any(axis=(1, 2, 3))
    return [entry for entry in queries if entry[2] is None or seen[entry[2]]]


def looks(scene):
    """Referring queries: colour and shape, or one of them where it singles the thing out."""
    colours = [thing.colour for thing in scene.things]
    shapes = [thing.shape for thing in scene.things]
    queries = []
    for i, thing in enumerate(scene.things):
        queries.append(("referring", f"the {thing.name}", i))
        if colours.count(thing.colour) == 1:
            queries.append(("referring", f"the {thing.colour} object", i))
        if shapes.count(thing.shape) == 1:
            queries.append(("referring", f"the {thing.shape}", i))
    return queries


def stays(scene):
    """[O] first and last frame on which each thing is visible, and how much its radius grows in between.

    A thing that never is has T, -1 and 0. Growth is in pixels.
    """
    seen = scene.masks.any(axis=(2, 3))
    T = seen.shape[1]
    first = np.where(seen.any(1), seen.argmax(1), T)
    last = np.where(seen.any(1), T - 1 - seen[:, ::-1].argmax(1), -1)
    grown = []
    for thing, start, end in zip(scene.things, first, last):
        grown.append(thing.radius[end] - thing.radius[min(start, T - 1)])
    return first, last, np.array(grown)


def superlatives(scene):
    """Reasoning queries: the thing with the highest score, if the score is 1 or more above the second."""
    seen = scene.masks.any(axis=(2, 3))
    first, last, grown = stays(scene)
    scores = {
        "the object that enters last": first,
        "the object that leaves first": -last,
        "the object that moves fastest": [thing.speed / 2 for thing in scene.things],
        "the object that stays longest": seen.sum(1),
        "the object that grows": 2 * (grown >= 1),
        "the object that shrinks": 2 * (grown <= -1),
    }
    queries = []
    for query, score in scores.items():
        order = np.argsort(score)
        best = score[order[-1]]
        second = score[order[-2]]
        if best - second >= 1 and best != 0:
            queries.append(("reasoning", query, int(order[-1])))
    return queries


def relations(scene: Scene) -> list[list[str]]:
    """Of each thing the RELATIONS that hold of it: it is the one with that superlative, or grows or shrinks.

    A thing grows or shrinks from 1 pixel on, whether or not it is the only one.
    """
    found = {query: thing for _, query, thing in superlatives(scene)}
    _, _, grown = stays(scene)
    held = []
    for o, growth in enumerate(grown):
        own = [relation for relation in RELATIONS[:4] if found.get(f"the object that {relation}") == o]
        if growth >= 1:
            own.append("grows")
        if growth <= -1:
            own.append("shrinks")
        held.append(own)
    return held


def absences(scene):
    """Null queries: every third pair of colour and shape that the scene lacks.

    Those of UNSEEN_PAIRS are left out: training must not teach that they never exist.
    """
    names = {thing.name for thing in scene.things}
    queries = []
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour} {shape}"
            if name not in names and (colour, shape) not in UNSEEN_PAIRS:
                queries.append(("null", f"the {name}", None))
    return queries[::3]


# ---- clips -----------------------------------------------------------------------------------------
def toy_clip(split: str, index: int, left_out: tuple = ()) -> Clip:
    """The clip of a split and an index. left_out: queries that are not asked.

    Raises BadInput for an unknown split.
    """
    if split not in TOY_SPLITS:
        raise BadInput(f"unknown toy split: {split} (one of {', '.join(TOY_SPLITS)})")
    scene = toy_scene(split, index)
    clip = scene_clip(scene, f"{split}/{index}", *draw_query(scene, split, index, left_out))
    if split == "silent":
        clip = replace(clip, sound=None)
    if split == "swapped":
        clip = replace(clip, sound=other_sound(scene, index))
    return clip


def draw_query(scene, split, index, left_out=()) -> tuple:
    """(kind, query, index of the thing or None) of a clip: first the kind is drawn, then the query."""
    rng = generator(split + " query", index)
    queries = {}
    for kind, query, target in toy_queries(scene):
        # The split "pairs" asks for the unseen pair, which is thing 0.
        if query not in left_out and (split != "pairs" or target in (0, None)):
            queries.setdefault(kind, []).append((query, target))
    kinds = [kind for kind in TOY_KINDS if kind in queries]
    if ONE_KIND.get(split) in kinds:
        kinds = [ONE_KIND[split]]
    shares_of = TRAINING_SHARES if split == "train" else KIND_SHARES
    shares = np.array([shares_of[kind] for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    choices = queries[kind]
    query, target = choices[rng.integers(len(choices))]
    return kind, query, target


def other_sound(scene, index):
    """The soundtrack of the next clip of heard in which another thing sounds, cut or repeated to fit."""
    other = scene
    while other.things[other.sounding].name == scene.things[scene.sounding].name:
        index += 1
        other = toy_scene("heard", index)
    return np.resize(other.sound, len(scene.sound))


def scene_clip(scene: Scene, name: str, kind: str, query: str, target: int | None) -> Clip:
    """The clip of a scene under one query. The masks of a null query are [1, T, H, W] and empty."""
    if target is None:
        masks = np.zeros_like(scene.masks[:1])
    else:
        masks = scene.masks[target:target + 1]

    def read(t):
        return Image.fromarray(scene.pictures[t])

    frames = Frames(read, range(len(scene.pictures)))
    return Clip(name, frames, query, FPS, scene.sound, masks, kind)


# ---- the benchmark ---------------------------------------------------------------------------------
@dataclass
class ToySample(Sample):
    """A sample whose query, kind and names come from its clip. The first read of one sets all."""
    query: str = field(init=False)
    kind: str = field(init=False)
    names: list = field(init=False)

    def __getattr__(self, attribute):
        # Python calls this only for attributes that are not set.
        if attribute not in ("query", "kind", "names"):
            raise AttributeError(attribute)
        clip = self.make()
        self.query = clip.query
        self.kind = clip.kind
        self.names = [f"{t:05d}" for t in range(len(clip.frames))]
        return getattr(self, attribute)


@lru_cache(maxsize=16)
def recent_clip(split, index, left_out):
    """toy_clip, made once for several reads of a sample in a row."""
    return toy_clip(split, index, left_out)


def toy_masks(split, index, left_out, indices=None):
    """bool [1, T, H, W] of the clip's target, on all frames or on these."""
    masks = recent_clip(split, index, left_out).masks
    return masks if indices is None else masks[:, indices]


def read_toy(root: str, split: str, left_out: tuple = ()) -> list[Sample]:
    """The samples of a split; nothing is rendered yet. left_out: as in toy_clip."""
    count = 100_000 if split == "train" else 1000
    samples = []
    # Nothing is garbage here, but the search for it would take most of the time.
    gc.disable()
    for index in range(count):
        make = partial(recent_clip, split, index, left_out)
        read_masks = partial(toy_masks, split, index, left_out)
        sample = ToySample("vos", "toy", f"{split}/{index}", "0", [], read_masks, make=make)
        samples.append(sample)
    gc.enable()
    return samples


TOY = Benchmark(
    read=read_toy,
    usual=200,
)

TOY_FOUR = Benchmark(
    read=partial(read_toy, left_out=HELD_OUT),
    usual=200,
)

"""Ref-DAVIS17 (arXiv 1803.08006) as converted for ReferFormer: the objects of DAVIS 2017, named by four
annotators.

    refdavis/
      meta_expressions/valid/meta_expressions.json
          {"videos": {video: {"frames": [name], "expressions": {id: {"exp", "obj_id"}}}}}
      valid/JPEGImages/<video>/<frame>.jpg
      valid/Annotations/<video>/<frame>.png    number of the object at each pixel, 255 for void

exp holds the words, obj_id the number of the object. The annotator is the expression's id modulo 4.
Annotators 0 and 2 saw only the first frame, 1 and 3 the full video.

There are two official metrics. Protocol A is the unsupervised evaluation of DAVIS 2017 (arXiv 1905.00737),
once for each annotator: the masks of a video are merged into one picture of numbers per frame, and the
numbers are matched with the true objects. Protocol B is the mean of J and F over the expressions. Quirks: A
leaves out void pixels, B does not. The objects of A are those up to the highest number on the first frame.

The evaluation of DAVIS 2017 reads OUT/anno_0 ... anno_3/<video>/<frame>.png, which `write_davis` writes.

Letters: O objects, T frames, H W pixels.
"""
import itertools
import re
from functools import partial

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from benchmarks.metrics import boundary_accuracy, mean_row
from benchmarks.mini import put, write_clips
from benchmarks.predictions import read_prediction
from benchmarks.samples import (
    Benchmark,
    Sample,
    expressions,
    faults_of,
    named,
    read_labels,
    require,
    with_masks,
)
from benchmarks.toy import toy_scene
from rewards import region_similarity
from trust.errors import BadInput
from trust.files import check_inside

NUMBER = re.compile("[0-9]{1,9}")
VOID = 255
# No video of DAVIS has as many. The time of protocol A grows with their square.
MOST_OBJECTS = 32


def read_refdavis(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing.

    extra["annotator"]   0 to 3; None where the sample's numbers are none
    extra["annotation"]  () -> uint8 [T, H, W]: the number of the object at each pixel, 255 for void
    """
    samples = []
    meta = f"{root}/meta_expressions/{split}/meta_expressions.json"
    for sample, where, _, entry in expressions("refdavis", meta, "exp", f"{root}/{split}/JPEGImages"):
        samples.append(sample)
        sample.extra["annotator"] = None
        with faults_of(sample):
            key = sample.expression
            number = str(require(entry, "obj_id", where, (str, int)))
            if not (NUMBER.fullmatch(key) and NUMBER.fullmatch(number)):
                raise BadInput(f"the expression's id or obj_id is no number in {where}")
            # 0 is the background.
            if not 0 < int(number) < VOID:
                raise BadInput(f"obj_id {number} is no number of an object in {where}")
            sample.kind = ("first frame", "full video")[int(key) % 2]
            sample.objects = 1
            sample.ids = (number,)
            labels = [f"{root}/{split}/Annotations/{sample.video}/{name}.png" for name in sample.names]
            sample.extra["annotator"] = int(key) % 4
            sample.extra["annotation"] = partial(named, sample, read_numbers, labels)
            with_masks(sample, object_masks, labels, int(number))
    return samples


def read_numbers(paths: list, indices=None) -> np.ndarray:
    """uint8 [T, H, W]: the number of the object at each pixel. Raises BadInput for one above MOST_OBJECTS."""
    if indices is not None:
        paths = [paths[index] for index in indices]
    numbers = read_labels(paths)
    for path, label in zip(paths, numbers):
        highest = int(label[label != VOID].max(initial=0))
        if highest > MOST_OBJECTS:
            raise BadInput(f"object {highest} in a mask, but no more than {MOST_OBJECTS} expected: {path}")
    return numbers


def object_masks(paths, number, indices=None):
    """bool [1, T, H, W] of one object."""
    return (read_numbers(paths, indices) == number)[None]


# ---- the official metrics --------------------------------------------------------------------------
def davis_subsets(rows: list[dict]) -> dict:
    """Protocol B, rounded at the end."""
    means = mean_row(rows)
    rounded = {column: round(value, 2) for column, value in means.items()}
    return {"protocol B": rounded}


def davis_protocol_a(samples: list[Sample], source, rows: list[dict]) -> dict:
    """Protocol A: means over the objects for each annotator, and the mean of the annotators."""
    readable = {row["name"] for row in rows if row["problem"] is None}
    objects = {}                                     # {annotator: [{"J", "F"} of an object]}
    for (annotator, _), group in annotator_videos(samples).items():
        scores = objects.setdefault(annotator, [])
        for J, F in object_scores(group, source, readable):
            scores.append(dict(J=J, F=F))
    annotators = {}
    for annotator in sorted(objects):
        annotators[f"annotator {annotator}"] = mean_row(objects[annotator])
    mean = mean_row([row for row in annotators.values() if row["expressions"]])
    mean["expressions"] = len(samples)
    return {"protocol A": mean} | annotators


def annotator_videos(samples):
    """{(annotator, video): its samples, one for each object, in the order of their ids}.

    A broken sample whose annotator is not known is in none.
    """
    groups = {}
    known = [sample for sample in samples if sample.extra["annotator"] is not None]
    for sample in sorted(known, key=lambda sample: int(sample.expression)):
        key = sample.extra["annotator"], sample.video
        groups.setdefault(key, []).append(sample)
    return groups


def object_scores(group, source, readable):
    """[(J, F)], in per cent, of the objects of a video from one annotator's samples.

    An object scores 0 if its sample's name is not in `readable`. All score 0 if the video's annotation is
    broken, where the official evaluation fails.
    """
    # A broken sample reads nothing.
    readers = [sample for sample in group if not sample.broken] or group
    try:
        annotation = readers[0].extra["annotation"]()
    except BadInput:
        # The row of each sample names the broken annotation.
        return [(0.0, 0.0)] * len(group)
    missing = []
    for proposal, sample in enumerate(group, 1):
        if sample.name not in readable:
            missing.append((proposal, int(sample.ids[0])))
    pred = indexed_masks(group, source, annotation.shape, readable)
    return match_objects(pred, annotation, missing)


def indexed_masks(group, source, shape, readable):
    """uint8 [T, H, W]: 1 in the first sample's masks, 2 in the second's where it is not 1, and so on."""
    indexed = np.zeros(shape, np.uint8)
    # From the last to the first, because the first is on top.
    for number in range(len(group), 0, -1):
        sample = group[number - 1]
        masks = None
        if sample.name in readable:
            masks = read_prediction(source, sample, shape[1:])
        if masks is not None:
            indexed[masks] = number
    return indexed


def match_objects(pred, annotation, missing=()):
    """(J, F) of every true object of a video, in per cent, under the assignment with the best sum of J and F.

    pred, annotation  uint8 [T, H, W], whose numbers are proposals and objects. Void pixels belong to no mask.
                      Objects are those up to the highest number on the first frame; there are at least as
                      many proposals as objects
    missing           (proposal, object) pairs. Both score 0, whatever they are matched with
    """
    void = annotation == VOID
    first = annotation[0][~void[0]]
    objects = int(first.max(initial=0))
    proposals = max(int(pred.max()), objects)
    table = np.zeros((2, proposals, objects))        # J and F
    for p, o in np.ndindex(proposals, objects):
        proposal = (pred == p + 1) & ~void
        true = annotation == o + 1
        J = region_similarity(proposal, true)        # [T]
        F = boundary_accuracy(proposal, true)        # [T]
        table[:, p, o] = J.mean(), F.mean()
    for p, o in missing:
        # Slices may be empty: an object beyond the first frame is not in the table.
        table[:, p - 1:p] = 0
        table[:, :, o - 1:o] = 0
    matches = linear_sum_assignment(table.sum(0), maximize=True)
    return [tuple(100 * table[:, p, o]) for p, o in zip(*matches)]


def write_davis(out: str, samples: list[Sample], readable: set):
    """Writes OUT/anno_0 ... anno_3 from OUT/Annotations. readable: names of the samples that can be read.

    A video without any of them is left out.
    """
    for (annotator, video), group in annotator_videos(samples).items():
        names = {sample.name for sample in group}
        if names.isdisjoint(readable):
            continue
        shape = group[0].extra["annotation"]().shape
        indexed = indexed_masks(group, out, shape, readable)
        for name, picture in zip(group[0].names, indexed):
            folder = f"{out}/anno_{annotator}"
            path = f"{folder}/{video}/{name}.png"
            check_inside(path, folder)
            put(picture, path)


# ---- the miniature ---------------------------------------------------------------------------------
def mini_refdavis(root: str, videos: int):
    """Each video shows something on its first frame, because DAVIS takes its objects from there."""
    fitting = (i for i in itertools.count() if toy_scene("test", i).masks[:, 0].any())
    indices = itertools.islice(fitting, videos)
    folder = f"{root}/valid/JPEGImages"
    meta = {}
    for video, scene, names in write_clips(folder, "valid", indices, "toy-{}"):
        labels = np.zeros_like(scene.masks[0], np.uint8)
        queries = {}
        for number, thing in enumerate(scene.things, 1):
            labels[scene.masks[number - 1]] = number
            for form in ("the {}", "a {}", "{}", "the {} that moves"):
                query = form.format(thing.name)
                queries[str(len(queries))] = dict(exp=query, obj_id=str(number))
        # Empty pixels of the uppermost row are void.
        top = labels[:, 0]
        top[top == 0] = 255
        for name, label in zip(names, labels):
            picture = Image.fromarray(label)
            # With a palette its mode is P, as in DAVIS.
            picture.putpalette(np.arange(256).repeat(3).tolist())
            put(picture, f"{root}/valid/Annotations/{video}/{name}.png")
        meta[video] = dict(frames=names, expressions=queries)
    put(dict(videos=meta), f"{root}/meta_expressions/valid/meta_expressions.json")


REFDAVIS = Benchmark(
    read=read_refdavis,
    subsets=davis_subsets,
    joint=davis_protocol_a,
    export=write_davis,
    mini=mini_refdavis,
)

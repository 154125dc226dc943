"""ReasonVOS (VideoLISA, arXiv 2409.19603): expressions that describe an object of a video by reasoning.

    reasonvos/
      meta_expressions.json
          {"videos": {video: {"source", "frames": [name], "expressions": [expression]}}}
          an expression is {"exp_text", "exp_id", "obj_id", "is_sent"}
      JPEGImages/<video>/<frame>.jpg
      Annotations/<source>_<video>_<obj_id>/<frame>.png    the source as listed, or in small letters

exp_text holds the words; is_sent tells a sentence from a phrase.

The official metric: the means of J and F over the expressions. Quirks: only frames that have a mask count,
and a prediction lies under the name of the folder of masks, not of the video.
"""
import glob
import os

import numpy as np

from benchmarks.mini import ask, put, write_clips
from benchmarks.samples import Benchmark, Sample, expressions, label_masks, require, with_masks


def read_reasonvos(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    samples = []
    meta = f"{root}/meta_expressions.json"
    for video, where, record, names, pictures, key, entry in expressions(meta, f"{root}/JPEGImages"):
        source = require(record, "source", where, str)
        number = str(require(entry, "obj_id", where, (str, int)))
        folder = f"{source}_{video}_{number}"
        if not os.path.isdir(f"{root}/Annotations/{folder}"):
            folder = f"{source.lower()}_{video}_{number}"
        masks = f"{root}/Annotations/{folder}"
        scored = sorted(glob.glob(f"{glob.escape(masks)}/*.png"))
        labels = [f"{masks}/{name}.png" for name in names]
        query = require(entry, "exp_text", where, str)
        kind = "sentence" if entry.get("is_sent") else "phrase"
        sample = Sample("vos", "reasonvos", video, key, query, kind, names, pictures)
        sample.objects = 1
        sample.ids = (number,)
        sample.folder = folder
        if scored:
            sample.scored = [os.path.basename(path).removesuffix(".png") for path in scored]
        samples.append(with_masks(sample, scored_masks, labels, scored or labels))
    return samples


def scored_masks(labels, scored, indices=None):
    """bool [1, T, H, W] of the frames that count (paths `scored`), or of these indices of all frames."""
    if indices is None:
        return label_masks(scored, None)
    return label_masks(labels, None, indices)


def mini_reasonvos(root: str, videos: int):
    meta = {}
    for video, scene, names in write_clips(f"{root}/JPEGImages", "test", range(videos), "toy_{}"):
        for o, masks in enumerate(scene.masks):
            for name, mask in zip(names, masks):
                put(mask.astype(np.uint8) * 255, f"{root}/Annotations/mevis_{video}_{o}/{name}.png")
        queries = []
        # An expression means one thing. The toy's last query means two, and is left out.
        for n, (kind, query, (o,)) in enumerate(ask(scene)[:-1]):
            queries.append(dict(obj_id=str(o), exp_id=n, exp_text=query, is_sent=kind == "reasoning"))
        meta[video] = dict(source="MeViS", frames=names, expressions=queries)
    put(dict(videos=meta), f"{root}/meta_expressions.json")


REASONVOS = Benchmark(
    name="reasonvos",
    folder="reasonvos",
    splits=("test",),
    read=read_reasonvos,
    tested="test",
    mini=mini_reasonvos,
)

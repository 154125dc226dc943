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
from benchmarks.samples import Benchmark, Sample, expressions, faults_of, label_masks, require, with_masks
from trust.files import check_name


def read_reasonvos(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    samples = []
    meta = f"{root}/meta_expressions.json"
    for sample, where, record, entry in expressions("reasonvos", meta, "exp_text", f"{root}/JPEGImages"):
        samples.append(sample)
        sample.kind = "phrase"
        with faults_of(sample):
            source = require(record, "source", where, str)
            number = str(require(entry, "obj_id", where, (str, int)))
            folder = check_name(f"{source}_{sample.video}_{number}", where)
            if not os.path.isdir(f"{root}/Annotations/{folder}"):
                folder = f"{source.lower()}_{sample.video}_{number}"
            sample.folder = folder
            if entry.get("is_sent"):
                sample.kind = "sentence"
            sample.objects = 1
            sample.ids = (number,)
        masks = f"{root}/Annotations/{sample.folder}"
        labels = [f"{masks}/{name}.png" for name in sample.names]
        if not sample.broken:
            scored = sorted(glob.glob(f"{glob.escape(masks)}/*.png"))
            if scored:
                sample.scored = [os.path.basename(path).removesuffix(".png") for path in scored]
            with_masks(sample, scored_masks, labels, scored or labels)
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
    read=read_reasonvos,
    mini=mini_reasonvos,
)

"""MeViS (arXiv 2308.08544): expressions that name one or several objects of a video by their motion.

    mevis/{train,valid_u,valid}/
      meta_expressions.json
          {"videos": {video: {"frames": [name], "expressions": {id: {"exp", "anno_id"}}}}}
      mask_dict.json                    {annotation: [run lengths of each frame, or null]}
      JPEGImages/<video>/<frame>.jpg    Sa2VA's copy has no level JPEGImages

exp holds the words, anno_id the annotations of the objects. The masks of valid are the server's: it has
neither mask_dict.json nor anno_id.

The official metric: the means of J and F over the expressions. Quirk: the videos are the top of the server's
archive, <video>/<id>/<frame>.png.
"""
from benchmarks.mini import put, write_clips
from benchmarks.revos import annotate
from benchmarks.samples import Benchmark, Sample, rle_samples
from trust.files import read_json


def read_mevis(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    folder = f"{root}/{split}"
    meta = f"{folder}/meta_expressions.json"
    mask_file = f"{folder}/mask_dict.json"
    table = None if split == "valid" else read_json(mask_file)
    entries = rle_samples("mevis", folder, meta, mask_file, table)
    return [sample for sample, _, _ in entries]


def mini_mevis(root: str, videos: int, kinds: tuple = ("referring", "reasoning")):
    """kinds: of the expressions."""
    for split in ("train", "valid_u", "valid"):
        folder = f"{root}/{split}"
        hidden = split == "valid"
        # The clips of valid are none of valid_u.
        indices = range(videos, 2 * videos) if hidden else range(videos)
        meta = {}
        table = {}
        for video, scene, names in write_clips(f"{folder}/JPEGImages", split, indices, "{:012x}"):
            expressions = annotate(scene, table, kinds)
            for expression in expressions.values():
                del expression["type_id"]
                if hidden:
                    del expression["obj_id"], expression["anno_id"]
            meta[video] = dict(frames=names, expressions=expressions)
        put(dict(videos=meta), f"{folder}/meta_expressions.json")
        if not hidden:
            put(table, f"{folder}/mask_dict.json")


MEVIS = Benchmark(
    read=read_mevis,
    archive="",
    mini=mini_mevis,
)

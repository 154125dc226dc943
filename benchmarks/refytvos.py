"""Ref-YouTube-VOS (URVOS, ECCV 2020): expressions that name an object of a video.

    refytvos/
      meta_expressions/{valid,test}/meta_expressions.json
          {"videos": {video: {"frames": [name], "expressions": {id: {"exp"}}}}}
      valid/JPEGImages/<video>/<frame>.jpg

exp holds the words. Quirk: the videos to evaluate are those listed for valid and not for test, 202 in all.

The official metric is J and F, which only the server computes: the masks are not public.
"""
from benchmarks.mini import ask, put, write_clips
from benchmarks.samples import Benchmark, Sample, expressions, require
from trust.files import read_json


def read_refytvos(root: str, split: str) -> list[Sample]:
    """Samples of a split. Raises BadInput or FileNotFoundError that names what is malformed or missing."""
    test = f"{root}/meta_expressions/test/meta_expressions.json"
    left_out = require(read_json(test), "videos", test, dict)
    samples = []
    meta = f"{root}/meta_expressions/valid/meta_expressions.json"
    folder = f"{root}/valid/JPEGImages"
    for sample, _, _, _ in expressions("refytvos", meta, "exp", folder):
        if sample.video not in left_out:
            samples.append(sample)
    return samples


def mini_refytvos(root: str, videos: int):
    """Twice as many videos: the second half is listed for test, too."""
    meta = {}
    test = {}
    folder = f"{root}/valid/JPEGImages"
    for video, scene, names in write_clips(folder, "valid", range(2 * videos), "{:010x}", step=5):
        queries = {}
        for _, query, _ in ask(scene):
            queries[str(len(queries))] = dict(exp=query)
        meta[video] = dict(frames=names, expressions=queries)
        if len(meta) > videos:
            test[video] = meta[video]
    put(dict(videos=meta), f"{root}/meta_expressions/valid/meta_expressions.json")
    put(dict(videos=test), f"{root}/meta_expressions/test/meta_expressions.json")


REFYTVOS = Benchmark(
    read=read_refytvos,
    mini=mini_refytvos,
)

"""RefCOCO, RefCOCO+ (arXiv 1608.00272) and RefCOCOg (arXiv 1511.02283): sentences that name an object of a
picture.

    refer_seg/
      {refcoco,refcoco+}/{instances.json,refs(unc).p}
      refcocog/{instances.json,refs(umd).p}
      images/mscoco/images/train2014/COCO_train2014_<number>.jpg

instances.json lists images and annotations as COCO does: a mask is polygons, or run lengths. The pickle
lists references, each with a split, an image, an annotation and sentences. Every sentence is a sample. In
training it is a clip of one frame; in evaluation a box is asked for.

The metrics in use: gIoU, the mean of the IoUs; cIoU, all intersections over all unions; Acc@0.5, the share
of predictions whose box and the box around the true mask have an IoU above 0.5. Quirk: two empty masks have
IoU 1.
Letters: H W pixels.
"""
import os
import pickle
import resource
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from benchmarks.metrics import picture_subsets, score_picture
from benchmarks.mini import put, rectangles, stills
from benchmarks.samples import Benchmark, Sample, faults_of, near_corners, require, rle_mask, with_masks
from benchmarks.toy import CANVAS
from trust.errors import BadInput, reading
from trust.files import check_file, check_name, read_json

# Bytes, for references. The largest published file of them takes a tenth.
MOST_MEMORY = 2**32
UNC = ("train", "val", "testA", "testB")
UMD = ("train", "val", "test")
IMAGES = "images/mscoco/images/train2014"
ID = (int, str)       # types of the ids


def read_refer(name: str, by: str, root: str, split: str) -> list[Sample]:
    """Samples of a split of the dataset `name`, whose splits were made by "unc" or "umd".

    Raises BadInput or FileNotFoundError that names what is malformed or missing.
    """
    path = f"{root}/{name}/instances.json"
    refs = f"{root}/{name}/refs({by}).p"
    instances = read_json(path)
    references = read_pickle(refs)
    images = by_id(require(instances, "images", path, list), path)
    annotations = by_id(require(instances, "annotations", path, list), path)
    samples = []
    for i, ref in enumerate(references):
        if require(ref, "split", refs) != split:
            continue
        where = f"reference {i} of {refs}"
        reference = Sample("vos", name, "reference", str(i), "", "", [], [])
        # One that has none is a broken sample itself.
        sentences = [None]
        shape = []
        with faults_of(reference):
            sentences = require(ref, "sentences", where, list) or sentences
            shape = read_reference(reference, ref, where, root, images, annotations)
        for n, sentence in enumerate(sentences):
            sample = replace(reference, expression=f"{i}-{n}")
            with faults_of(sample):
                sample.expression = str(require(sentence, "sent_id", where, ID))
                sample.query = require(sentence, "sent", where, str)
            samples.append(with_masks(sample, coco_mask, sample, shape, where))
    return samples


def by_id(records, path):
    """{id: record} of a list of records. One without an id is left out: what refers to it says so."""
    table = {}
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("id"), ID):
            continue
        key = record["id"]
        if table.setdefault(key, record) != record:
            raise BadInput(f"the id {key} comes twice in {path}")
    return table


def read_reference(sample, ref, where, root, images, annotations):
    """Fills in a reference's picture and object. Returns the object's segmentation.

    Raises BadInput for what is missing.
    """
    number = require(ref, "ann_id", where, ID)
    image = require(images, require(ref, "image_id", where, ID), f"the images, for {where}")
    annotation = require(annotations, number, f"the annotations, for {where}")
    shape = require(annotation, "segmentation", f"annotation {number}, for {where}", (list, dict))
    file = check_name(require(image, "file_name", where, str), where)
    sample.video = os.path.splitext(file)[0]
    # In pixels of this size are its polygons.
    sample.truth["size"] = require(image, "height", where, int), require(image, "width", where, int)
    sample.names = [sample.video]
    sample.pictures = [os.path.join(root, IMAGES, file)]
    sample.objects = 1
    sample.ids = (str(number),)
    return shape


class PlainUnpickler(pickle.Unpickler):
    """Refuses all but plain data: a pickle that may name functions can run any code."""

    def find_class(self, module, name):
        raise ValueError(f"holds {module}.{name}, not plain data")


@contextmanager
def bounded_memory(most: int):
    """Inside, the process may take at most so many more bytes. Beyond, Python raises MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[5])
        limits.append(pages * resource.getpagesize() + most)
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def read_pickle(path):
    """The list in a pickle of plain data, written by Python 2. Raises BadInput that names the file."""
    check_file(path)
    with reading(path), open(path, "rb") as file:
        try:
            # A few bytes of a pickle can ask for any memory.
            with bounded_memory(MOST_MEMORY):
                value = PlainUnpickler(file, encoding="latin1").load()
        except MemoryError:
            raise BadInput(f"cannot use {path} (it asks for more than {MOST_MEMORY} bytes)") from None
        if not isinstance(value, list):
            raise ValueError(f"a list expected, not a {type(value).__name__}")
    return value


def coco_mask(sample, shape, where, indices=None):
    """bool [1, 1, H, W] of a COCO segmentation: polygons [x, y, x, y, ...], or a run-length encoding.

    Raises BadInput that names `where`.
    """
    width, height = sample.read_picture(sample.pictures[0]).size
    if (height, width) != sample.truth["size"]:
        raise BadInput(f"a picture of {width} x {height}, but its polygons are of another size: {where}")
    if isinstance(shape, dict):
        return rle_mask(shape, where, (height, width))[None, None]
    from pycocotools import mask as coco
    polygons = []
    for numbers in shape:
        if not isinstance(numbers, list) or len(numbers) < 6 or len(numbers) % 2:
            raise BadInput(f"no polygons in {where}")
        polygons.append(list(zip(numbers[::2], numbers[1::2])))
    if not polygons:
        raise BadInput(f"no polygons in {where}")
    near_corners(polygons, height, width, where)
    with reading(where):
        # Where polygons overlap, a pixel counts once.
        union = coco.merge(coco.frPyObjects(shape, height, width))
        union["counts"] = union["counts"].decode()
    return rle_mask(union, where, (height, width))[None, None]


# ---- the miniature ---------------------------------------------------------------------------------
def mini_refer(root: str, videos: int):
    """All three datasets: they share the folder of pictures."""
    for name, by, splits in (("refcoco", "unc", UNC), ("refcoco+", "unc", UNC), ("refcocog", "umd", UMD)):
        images = []
        annotations = []
        refs = []
        for split in splits:
            for picture, masks, things in stills(split, videos):
                image = len(images) + 1
                file = f"COCO_train2014_{image:012d}.jpg"
                put(picture, f"{root}/{IMAGES}/{file}")
                images.append(dict(id=image, file_name=file, height=CANVAS, width=CANVAS))
                for mask, thing in zip(masks, things):
                    number = len(refs) + 1
                    annotations.append(dict(id=number, image_id=image, segmentation=polygons(mask)))
                    sentences = [
                        dict(sent=f"the {thing}", sent_id=2 * number),
                        dict(sent=thing, sent_id=2 * number + 1),
                    ]
                    refs.append(dict(
                        ref_id=number, ann_id=number, image_id=image, split=split, sentences=sentences))
        put(dict(images=images, annotations=annotations), f"{root}/{name}/instances.json")
        put(pickle.dumps(refs, protocol=2), f"{root}/{name}/refs({by}).p")


def polygons(mask):
    """Polygons as COCO has them, corners between the pixels, that are together the mask [H, W]."""
    shape = []
    for x1, y1, x2, y2 in rectangles(mask):
        shape.append([x1, y1, x2 + 1, y1, x2 + 1, y2 + 1, x1, y2 + 1])
    return shape


REFCOCO = Benchmark(
    read=partial(read_refer, "refcoco", "unc"),
    task="image",
    score=score_picture,
    subsets=picture_subsets,
    columns=("gIoU", "cIoU", "Acc@0.5"),
    paired="IoU",
    mini=mini_refer,
)
REFCOCO_PLUS = replace(REFCOCO, read=partial(read_refer, "refcoco+", "unc"))
REFCOCOG = replace(REFCOCO, read=partial(read_refer, "refcocog", "umd"))

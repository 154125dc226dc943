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
from dataclasses import replace
from functools import partial

from benchmarks.media import read_image
from benchmarks.metrics import picture_subsets, score_picture
from benchmarks.mini import put, rectangles, stills
from benchmarks.samples import Benchmark, Sample, require, rle_mask, with_masks
from benchmarks.toy import CANVAS
from trust.errors import BadInput, reading
from trust.files import read_json

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
    images = {}
    for image in require(instances, "images", path, list):
        images[require(image, "id", path, ID)] = image
    annotations = {}
    for annotation in require(instances, "annotations", path, list):
        annotations[require(annotation, "id", path, ID)] = annotation

    samples = []
    for ref in references:
        if require(ref, "split", refs) != split:
            continue
        where = f"{path} (reference {require(ref, 'ref_id', refs)})"
        number = require(ref, "ann_id", refs, ID)
        image = require(images, require(ref, "image_id", refs, ID), where)
        annotation = require(annotations, number, where)
        shape = require(annotation, "segmentation", where, (list, dict))
        picture = os.path.join(root, IMAGES, require(image, "file_name", where, str))
        stem = os.path.splitext(os.path.basename(picture))[0]
        for sentence in require(ref, "sentences", refs, list):
            key = str(require(sentence, "sent_id", refs))
            query = require(sentence, "sent", refs, str)
            sample = Sample("vos", name, stem, key, query, "", [stem], [picture])
            sample.objects = 1
            sample.ids = (str(number),)
            samples.append(with_masks(sample, coco_mask, picture, shape, where))
    return samples


class PlainUnpickler(pickle.Unpickler):
    """Refuses all but plain data: a pickle that may name functions can run any code."""

    def find_class(self, module, name):
        raise ValueError(f"holds {module}.{name}, not plain data")


def read_pickle(path):
    """The list in a pickle of plain data, written by Python 2. Raises BadInput that names the file."""
    with reading(path), open(path, "rb") as file:
        value = PlainUnpickler(file, encoding="latin1").load()
        if not isinstance(value, list):
            raise ValueError(f"a list expected, not a {type(value).__name__}")
    return value


def coco_mask(picture, shape, where, indices=None):
    """bool [1, 1, H, W] of a COCO segmentation: polygons [x, y, x, y, ...], or a run-length encoding.

    Raises BadInput that names `where`.
    """
    if isinstance(shape, dict):
        return rle_mask(shape, where)[None, None]
    from pycocotools import mask as coco
    if not shape:
        raise BadInput(f"no polygons in {where}")
    for polygon in shape:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise BadInput(f"no polygons in {where}")
    width, height = read_image(picture).size
    with reading(where):
        # Where polygons overlap, a pixel counts once.
        union = coco.merge(coco.frPyObjects(shape, height, width))
        union["counts"] = union["counts"].decode()
    return rle_mask(union, where)[None, None]


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
    name="refcoco",
    folder="refer_seg",
    splits=UNC,
    read=partial(read_refer, "refcoco", "unc"),
    tested="val",
    task="image",
    score=score_picture,
    subsets=picture_subsets,
    columns=("gIoU", "cIoU", "Acc@0.5"),
    paired="IoU",
    mini=mini_refer,
)
REFCOCO_PLUS = replace(REFCOCO, name="refcoco+", read=partial(read_refer, "refcoco+", "unc"))
REFCOCOG = replace(REFCOCO, name="refcocog", splits=UMD, read=partial(read_refer, "refcocog", "umd"))

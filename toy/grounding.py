"""The grounding turn of a toy policy by itself, for toy/study.py.

    python toy/grounding.py pictures --policy DIR --out DIR    two pictures of a clip -> OUT/results.json
    python toy/grounding.py frames --policy DIR --out DIR      one system in place of two -> OUT/Annotations

pictures   System 2 is asked for the target by its plain name: on the clearest frame of it (IoU with the true
           box), and on a frame that does not show it (whether it boxes something all the same).
frames     There is no System 1, no keyframe and no description: the policy gets the query as it is, and
           grounds it on evenly spaced frames at the low resolution of System 1's video. Together they have at
           most as many visual tokens as System 1's video and one keyframe of System 2 (fewer where the clip
           has too few frames). The first box of each frame is a prompt of one object for SAM2.
           `eval.py --predictions OUT` scores its masks.
"""
import sys
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
sys.path.insert(0, ROOT)

from trust.errors import BadInput, fail
from trust.options import (
    TOY_POLICY,
    TOY_SAM2,
    Parser,
    at_least,
    check_out,
    check_policy_folder,
)
from trust.program import begin_program


def read_options(arguments=None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("what", choices=["pictures", "frames"])
    add("--policy", default=TOY_POLICY, metavar="DIR", help="whose grounding turn it is")
    add("--clips", type=at_least(1), default=200, help="of the test split")
    add("--out", default="out/grounding", metavar="DIR", help="folder of all that is written")
    options = parser.parse_args(arguments)
    try:
        check_policy_folder(options.policy)
        check_out(options.out)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_options()

import os

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import find_benchmark, open_split
from benchmarks.predictions import check_claim, fingerprint, unpredicted, write_prediction
from benchmarks.reports import write_json
from benchmarks.samples import load
from benchmarks.toy import draw_query, toy_scene
from data import Processor, spread
from model import Thinker
from rewards import box_iou, mask_box
from segment import Tracker, thinker_system2

PICTURES_AT_ONCE = 64


# ---- two pictures of a clip ------------------------------------------------------------------------
def ask_pictures(options):
    """Writes OUT/results.json: a row for each picture, kind "shown" with IoU or "hidden" with boxed, in %."""
    system2 = thinker_system2(Thinker.from_pretrained(options.policy), Processor(options.policy))
    rows = []
    pictures = []
    truth = []
    for index in range(options.clips):
        for kind, name, picture, box in two_pictures(index):
            rows.append(dict(name=f"toy/test/{index}/{kind}", kind=kind, query=name))
            pictures.append(picture)
            truth.append(box)
    for first in tqdm(range(0, len(rows), PICTURES_AT_ONCE), "pictures"):
        part = slice(first, first + PICTURES_AT_ONCE)
        names = [row["query"] for row in rows[part]]
        for row, true, boxes in zip(rows[part], truth[part], system2(pictures[part], names)):
            if row["kind"] == "shown":
                row["IoU"] = 100 * float(box_iou(boxes[:1], [true])[0, 0]) if boxes else 0.0
            else:
                row["boxed"] = 100.0 * bool(boxes)
    os.makedirs(options.out, exist_ok=True)
    write_json(dict(expressions=rows), f"{options.out}/results.json")


def two_pictures(index):
    """[(kind, name of the target, picture, true box)] of a test clip: at most one shown and one hidden.

    Nothing of a null query. The hidden one is the first frame without a pixel of the target.
    """
    scene = toy_scene("test", index)
    _, _, target = draw_query(scene, "test", index)
    if target is None:
        return []
    name = scene.things[target].name
    areas = scene.masks[target].sum((1, 2))
    clearest = int(areas.argmax())
    picture = Image.fromarray(scene.pictures[clearest])
    found = [("shown", name, picture, mask_box(scene.masks[target, clearest]))]
    hidden = np.flatnonzero(areas == 0)
    if len(hidden):
        found.append(("hidden", name, Image.fromarray(scene.pictures[hidden[0]]), None))
    return found


# ---- one system ------------------------------------------------------------------------------------
def segment_frames(options):
    """Writes to OUT/Annotations the masks of the clips that have none yet."""
    # The budget is that of the two systems, whatever the policy was trained with.
    usual = Processor(TOY_POLICY)
    low = usual.video_tokens
    policy = Thinker.from_pretrained(options.policy)
    system2 = thinker_system2(policy, Processor(options.policy, image_tokens=low))
    tracker = Tracker.from_pretrained("", TOY_SAM2)
    claim = dict(system2="one system", policy=os.path.realpath(options.policy),
                 policy_weights=fingerprint(options.policy))
    check_claim(options.out, claim)
    os.makedirs(options.out, exist_ok=True)
    write_json(claim, f"{options.out}/run.json")
    samples = open_split(find_benchmark("toy"), "test", "")[:options.clips]
    for sample in tqdm(unpredicted(options.out, samples), "clips"):
        clip = load(sample)
        T = len(clip.frames)
        pairs = -(-T // usual.pair)
        times = spread(T, pairs + usual.image_tokens // low)
        pictures = [clip.frames[t] for t in times]
        boxes = system2(pictures, [clip.query] * len(times))
        prompts = {t: found[0] for t, found in zip(times, boxes) if found}
        masks = np.zeros((T, *clip.size), bool)
        if prompts:
            masks = tracker.track(clip.frames, [prompts])[0]
        write_prediction(options.out, sample, masks)


def main(arguments=None):
    options = read_options(arguments)
    try:
        if options.what == "pictures":
            ask_pictures(options)
        else:
            segment_frames(options)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

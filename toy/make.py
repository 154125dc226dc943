"""Makes the toy world's weights from nothing (see toy/README.md).

    torchrun --nproc_per_node 2 toy/make.py policy    a tiny Qwen2.5-Omni Thinker, cold-started by supervision
    python toy/make.py sam2                           a small configuration of sam2's own classes
    python toy/make.py check                          measures those that are there

Seeded, so every draw and every sum has its place: another order makes other weights.
"""
import argparse
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data import Processor
from model import Thinker
from segment import Tracker
from toy.make_policy import grounding_iou, make_policy
from toy.make_sam2 import STAGES, make_sam2, tracking_quality
from trust.errors import BadInput, fail


def check(policy, sam2):
    """Prints what each of the two models does by itself on held-out clips."""
    iou = grounding_iou(Thinker.from_pretrained(policy), Processor(policy))
    print(f"policy: grounding IoU {iou:.3f}")
    tracker = Tracker.from_pretrained(os.path.join(sam2, "config.yaml"), os.path.join(sam2, "model.pt"))
    for split in ("test", "pairs", "long"):
        J, boundary = tracking_quality(tracker, split)
        print(f"sam2: from a true box, split {split}: J {J:.3f} F {boundary:.3f}")


def main(arguments=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=["policy", "sam2", "check"])
    add("--tower_steps", type=int, default=1400, help="steps for the towers alone, first")
    add("--text_steps", type=int, default=350, help="steps for the language model alone, second")
    add("--steps", type=int, default=3000, help="steps for all, third")
    add("--resting", type=float, default=0.8, help="share of these steps in which the towers rest")
    add("--scenes", type=int, default=3000, help="scenes rendered for training, by each process")
    add("--first_scene", type=int, default=0, help="number of the first of them")
    add("--begin", metavar="DIR", help="go on from this policy: only the third stage")
    add("--rate", type=float, default=1.0, help="times the learning rates of the third stage")
    add("--batch", type=int, default=18, help="videos, and twice as many pictures, a step of each process")
    add("--seed", type=int, default=0)
    add("--decay", type=float, default=0.7,
        help="share of the steps over which the learning rate goes down to 0")
    add("--threads", type=int, default=1, help="CPU threads of a process")
    add("--out", default=os.path.join(ROOT, "toy"), help="folder of the folders policy and sam2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    policy = os.path.join(options.out, "policy")
    sam2 = os.path.join(options.out, "sam2")
    try:
        if options.what == "check":
            check(policy, sam2)
        elif options.what == "sam2":
            make_sam2(sam2, STAGES, 800, options.seed)
        else:
            make_policy(policy, options)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

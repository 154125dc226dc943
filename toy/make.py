"""Makes the toy world's weights from nothing (see toy/README.md).

    torchrun --nproc_per_node 2 toy/make.py policy --out DIR    a tiny Qwen2.5-Omni Thinker, cold-started
    python toy/make.py sam2 --out DIR                           a small configuration of sam2's own classes
    python toy/make.py check                                    measures those that are there

The options but for --seed, --threads and --out are those of the policy.

Seeded, so every draw and every sum has its place: another order makes other weights.
"""
import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from trust.program import begin_program

if __name__ == "__main__":
    begin_program()

import torch
from safetensors import SafetensorError

from data import Processor
from model import Thinker
from segment import Tracker
from toy.make_policy import grounding_iou, make_policy
from toy.make_sam2 import STAGES, make_sam2, tracking_quality
from trust.errors import BadInput, fail
from trust.options import Parser, at_least, check_out


def between(least: float, most: float):
    """An argparse type: numbers from `least` to `most`."""
    def number(text):
        if not least <= float(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return float(text)
    return number


def check(policy, sam2):
    """Prints what each of the two models does by itself on held-out clips."""
    iou = grounding_iou(Thinker.from_pretrained(policy), Processor(policy))
    print(f"policy: grounding IoU {iou:.3f}")
    tracker = Tracker.from_pretrained(os.path.join(sam2, "config.yaml"), os.path.join(sam2, "model.pt"))
    for split in ("test", "pairs", "long"):
        J, boundary = tracking_quality(tracker, split)
        print(f"sam2: from a true box, split {split}: J {J:.3f} F {boundary:.3f}")


def read_options(arguments=None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("what", choices=["policy", "sam2", "check"])
    add("--tower_steps", type=at_least(0), default=1400, help="steps for the towers alone, first")
    add("--text_steps", type=at_least(0), default=350, help="steps for the language model alone, second")
    add("--steps", type=at_least(1), default=3000, help="steps for all, third")
    add("--resting", type=between(0, 1), default=0.8, help="share of these steps in which the towers rest")
    add("--scenes", type=at_least(1), default=3000, help="scenes rendered for training, by each process")
    add("--first_scene", type=at_least(0), default=0, help="number of the first of them")
    add("--begin", metavar="DIR", help="go on from this policy: only the third stage")
    add("--rate", type=between(0, 10), default=1.0, help="times the learning rates of the third stage")
    add("--batch", type=at_least(2), default=18,
        help="videos, and twice as many pictures, a step of each process")
    add("--seed", type=at_least(0), default=0)
    add("--decay", type=between(0.001, 1), default=0.7,
        help="share of the steps over which the learning rate goes down to 0")
    add("--threads", type=at_least(1), default=1, help="CPU threads of a process")
    add("--out", help="folder of the folders policy and sam2 (default: toy; only for check)")
    options = parser.parse_args(arguments)
    if options.out is None and options.what != "check":
        parser.error(f"{options.what}: --out is needed, the folder to write to")
    return options


def main(arguments=None):
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    folder = options.out or os.path.join(ROOT, "toy")
    policy = os.path.join(folder, "policy")
    sam2 = os.path.join(folder, "sam2")
    try:
        if options.what == "check":
            check(policy, sam2)
            return
        check_out(options.out)
        if options.what == "sam2":
            make_sam2(sam2, STAGES, 800, options.seed)
        else:
            make_policy(policy, options)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    # The error of safetensors for a full disk names no file.
    except SafetensorError as error:
        sys.exit(fail(f"cannot write {policy} ({error})"))


if __name__ == "__main__":
    main()

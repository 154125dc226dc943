"""Supervised fine-tuning of the toy policy on right answers: what GRPO is compared with.

    python toy/supervised.py --seed 0 --out out/supervised/policy

The clips are those of the GRPO run of the same seed, in the same order and with the same prompts. Batch,
steps and updates a step are the same too, so both make as many optimizer updates of as many clips. GRPO
updates several times on a batch before it draws the next; here the run goes over all its clips so many times,
which suits supervision better. Answers are right in all their parts: narration, target, the clearest frame.
With --reasoning false they name the target at once: data sets with masks tell no more than that.

With --turn grounding the policy learns to do without System 1: it is asked the query of each clip as it is,
on one random frame at the low resolution of System 1's video. The right answer is the true box, or null.

A run takes two minutes and keeps no checkpoints: one that was cut off begins anew.
"""
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
sys.path.insert(0, ROOT)

from trust.errors import BadInput, fail
from trust.files import PARTIAL, read_json, writing
from trust.options import (
    LARGEST_SEED,
    TOY_POLICY,
    Parser,
    at_least,
    check_out,
    check_policy_folder,
    true_or_false,
)
from trust.program import begin_program


TRAINING_CLIPS = 100_000    # of the split train


def read_options(arguments=None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--policy", default=TOY_POLICY, metavar="DIR",
        help="where to start; its training.json has the numbers that are not given")
    add("--data", default="toy", choices=["toy", "toy_four"],
        help="toy_four leaves two kinds of reasoning query out")
    add("--reasoning", type=true_or_false, default=True,
        help="whether answers to queries say what is seen before they name the target")
    add("--turn", default="keyframes", choices=["keyframes", "grounding"], help="what is learned")
    add("--seed", type=at_least(0), default=0)
    add("--steps", type=at_least(1), help="batches of different clips")
    add("--batch", type=at_least(1), help="clips of an update")
    add("--updates", type=at_least(1), help="how often the run goes over its clips")
    add("--lr", type=float, default=7e-4, help="peak learning rate of AdamW")
    add("--out", default="out/supervised", metavar="DIR", help="the directory of the trained policy")
    options = parser.parse_args(arguments)
    try:
        check_policy_folder(options.policy)
        check_out(options.out)
        # "a/" is "a", and "a/.." has a name.
        options.out = os.path.abspath(options.out)
        if os.path.exists(options.out):
            raise BadInput(f"{options.out} exists; give another --out")
        take_advice(options)
        if options.seed > LARGEST_SEED:
            raise BadInput(f"--seed {options.seed} must be at most {LARGEST_SEED}")
        if not 0 < options.lr < 1:
            raise BadInput(f"--lr {options.lr} must be between 0 and 1")
        if options.steps * options.batch > TRAINING_CLIPS:
            raise BadInput(f"--steps {options.steps} of {options.batch} clips are more than {TRAINING_CLIPS}")
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


def take_advice(options) -> None:
    """Sets the numbers that are not given to those of the policy's training.json, or 1."""
    path = os.path.join(options.policy, "training.json")
    advice = read_json(path)
    for name in ("steps", "batch", "updates"):
        if getattr(options, name) is None:
            value = advice.get(name, 1)
            if type(value) is not int or value < 1:
                raise BadInput(f"{path}: {name} must be a whole number from 1, not {value}")
            setattr(options, name, value)


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_options()

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from benchmarks.toy import HELD_OUT, draw_query, scene_clip, toy_scene
from data import Processor, grounding_prompt, prompt_inputs
from model import Thinker
from rewards import mask_box
from toy.lessons import box_answer, right_answer, scene_accounts, unreasoned_answer
from toy.make_policy import supervised_loss
from toy.pool import Batch

WARMUP = 0.1                # share of the updates
CLIP_NORM = 5.0
WEIGHT_DECAY = 0.01


# ---- training --------------------------------------------------------------------------------------
def training_order(seed: int) -> np.ndarray:
    """Indices of the clips of a run of train.py on the toy, in order: the first epoch (run/draw.py)."""
    return np.random.default_rng([seed, 0]).permutation(TRAINING_CLIPS)


def example(processor, index, seed, place, left_out, answer=right_answer):
    """(Inputs, right answer) of a training clip, with the prompt that clip number `place` of a run has."""
    scene = toy_scene("train", index)
    kind, query, target = draw_query(scene, "train", index, left_out)
    clip = scene_clip(scene, f"train/{index}", kind, query, target)
    own_seed = int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 2)
    inputs = prompt_inputs(processor, clip, np.random.default_rng(own_seed))
    name = None if target is None else scene.things[target].name
    return inputs, answer(kind, scene_accounts(scene), name)


def grounding_example(processor, index, seed, place, left_out):
    """(Inputs, right answer) of the grounding turn on one frame of a training clip."""
    scene = toy_scene("train", index)
    _, query, target = draw_query(scene, "train", index, left_out)
    rng = np.random.default_rng([seed, place])
    t = int(rng.integers(len(scene.pictures)))
    picture = Image.fromarray(scene.pictures[t])
    inputs = processor.image_inputs(grounding_prompt(query), picture)
    box = None if target is None else mask_box(scene.masks[target, t])
    if box is None:
        return inputs, "null"
    scale = inputs.scale[0]    # of both sides: the toy's pictures are square
    return inputs, box_answer(np.divide(box, scale).round())


def learning_rate(n, total) -> float:
    """Share of the peak at update n: linear warm-up, then a cosine down to 0."""
    warmup = max(1, round(WARMUP * total))
    if n < warmup:
        return (n + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (n - warmup) / max(1, total - warmup)))


def train(options):
    """Writes the trained policy to OUT, all at once."""
    torch.manual_seed(options.seed)
    thinker = Thinker.from_pretrained(options.policy)
    processor = Processor(options.policy)
    draw = example if options.reasoning else partial(example, answer=unreasoned_answer)
    if options.turn == "grounding":
        processor = Processor(options.policy, image_tokens=processor.video_tokens)
        draw = grounding_example
    trained = [p for p in thinker.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=WEIGHT_DECAY)
    order = training_order(options.seed)
    left_out = HELD_OUT if options.data == "toy_four" else ()
    total = options.steps * options.updates
    for n in range(total):
        first = n % options.steps * options.batch
        places = range(first, first + options.batch)
        # Nothing but the answers' tokens: the readings of toy/make.py are for the cold start.
        batch = Batch()
        for i in places:
            batch.add(*draw(processor, order[i], options.seed, i, left_out))
        prompts = thinker.embed(batch.inputs)
        loss, _ = supervised_loss(thinker, processor, None, prompts, batch)
        optimizer.param_groups[0]["lr"] = options.lr * learning_rate(n, total)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if n % 20 == 0 or n == total - 1:
            print(f"{n} of {total}: loss {loss.item():.3f}", flush=True)
    write_policy(thinker, processor, Path(options.out))


def write_policy(thinker, processor, out: Path) -> None:
    """Writes a policy's directory all at once. Raises OSError where it cannot be written."""
    partial = out.with_name(f"{out.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(partial):
            thinker.save_pretrained(partial)
            processor.save(partial)
        os.replace(partial, out)
    # safetensors has an error of its own for a full disk.
    except SafetensorError as error:
        raise OSError(f"cannot write {partial} ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments=None):
    try:
        train(read_options(arguments))
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

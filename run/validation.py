"""Validation: greedy answers to the clips that are kept out of training."""
import numpy as np
import torch.distributed as dist

from data import prompt_inputs
from grpo import judge, read_keyframes, roll_out
from rewards import total_rewards
from run.draw import read_clip
from run.processes import sums_over_processes
from segment import ground


def validate(systems, items, settings, watch, album) -> float | None:
    """Mean reward of greedy answers to the clips kept out, over all processes. None if none can be read."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    total = 0.0
    count = 0
    # The processes work together, so each takes equally many. Clips taken a second time do not count.
    for k in range(rank, -(-len(items) // world) * world, world):
        clip = read_clip(*items[k % len(items)], np.random.default_rng([settings.seed, k]))
        inputs = prompt_inputs(systems.processor, clip, np.random.default_rng([settings.seed, k]))
        reward = greedy_reward(systems, clip, inputs, settings, watch, album)
        if k < len(items) and not clip.fault:
            total += reward
            count += 1
    sums = sums_over_processes(dict(total=total, count=count), systems.policy.device)
    return round(sums["total"] / sums["count"], 6) if sums["count"] else None


def greedy_reward(systems, clip, inputs, settings, watch, album) -> float:
    """The reward of the likeliest answer to one prompt."""
    watch.begin("validation")
    prompts = systems.reference.embed([inputs])
    drawn, texts = roll_out(systems, prompts, 1, temperature=0.0, seeds=[0], settings=settings)
    chosen = read_keyframes([clip], texts)
    with systems.reference_awake():
        boxes = ground(systems.system2, [clip], chosen)
    terms = judge(systems, [clip], [inputs], texts, boxes, settings, watch)
    lengths = [len(drawn[0][0])]
    reward = float(total_rewards(terms[0], lengths, settings)[0])
    album.keep(clip, texts[0][0], boxes[0][0], terms[0][0], reward, lengths[0])
    return reward

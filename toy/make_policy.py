"""Trains the toy's policy from nothing: the towers, then text alone, then all of it.

Letters: B prompts, S tokens of a padded row, C tokens of an answer, D width of the model.
"""
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.toy import CANVAS, COLOURS, SHAPES, toy_scene
from data import Processor, grounding_prompt, parse_boxes
from model import Thinker, read_config
from rewards import box_iou
from toy.directory import TIMES, write_directory
from toy.lessons import KINDS
from toy.optimizers import Optimizers, ramp
from toy.pool import Pool, visible_things
from trust.errors import BadInput, reading


# ---- losses of the policy --------------------------------------------------------------------------
def supervised_loss(thinker, processor, readings, prompts, batch):
    """(mean negative log-likelihood of the answers' tokens, loss of the readings) of a Batch.

    The end of the message counts as a token of the answer. The readings are linear layers, thrown away
    afterwards, that read visual tokens inside the language model: after its first layer, which colours and
    shapes they show and which are asked for; after its second, whether they show the very thing, and what has
    just entered or left. To bring these together is the one step that a small model is slow to find by
    itself.
    """
    ids = [answer_ids(processor, answer) for answer in batch.answers]
    lengths = torch.tensor([len(own) for own in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)    # (B, C)
    logp, layers = watched_logprobs(thinker, prompts, padded)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    likelihood = (logp * mask).sum() / mask.sum()
    first, second = [visual_tokens(processor, hidden, prompts) for hidden in layers]
    return -likelihood, reading_loss(readings, batch, first, second)


def reading_loss(readings, batch, first, second):
    """Loss of the readings of a Batch. first, second: its visual tokens after these layers, [(tokens, D)]."""
    loss = torch.zeros(())
    marked = known(batch.marks)
    if marked:
        marks = [batch.marks[i] for i in marked]
        loss = loss + mark_loss(readings, joined(first, marked), joined(second, marked), marks)
    changed = known(batch.changes)
    if changed:
        logits = readings["changes"](joined(second, changed))
        true = joined(batch.changes, changed).float()
        # Changes are rare.
        loss = loss + 10 * F.binary_cross_entropy_with_logits(logits, true)
    return loss


def known(labels):
    """Places of the prompts that have such labels."""
    return [i for i, own in enumerate(labels) if own is not None]


def joined(tensors, places):
    return torch.cat([tensors[i] for i in places])


def batch_loss(thinker, pool, readings, batch):
    """supervised_loss of a batch of the pool."""
    prompts = pool.prompts(thinker, batch)
    return supervised_loss(thinker, pool.processor, readings, prompts, batch)


def answer_ids(processor, answer):
    """The tokens of an answer and of the message's end, int64 (n,)."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return torch.tensor([*processor.tokenizer.encode(answer, add_special_tokens=False), end])


def watched_logprobs(thinker, prompts, answers):
    """(log-probabilities (B, C), hidden states (B S, D) after each of the first two layers)."""
    layers = []

    def keep(module, given, hidden):
        layers.append(hidden)

    hooks = [layer.register_forward_hook(keep) for layer in thinker.model.layers[:2]]
    logp, _ = thinker(prompts, answers)
    for hook in hooks:
        hook.remove()
    return logp, layers


def visual_tokens(processor, hidden, prompts):
    """Hidden states (B S, D) of right-padded rows -> of each prompt (visual tokens, D), normalised."""
    rows = F.rms_norm(hidden, hidden.shape[-1:])
    rows = rows.unflatten(0, (len(prompts), -1))    # (B, S, D)
    tokens = []
    for row, prompt in zip(rows, prompts):
        visual = (prompt.ids == processor.image) | (prompt.ids == processor.video)
        tokens.append(row[:len(prompt.ids)][visual])
    return tokens


def mark_loss(readings, first, second, marks):
    """Loss of the readings of what the query asks for, after the first layer and after the second."""
    own, query, target = [torch.cat(labels) for labels in zip(*marks)]
    something = own.any(1)
    loss = F.binary_cross_entropy_with_logits(readings["own"](first), own)
    loss = loss + F.binary_cross_entropy_with_logits(readings["query"](first), query)
    logits = readings["target"](second)[something, 0]
    return loss + F.binary_cross_entropy_with_logits(logits, target[something])


# ---- training the policy ---------------------------------------------------------------------------
def train_towers(thinker, pool, steps, batch):
    """The towers first and alone, as those of the real model were.

    Each of their tokens has to tell which kinds it shows, the box of the largest, and what it sounds like,
    through linear layers that are thrown away. From such tokens the language model learns to bind words to
    things many times sooner.
    """
    width = thinker.config.text_config.hidden_size
    heads = nn.ModuleDict(dict(
        shown=nn.Linear(width, 2 * len(KINDS)),
        shape=nn.Linear(width, 2 * len(SHAPES)),
        box=nn.Linear(width, 8),
        heard=nn.Linear(width, len(KINDS) + 1),
    ))
    optimizers = Optimizers(nn.ModuleList([thinker.visual, thinker.audio_tower, heads]))
    rng = np.random.default_rng(pool.rng.integers(2 ** 32))
    start = time.time()
    for step in range(steps):
        videos = drawn(rng, pool.videos, batch)
        pictures = drawn(rng, pool.pictures, batch // 2)
        losses, recall = tower_losses(thinker, pool.processor, heads, videos, pictures)
        optimizers.step(sum(losses.values()), ramp(step, steps, 50, 0.4))
        if step % 50 == 0 or step == steps - 1:
            values = " ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"towers {step}: {values} recall {recall:.2f} {time.time() - start:.0f} s", flush=True)


def drawn(rng, items, n):
    return [items[i] for i in rng.integers(len(items), size=n)]


def tower_losses(thinker, processor, heads, videos, pictures):
    """({name: loss}, share of the kinds shown that the tokens tell) of videos and pictures of the pool."""
    inputs = [replace(video.media, patches=video.media.patches.float()) for video in videos]
    for picture in pictures:
        image = Image.fromarray(picture.pixels)
        inputs.append(processor.image_inputs(grounding_prompt(""), image))
    sources = [*videos, *pictures]
    seen = torch.cat(thinker.see(inputs))                          # (visual tokens, D)
    heard = torch.cat(thinker.hear(inputs))                        # (audio tokens, D)
    shown = torch.cat([source.shown for source in sources])        # (visual tokens, 2 K)
    boxes = torch.cat([source.boxes for source in sources])        # (visual tokens, 8)
    kinds = torch.cat([video.heard for video in videos])           # (audio tokens,)
    there = boxes >= 0
    logits = heads["shown"](seen)
    losses = dict(
        shown=5 * F.binary_cross_entropy_with_logits(logits, shown.float()),
        # Colours are seen soon. Shapes, at a video's resolution, are not without this term.
        shape=2 * F.binary_cross_entropy_with_logits(heads["shape"](seen), shapes_of(shown)),
        box=5 * F.smooth_l1_loss(heads["box"](seen)[there], boxes[there], beta=0.02),
        heard=0.2 * F.cross_entropy(heads["heard"](heard), kinds),
    )
    right = (logits > 0) & shown
    return losses, (right.sum() / shown.sum()).item()


def shapes_of(shown):
    """The shapes on each token's first frame and on its second, float (tokens, 6). shown: (tokens, 2 K)."""
    kinds = shown.unflatten(1, (2, len(COLOURS), len(SHAPES)))
    return kinds.any(2).flatten(1).float()


@torch.no_grad()
def order_numbers(thinker, processor):
    """Starts the embeddings and head rows of numbers and of times as waves along the number line.

    What is learned of one number then holds for its neighbours.
    """
    embeddings = thinker.model.embed_tokens.weight
    head = thinker.lm_head.weight
    for words in ([str(n) for n in range(CANVAS)], TIMES):
        ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in words]
        n = torch.arange(len(words))[:, None] / len(words)
        k = torch.arange(16)[None]
        waves = torch.cat([(torch.pi * k * n).cos(), (torch.pi * k * n).sin()], dim=1)
        waves = waves * 0.9 ** k.repeat(1, 2)    # (numbers, 32)
        for weight, size in ((embeddings, 0.5), (head, weight_std(head))):
            rows = waves @ torch.randn(32, weight.shape[1])
            weight[ids] = size * rows / rows.std()


def weight_std(weight):
    return weight[0].numel() ** -0.5


@torch.no_grad()
def grounding_iou(thinker, processor, split="test", clips=64) -> float:
    """Mean IoU of System 2's box for a visible thing asked for by its plain name, on held-out clips."""
    rng = np.random.default_rng(0)
    inputs = []
    truth = []
    for index in range(clips):
        scene = toy_scene(split, index)
        t = rng.integers(len(scene.pictures))
        picture = Image.fromarray(scene.pictures[t])
        for name, box in visible_things(scene, t):
            truth.append(box)
            inputs.append(processor.image_inputs(grounding_prompt(name), picture))
    answers = thinker.generate(thinker.embed(inputs), 1, 32, temperature=0.0, eos_ids=processor.eos_ids)
    ious = []
    for [answer], box in zip(answers, truth):
        boxes = parse_boxes(processor.decode(answer))
        ious.append(box_iou(boxes[:1], [box])[0, 0] if boxes else 0.0)
    return float(np.mean(ious))


def new_policy(path):
    """(a random Thinker, its Processor) of a directory that write_directory has written."""
    thinker = Thinker(read_config(Path(path)))
    for name, p in thinker.named_parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=0.5 if "embed_tokens" in name else weight_std(p))
    processor = Processor(path)
    order_numbers(thinker, processor)
    return thinker, processor


def train_text(thinker, pool, steps, batch):
    """Language before sight: the answer's form, comparing times, and looking up whom a relation holds of."""
    optimizers = Optimizers(thinker)
    start = time.time()
    for step in range(steps):
        texts = pool.texts_batch(batch)
        loss, _ = batch_loss(thinker, pool, None, texts)
        optimizers.step(loss, ramp(step, steps, 50, 0.4))
        if step % 50 == 0 or step == steps - 1:
            print(f"text {step}: {loss.item():.3f} {time.time() - start:.0f} s", flush=True)


def train_all(thinker, pool, options, path):
    """The cold start: boxes on pictures, and answers to queries of videos. Saves every 250 steps.

    The towers rest at first. A step then takes half the time, and what it learns to read stays as it is.
    They come in for the last steps, when the learning rate goes down.
    """
    steps = options.steps
    resting = int(steps * options.resting)
    width = thinker.config.text_config.hidden_size
    readings = nn.ModuleDict(dict(
        own=nn.Linear(width, 9),
        query=nn.Linear(width, 9),
        target=nn.Linear(width, 1),
        changes=nn.Linear(width, 4 * len(KINDS)),
    ))
    optimizers = Optimizers(nn.ModuleList([thinker, readings]))
    rest_towers(thinker, pool)
    start = time.time()
    for step in range(steps):
        if step == resting:
            wake_towers(thinker, pool)
        pictures = pool.pictures_batch(2 * options.batch, alone=step < 80)
        grounding, marking = batch_loss(thinker, pool, readings, pictures)
        videos = pool.videos_batch(options.batch)
        answering, marking_too = batch_loss(thinker, pool, readings, videos)
        # The look-up of texts is forgotten otherwise: the habits of videos hardly need it.
        texts = pool.texts_batch(options.batch // 2)
        looking_up, _ = batch_loss(thinker, pool, readings, texts)
        loss = grounding + answering + looking_up + marking + marking_too
        optimizers.step(loss, options.rate * ramp(step, steps, 100, options.decay))
        last = step == steps - 1
        if first_process() and (step % 50 == 0 or last):
            print(f"{step} grounding {grounding.item():.3f} keyframes {answering.item():.3f} "
                  f"look-up {looking_up.item():.3f} marking {marking.item():.3f} {marking_too.item():.3f} "
                  f"{time.time() - start:.0f} s", flush=True)
        if first_process() and (step % 250 == 249 or last):
            print(f"{step} grounding IoU {grounding_iou(thinker, pool.processor):.3f}", flush=True)
            thinker.save_pretrained(path)


def rest_towers(thinker, pool):
    thinker.visual.requires_grad_(False)
    thinker.audio_tower.requires_grad_(False)
    pool.keep_features(thinker)


def wake_towers(thinker, pool):
    thinker.requires_grad_(True)
    pool.forget_features()


def first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def make_policy(path, options):
    """Writes the policy's directory. Under torchrun each process has scenes of its own."""
    torch.manual_seed(options.seed)
    rank = 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    earlier = Thinker.from_pretrained(options.begin) if options.begin else None
    if first_process():
        write_directory(path)
    if dist.is_initialized():
        dist.barrier()
    thinker, processor = new_policy(path)
    if earlier:
        # It may be of another size.
        with reading(options.begin):
            thinker.load_state_dict(earlier.state_dict())
    # The cold start trains the towers too.
    thinker.requires_grad_(True)
    start = time.time()
    first = options.first_scene + rank * options.scenes
    scenes = range(first, first + options.scenes)
    pool = Pool(processor, scenes, options.seed + 1000 * rank)
    if not pool.pictures:
        raise BadInput(f"nothing is to be seen in --scenes {options.scenes}: take more")
    millions = sum(p.numel() for p in thinker.parameters()) / 1e6
    print(f"{len(scenes)} scenes in {time.time() - start:.0f} s; {millions:.2f}M parameters", flush=True)
    if not earlier:
        train_towers(thinker, pool, options.tower_steps, options.batch)
        train_text(thinker, pool, options.text_steps, 2 * options.batch)
    train_all(thinker, pool, options, path)

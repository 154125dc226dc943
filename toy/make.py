"""Makes the toy world's weights from nothing (see toy/README.md).

    python toy/make.py policy    a tiny Qwen2.5-Omni Thinker, cold-started by supervision
    python toy/make.py sam2      a small configuration of sam2's own classes: boxes on stills, then memory
    python toy/make.py check     measures those that are there

The policy is taught the answer format, plain descriptions, when a thing is in view, and grounding. Its
keyframes are drawn at random: to choose them well is what reinforcement learning is for.

Seeded, so every draw and every sum has its place: another order makes other weights.

Letters: B pictures or clips of a batch, T frames, O objects of a clip, N objects of a batch, H W pixels,
S tokens of a padded row, C tokens of an answer, D width of the model. K = 18 kinds of things, 6 colours times
3 shapes.
"""
import argparse
import json
import os
import string
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sam2
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from benchmarks.metrics import boundary_accuracy
from benchmarks.toy import (
    CANVAS,
    COLOURS,
    SHAPES,
    TOY_KINDS,
    scene_clip,
    toy_queries,
    toy_scene,
)
from data import (
    FPS,
    GROUNDING_TASK,
    KEYFRAME_TASK,
    SYSTEM,
    Clip,
    Frames,
    Inputs,
    Processor,
    format_time,
    grounding_prompt,
    keyframe_prompt,
    parse_boxes,
)
from model import Thinker, read_config
from rewards import box_iou, mask_box, region_similarity
from segment import MEAN, STD, Tracker
from trust.sam2_config import build_sam2

HERE = os.path.join(ROOT, "toy")
POLICY = os.path.join(HERE, "policy")
SAM2 = os.path.join(HERE, "sam2")
# "red circle" and so on.
KINDS = []
for colour in COLOURS:
    KINDS += [f"{colour} {shape}" for shape in SHAPES]

# ---- the policy's directory: tokenizer, preprocessing, config --------------------------------------
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>",
    "<|audio_bos|>", "<|audio_eos|>",
    "<|vision_bos|>", "<|vision_eos|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}<|vision_bos|><|{{ c.type | upper }}|><|vision_eos|>{% endif %}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)
PREPROCESSING = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    feature_size=32,
    hop_length=2000,
    n_fft=4000,
    chunk_length=30,
    sampling_rate=16000,
    padding_value=0.0,
    padding_side="left",
    return_attention_mask=True,
    dither=0.0,
    image_processor_type="Qwen2VLImageProcessor",
    patch_size=8,
    merge_size=2,
    temporal_patch_size=2,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
    video_tokens=9,
    image_tokens=64,
)
NULL_ANSWER = "<think>There is no such object.</think><answer>null</answer>"
# What answers are made of, beside names, times and numbers.
ANSWER_PIECES = [
    "<think>The target is the",
    ", in view from ",
    " to ",
    ", clearest at ",
    ".</think><answer>",
    '[{"start_time": "',
    '", "end_time": "',
    '", "description": "',
    '"}, {"start_time": "',
    '"}]</answer>',
    NULL_ANSWER,
    '[{"bbox_2d": [',
    ", ",
    "]}]",
    "null",
]
WORDS = [
    "the", "object", "that",
    "enters last", "leaves first", "moves fastest", "stays longest", "grows", "shrinks", "makes the sound",
    *COLOURS,
    *SHAPES,
]
# The times of the first 49 frames.
TIMES = [format_time(n / FPS) for n in range(49)]


def fixed_text() -> list[str]:
    """The pieces of prompts and answers that never change. Each becomes one token: toy prompts are short."""
    pieces = ["system\n" + SYSTEM, "assistant\n"]
    for task in (KEYFRAME_TASK, GROUNDING_TASK):
        template = "user\n" + "".join(task)
        for literal, *_ in string.Formatter().parse(template):
            if literal:
                pieces.append(literal)
    return pieces + ANSWER_PIECES


def make_tokenizer(path) -> tuple[dict[str, int], int]:
    """Writes a unigram tokenizer. Returns the ids of SPECIAL and the size of the vocabulary.

    Every piece costs the same, so that text is cut into as few of them as possible.
    """
    from tokenizers import Tokenizer, decoders, models
    pieces = ["<unk>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(32, 127)]
    pieces += fixed_text()
    pieces += WORDS
    pieces += [" " + word for word in WORDS]
    pieces += [str(n) for n in range(10, CANVAS)]
    pieces += TIMES
    # Without repetitions.
    scored = [(piece, -1.0) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(os.path.join(path, "tokenizer.json"))
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        chat_template=CHAT,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    write(path, "tokenizer_config.json", config)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    return ids, tokenizer.get_vocab_size()


def write(path, name, value):
    with open(os.path.join(path, name), "w") as file:
        json.dump(value, file, indent=1)


def make_config(ids, vocabulary, width=128) -> dict:
    """Thinker configuration of about 1.5M parameters, every part of the 7B's in small."""
    return dict(
        model_type="qwen2_5_omni_thinker",
        architectures=["Qwen2_5OmniThinkerForConditionalGeneration"],
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        pad_token_id=ids["<|endoftext|>"],
        position_id_per_seconds=2,
        # 8 mel frames a second make 2 audio tokens.
        seconds_per_chunk=2,
        vision_config=vision_config(width),
        audio_config=audio_config(width),
        text_config=text_config(width, vocabulary),
    )


def vision_config(width):
    return dict(
        depth=2,
        hidden_size=96,
        embed_dim=96,
        intermediate_size=192,
        num_heads=4,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=64,
        out_hidden_size=width,
        fullatt_block_indexes=[0, 1],
    )


def audio_config(width):
    return dict(
        num_mel_bins=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=96,
        d_model=48,
        output_dim=width,
        max_source_positions=64,
        n_window=10,
    )


def text_config(width, vocabulary):
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_theta=10000.0, rope_type="default", mrope_section=[4, 6, 6]),
    )


# ---- what the policy is taught ---------------------------------------------------------------------
def keyframe_answer(name, areas, rng) -> str:
    """What System 1 is taught to write: what the target is, when it is in view, when most of it is.

    name: of the target, None where there is none. areas: int [T], its visible pixels. The 1 to 3 moments are
    drawn at random: half of them the clip's first frame, a third the clearest moment just named, the rest any
    frame. Only the format and the description of the answer are right on purpose.
    """
    if name is None:
        return NULL_ANSWER
    T = len(areas)
    seen = np.flatnonzero(areas)
    clearest = int(areas.argmax())
    times = set()
    for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05])):
        choices = [0, clearest, rng.integers(T)]
        times.add(int(rng.choice(choices, p=[0.5, 0.35, 0.15])))
    moments = []
    for t in sorted(times):
        moment = format_time(t / FPS)
        moments.append(dict(start_time=moment, end_time=moment, description=name))
    first = format_time(seen[0] / FPS)
    last = format_time(seen[-1] / FPS)
    best = format_time(clearest / FPS)
    return (f"<think>The target is the {name}, in view from {first} to {last}, clearest at {best}.</think>"
            f"<answer>{json.dumps(moments)}</answer>")


def box_answer(box) -> str:
    """What System 2 is taught to write."""
    return json.dumps([{"bbox_2d": [int(v) for v in box]}])


def token_labels(scene, pair, cells):
    """What the visual tokens (cells x cells) of a frame pair show.

    Returns (shown, boxes). shown: bool (tokens, 2 K), which kinds the first frame shows and which the second.
    boxes: (tokens, 4) in [0, 1], of what covers most of the token on the first frame; negative where nothing
    does.
    """
    # The cell of each pixel row or column.
    cell = np.arange(CANVAS) * cells // CANVAS
    areas = np.zeros((2, len(KINDS), cells, cells))
    boxes = np.full((cells, cells, 4), -1.0)
    # Fewer than 8 pixels do not count.
    most = np.full((cells, cells), 8)
    for thing, masks in zip(scene.things, scene.masks):
        for side, t in enumerate(pair):
            rows, columns = np.nonzero(masks[t])
            area = np.zeros((cells, cells))
            np.add.at(area, (cell[rows], cell[columns]), 1)
            areas[side, KINDS.index(thing.name)] = area
            if side == 0 and len(rows):
                boxes[area > most] = np.array(mask_box(masks[t])) / CANVAS
                most = np.maximum(most, area)
    shown = torch.tensor(areas >= 8).flatten(2)   # (2, K, tokens)
    shown = shown.permute(2, 0, 1).flatten(1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return shown, boxes.flatten(0, 1)


def marked(shown, name):
    """What tokens have to do with the kind that is asked for.

    shown: bool (tokens, 2 K). Returns the colours and shapes that each token shows and those asked for, float
    (tokens, 9) each, and whether it shows the very thing, (tokens,).
    """
    # On either frame: (tokens, 6 colours, 3 shapes).
    kinds = shown.unflatten(1, (2, -1)).any(1).unflatten(1, (len(COLOURS), -1))
    asked = torch.arange(len(KINDS)) == KINDS.index(name)
    asked = asked.unflatten(0, (len(COLOURS), -1))    # (6, 3)
    own = torch.cat([kinds.any(2), kinds.any(1)], dim=1)
    query = torch.cat([asked.any(1), asked.any(0)]).expand(len(own), -1)
    target = (kinds & asked).flatten(1).any(1)
    return own.float(), query.float(), target.float()


@dataclass
class Video:
    """A scene as System 1 is asked about it."""
    media: Inputs           # the prompt of an empty query; patches in half precision
    T: int
    queries: list           # (kind, query, name of the target, its areas [T]); of a null query None and None
    shown: torch.Tensor     # bool (tokens, 2 K), see token_labels
    boxes: torch.Tensor     # (tokens, 4)
    heard: torch.Tensor     # (sound tokens,) the kind that sounds; K for silence


@dataclass
class Picture:
    """A frame as System 2 is asked about it."""
    pixels: np.ndarray      # uint8 [H, W, 3]
    things: list            # (name, box) of every thing that is to be seen
    shown: torch.Tensor     # as in Video
    boxes: torch.Tensor


class Pool:
    """Toy scenes of the training split, rendered once and asked about often."""

    def __init__(self, processor, scenes, seed):
        """scenes: indices of the training split."""
        self.processor = processor
        self.rng = np.random.default_rng(seed)
        self.videos = []
        self.pictures = []
        for index in scenes:
            scene = toy_scene("train", index)
            self.videos.append(self.make_video(scene))
            for t in self.rng.choice(len(scene.pictures), 5, replace=False):
                things = visible_things(scene, t)
                if things:
                    labels = token_labels(scene, [t, t], 8)
                    self.pictures.append(Picture(scene.pictures[t], things, *labels))

    def make_video(self, scene) -> Video:
        T = len(scene.pictures)
        areas = scene.masks.sum((2, 3))    # [O, T]
        queries = []
        for kind, query, o in toy_queries(scene):
            if o is None:
                queries.append((kind, query, None, None))
            else:
                queries.append((kind, query, scene.things[o].name, areas[o]))
        clip = scene_clip(scene, "", "", "", None)
        media = self.processor.video_inputs(keyframe_prompt(clip), clip.frames, clip.fps, clip.sound)
        media = replace(media, patches=media.patches.half())
        shown, boxes = self.video_labels(media, scene)
        heard = self.sound_labels(media, scene, areas)
        return Video(media, T, queries, shown, boxes, heard)

    def video_labels(self, media, scene):
        """token_labels of all frame pairs."""
        T = len(scene.pictures)
        pairs, rows, _ = media.grid[0].tolist()
        shown = []
        boxes = []
        for i in range(pairs):
            pair = [2 * i, min(2 * i + 1, T - 1)]
            pair_shown, pair_boxes = token_labels(scene, pair, rows // 2)
            shown.append(pair_shown)
            boxes.append(pair_boxes)
        return torch.cat(shown), torch.cat(boxes)

    def sound_labels(self, media, scene, areas):
        """Which kind each sound token holds, (sound tokens,); K for silence."""
        count = int((media.ids == self.processor.audio).sum())
        heard = np.full(count, len(KINDS))
        if scene.sounding is not None:
            # There are 2 sound tokens a second, as there are frames.
            frames = np.flatnonzero(areas[scene.sounding])
            name = scene.things[scene.sounding].name
            heard[frames[frames < count]] = KINDS.index(name)
        return torch.tensor(heard)

    def videos_batch(self, size):
        """(Inputs, answers, marks): the kind of a query is drawn first, then the query.

        marks: for each prompt what its visual tokens show (see marked), None where the query alone does not
        tell.
        """
        inputs = []
        answers = []
        marks = []
        # Clips of one length: no padding.
        T = self.rng.choice([video.T for video in self.videos])
        same = [i for i, video in enumerate(self.videos) if video.T == T]
        for i in self.rng.choice(same, size):
            video = self.videos[i]
            kind = self.rng.choice(TOY_KINDS, p=[0.27, 0.33, 0.28, 0.12])
            choices = [entry for entry in video.queries if entry[0] == kind] or video.queries
            kind, query, name, areas = choices[self.rng.integers(len(choices))]
            inputs.append(self.ask(video, query))
            answers.append(keyframe_answer(name, areas, self.rng))
            marks.append(marked(video.shown, name) if kind == "referring" else None)
        return inputs, answers, marks

    def ask(self, video, query) -> Inputs:
        """The prompt of another query over the same media: only the text in front of them changes."""
        clip = Clip("", Frames(blank_picture, range(video.T)), query)
        messages = keyframe_prompt(clip, self.rng)
        template = self.processor.tokenizer.apply_chat_template
        text = template(messages, tokenize=False, add_generation_prompt=True)
        head = self.processor.encode_text(text[:text.index("<|vision_bos|>")])
        media = video.media
        # Where the media begin in the old prompt.
        start = int((media.ids == self.processor.marks["vision_bos"]).nonzero()[0])
        head_positions = torch.arange(len(head)).expand(3, -1)
        positions = media.positions[:, start:] + len(head) - start
        return replace(
            media,
            ids=torch.cat([head, media.ids[start:]]),
            patches=media.patches.float(),
            positions=torch.cat([head_positions, positions], dim=1),
        )

    def pictures_batch(self, size, alone):
        """(Inputs, answers, marks) for grounding one visible thing. alone: pictures that show no other."""
        inputs = []
        answers = []
        marks = []
        while len(inputs) < size:
            picture = self.pictures[self.rng.integers(len(self.pictures))]
            if alone and len(picture.things) > 1:
                continue
            name, box = picture.things[self.rng.integers(len(picture.things))]
            image = Image.fromarray(picture.pixels)
            inputs.append(self.processor.image_inputs(grounding_prompt(name), image))
            answers.append(box_answer(box))
            marks.append(marked(picture.shown, name))
        return inputs, answers, marks


def visible_things(scene, t):
    """(name, box) of every thing of which at least 30 pixels are to be seen on frame t."""
    things = []
    for thing, mask in zip(scene.things, scene.masks[:, t]):
        if mask.sum() >= 30:
            things.append((thing.name, mask_box(mask)))
    return things


def blank_picture(t):
    return Image.new("RGB", (1, 1))


# ---- losses of the policy --------------------------------------------------------------------------
def supervised_loss(thinker, processor, readings, inputs, answers, marks):
    """(mean negative log-likelihood of the answers' tokens, loss of the readings).

    The end of the message counts as a token of the answer. The readings are linear layers, thrown away
    afterwards, that read visual tokens inside the language model: after its first layer, which colours and
    shapes they show and which are asked for; after its second, whether they show the very thing. To bring
    these together is the one step that a small model is slow to find by itself.
    """
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = []
    for answer in answers:
        ids.append(torch.tensor(processor.tokenizer.encode(answer, add_special_tokens=False) + [end]))
    lengths = torch.tensor([len(i) for i in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)    # (B, C)
    prompts = thinker.embed(inputs)
    layers = []    # hidden states (B S, D) after each of the first two

    def keep(module, given, hidden):
        layers.append(hidden)

    hooks = [layer.register_forward_hook(keep) for layer in thinker.model.layers[:2]]
    logp, _ = thinker(prompts, padded)
    for hook in hooks:
        hook.remove()
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    likelihood = (logp * mask).sum() / mask.sum()
    which = [i for i, mark in enumerate(marks) if mark is not None]
    if not which:
        return -likelihood, torch.zeros(())
    first, second = [visual_tokens(processor, hidden, prompts, which) for hidden in layers]
    return -likelihood, reading_loss(readings, first, second, [marks[i] for i in which])


def visual_tokens(processor, hidden, prompts, which):
    """Hidden states (B S, D) of right-padded rows -> those of some prompts' visual tokens, normalised."""
    rows = hidden.unflatten(0, (len(prompts), -1))    # (B, S, D)
    tokens = []
    for row, prompt in zip(rows, prompts):
        visual = (prompt.ids == processor.image) | (prompt.ids == processor.video)
        tokens.append(row[:len(prompt.ids)][visual])
    return F.rms_norm(torch.cat([tokens[i] for i in which]), hidden.shape[-1:])


def reading_loss(readings, first, second, marks):
    """Loss of the readings of visual tokens, after the first layer and after the second."""
    own, query, target = [torch.cat(labels) for labels in zip(*marks)]
    something = own.any(1)
    loss = F.binary_cross_entropy_with_logits(readings["own"](first), own)
    loss = loss + F.binary_cross_entropy_with_logits(readings["query"](first), query)
    logits = readings["target"](second)[something, 0]
    return loss + F.binary_cross_entropy_with_logits(logits, target[something])


# ---- optimizers ------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices.

    torch.optim.Muon does the same in bfloat16. CPUs emulate that: it takes longer than the rest of a step.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                self.step_shape(same, group["lr"], group["momentum"], group["weight_decay"])

    def step_shape(self, parameters, lr, momentum, weight_decay):
        """One step of all matrices of one shape, together."""
        directions = []
        for p in parameters:
            speed = self.state[p].setdefault("speed", torch.zeros_like(p))
            speed.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(speed, momentum))
        updates = orthogonal(torch.stack(directions))
        for p, update in zip(parameters, updates):
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)


def orthogonal(x):
    """Nearest half-orthogonal matrices to x (n, rows, columns), roughly: five Newton-Schulz iterations."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizers:
    """Muon for the matrices, AdamW for embeddings, head, convolutions and vectors."""

    def __init__(self, module):
        self.module = module
        matrices = []
        others = []
        for name, p in module.named_parameters():
            if p.ndim == 2 and "embed" not in name and "lm_head" not in name:
                matrices.append(p)
            else:
                others.append(p)
        adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        self.both = [Muon(matrices, lr=0.02), adam]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.both]

    def step(self, loss, scale):
        """One step down the gradient of a loss, with the learning rates times `scale`."""
        for optimizer, rate in zip(self.both, self.rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        loss.backward()
        share_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.both:
            optimizer.step()
            optimizer.zero_grad()


def share_gradients(module):
    """Averages gradients over the processes of torchrun, if there are several."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    mean = flat / dist.get_world_size()
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def ramp(step, steps, warmup, decay):
    """Share of the learning rate: up over `warmup` steps, hold, down to zero over the last share `decay`."""
    return min(1, (step + 1) / warmup, (steps - step) / (decay * steps))


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
        box=nn.Linear(width, 4),
        heard=nn.Linear(width, len(KINDS) + 1),
    ))
    optimizers = Optimizers(nn.ModuleList([thinker.visual, thinker.audio_tower, heads]))
    rng = np.random.default_rng(pool.rng.integers(2 ** 32))
    start = time.time()
    for step in range(steps):
        videos = [pool.videos[i] for i in rng.integers(len(pool.videos), size=batch // 2)]
        pictures = [pool.pictures[i] for i in rng.integers(len(pool.pictures), size=batch)]
        inputs = [replace(video.media, patches=video.media.patches.float()) for video in videos]
        for picture in pictures:
            image = Image.fromarray(picture.pixels)
            inputs.append(pool.processor.image_inputs(grounding_prompt(""), image))
        seen = torch.cat(thinker.see(inputs))
        heard = torch.cat(thinker.hear(inputs))
        sources = [*videos, *pictures]
        shown = torch.cat([source.shown for source in sources])
        boxes = torch.cat([source.boxes for source in sources])
        there = boxes[:, 0] >= 0
        shown_loss = 5 * F.binary_cross_entropy_with_logits(heads["shown"](seen), shown.float())
        box_loss = 5 * F.smooth_l1_loss(heads["box"](seen)[there], boxes[there], beta=0.02)
        kinds = torch.cat([video.heard for video in videos])
        heard_loss = 0.2 * F.cross_entropy(heads["heard"](heard), kinds)
        optimizers.step(shown_loss + box_loss + heard_loss, ramp(step, steps, 50, 0.4))
        if step % 50 == 0 or step == steps - 1:
            # With the weights after the step.
            right = (heads["shown"](seen) > 0) & shown
            print(f"towers {step}: shown {shown_loss.item():.3f} (recall {right.sum() / shown.sum():.2f}) "
                  f"box {box_loss.item():.4f} heard {heard_loss.item():.3f} {time.time() - start:.0f} s",
                  flush=True)


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


def new_policy(init):
    """Writes the policy's directory but for its weights. Returns a Thinker, random or that of `init`."""
    os.makedirs(POLICY, exist_ok=True)
    ids, vocabulary = make_tokenizer(POLICY)
    write(POLICY, "preprocessor_config.json", PREPROCESSING)
    write(POLICY, "config.json", make_config(ids, vocabulary))
    if init is not None:
        return Thinker.from_pretrained(init), Processor(POLICY)
    thinker = Thinker(read_config(Path(POLICY)))
    for name, p in thinker.named_parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=0.5 if "embed_tokens" in name else weight_std(p))
    processor = Processor(POLICY)
    order_numbers(thinker, processor)
    return thinker, processor


def make_policy(steps, tower_steps, scenes, batch, seed, decay, init=None):
    """Writes toy/policy. Under torchrun each process has scenes of its own."""
    torch.manual_seed(seed)
    thinker, processor = new_policy(init)
    # The cold start trains the towers too.
    thinker.requires_grad_(True)
    start = time.time()
    rank = 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    pool = Pool(processor, range(rank * scenes, (rank + 1) * scenes), seed + 1000 * rank)
    millions = sum(p.numel() for p in thinker.parameters()) / 1e6
    print(f"{scenes} scenes in {time.time() - start:.0f} s; {millions:.2f}M parameters", flush=True)
    if init is None:
        train_towers(thinker, pool, tower_steps, batch)
        thinker.save_pretrained(POLICY)
    width = thinker.config.text_config.hidden_size
    readings = nn.ModuleDict(dict(
        own=nn.Linear(width, 9),
        query=nn.Linear(width, 9),
        target=nn.Linear(width, 1),
    ))
    optimizers = Optimizers(nn.ModuleList([thinker, readings]))
    for step in range(steps):
        alone = init is None and step < 80
        pictures = pool.pictures_batch(batch, alone)
        grounding, marking = supervised_loss(thinker, processor, readings, *pictures)
        videos = pool.videos_batch(batch // 2)
        answering, marking_too = supervised_loss(thinker, processor, readings, *videos)
        optimizers.step(grounding + answering + marking + marking_too, ramp(step, steps, 100, decay))
        last = step == steps - 1
        if rank == 0 and (step % 50 == 0 or last):
            print(f"{step} grounding {grounding.item():.3f} keyframes {answering.item():.3f} "
                  f"marking {marking.item():.3f} {marking_too.item():.3f} {time.time() - start:.0f} s",
                  flush=True)
        if rank == 0 and (step % 250 == 249 or last):
            print(f"{step} grounding IoU {grounding_iou(thinker, processor):.3f}", flush=True)
            thinker.save_pretrained(POLICY)


# ---- SAM2 ------------------------------------------------------------------------------------------
SIDE = 128      # pixels of the square picture
WIDTH = 96      # of the features
MEMORY = 32     # width of the memory
CELLS = 8       # places a side of the top features, of 16 x 16 pixels
# (steps, frames, clips a step): what a box means on stills, then to find an object again on another frame.
STAGES = ((450, 1, 16), (900, 2, 10))


def small_config():
    """SAM 2.1 tiny, made much smaller: the same parts, one mask per object instead of a choice of three."""
    config = OmegaConf.load(Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml")
    attention = {"embedding_dim": WIDTH, "feat_sizes": [SIDE // 16] * 2}
    trunk = {
        "embed_dim": 24,
        "stages": [1, 1, 2, 1],
        "global_att_blocks": [3],
        "window_spec": [8, 4, 8, 4],
    }
    neck = {
        "d_model": WIDTH,
        "backbone_channel_list": [192, 96, 48, 24],
        "position_encoding": {"num_pos_feats": WIDTH},
    }
    memory_layer = {
        "d_model": WIDTH,
        "dim_feedforward": 3 * WIDTH,
        "self_attention": attention,
        "cross_attention": {**attention, "kv_in_dim": MEMORY},
    }
    memory_encoder = {
        "in_dim": WIDTH,
        "out_dim": MEMORY,
        "position_encoding": {"num_pos_feats": MEMORY},
        "mask_downsampler": {"embed_dim": WIDTH},
        "fuser": {"num_layers": 1, "layer": {"dim": WIDTH}},
    }
    model = {
        "image_size": SIDE,
        "num_maskmem": 4,
        "multimask_output_in_sam": False,
        "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": False},
        "image_encoder": {"trunk": trunk, "neck": neck},
        "memory_attention": {"d_model": WIDTH, "num_layers": 2, "layer": memory_layer},
        "memory_encoder": memory_encoder,
    }
    return OmegaConf.merge(config, {"model": model})


@dataclass
class Stretch:
    """Evenly spaced frames of one scene, maybe backwards or mirrored, and up to three objects in them."""
    pictures: np.ndarray      # uint8 [T, H, W, 3]
    masks: np.ndarray         # bool [O, T, H, W]
    boxes: list               # O dicts {frame: box}: on one frame, now and then two, up to 3 pixels off
    kinds: list               # O indices into KINDS
    cells: np.ndarray         # bool [O, T, 8, 8]: the object covers a good part of that place
    shown: np.ndarray         # float [T, K, 8, 8]: the same for every kind in the scene


def draw_stretch(rng, scenes, frames) -> Stretch:
    """A stretch of `frames` frames from one of the scenes."""
    # Until some object is worth a prompt.
    while True:
        scene = scenes[rng.integers(len(scenes))]
        times = draw_times(rng, len(scene.pictures), frames)
        if times.max() >= len(scene.pictures):
            continue
        mirror = slice(None, None, rng.choice([1, -1]))
        masks = scene.masks[:, times][..., mirror]    # [all objects, T, H, W]
        clear = masks.sum((2, 3)) >= 40               # pixels
        chosen = rng.permutation(np.flatnonzero(clear.any(1)))[:3]
        if len(chosen):
            break
    prompted = []    # frames of each object
    for o in chosen:
        order = rng.permutation(np.flatnonzero(clear[o]))
        prompted.append(order[:rng.choice([1, 2], p=[0.8, 0.2])])
    boxes = []
    for o, own_frames in zip(chosen, prompted):
        own = {}
        for t in own_frames:
            own[int(t)] = np.add(mask_box(masks[o, t]), rng.normal(0, 1.2, 4).clip(-3, 3))
        boxes.append(own)
    kinds = [KINDS.index(thing.name) for thing in scene.things]
    side = SIDE // CELLS
    places = masks.reshape(*masks.shape[:2], CELLS, side, CELLS, side)
    cells = places.sum((3, 5)) >= 24                  # [all objects, T, 8, 8]
    shown = np.zeros((frames, len(KINDS), CELLS, CELLS), np.float32)
    for kind, cell in zip(kinds, cells):
        shown[:, kind] = np.maximum(shown[:, kind], cell)
    pictures = scene.pictures[times][:, :, mirror]
    return Stretch(pictures, masks[chosen], boxes, [kinds[o] for o in chosen], cells[chosen], shown)


def draw_times(rng, T, frames):
    """Evenly spaced frames, forwards or backwards. Some may lie beyond T."""
    most = max((T - 1) // max(frames - 1, 1), 1)
    apart = rng.integers(1, most + 1)
    start = rng.integers(max(T - apart * (frames - 1), 1))
    times = np.arange(start, start + apart * frames, apart)
    return times[::rng.choice([1, -1])]


class WatchedTracker(Tracker):
    """A tracker that keeps what its prompts leave behind."""

    def __init__(self, model):
        super().__init__(model)
        self.tracked = []

    def prompt(self, features, boxes):
        tracked = super().prompt(features, boxes)
        self.tracked.append(tracked)
        return tracked


def concatenated(arrays):
    return torch.tensor(np.concatenate(arrays))


def tracking_losses(tracker, heads, stretches):
    """Loss and (IoU on prompted frames, IoU on the others) of B stretches of equal length.

    Beside the masks and scores, three linear readings are supervised and thrown away afterwards: which kinds
    the top features show, and which kind a prompted frame's memory and pointer hold. Without them the memory
    was not used within half an hour.
    """
    T = len(stretches[0].pictures)
    pictures = concatenated([s.pictures for s in stretches]).permute(0, 3, 1, 2) / 255    # [B T, 3, H, W]
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    levels = tracker.encode((pictures - mean) / std)
    owner = []    # the stretch of each object
    boxes = []
    for b, stretch in enumerate(stretches):
        owner += [b] * len(stretch.boxes)
        boxes += stretch.boxes
    prompts = []    # (object, frame) of each
    for n, own in enumerate(boxes):
        prompts += [(n, t) for t in own]

    def features(objects, times):
        places = [owner[n] * T + t for n, t in zip(objects, times)]
        return [level[places] for level in levels]

    tracker.tracked = []
    logits, scores = zip(*tracker.run(features, boxes, [T] * len(boxes)))
    logits = F.interpolate(torch.stack(logits, 1), (SIDE, SIDE), mode="bilinear")
    logits = logits.clamp(-20, 20)                                                        # [N, T, H, W]
    true = concatenated([s.masks for s in stretches]).float()
    loss = mask_loss(logits, torch.stack(scores, 1), true)
    shown = concatenated([s.shown for s in stretches])                                    # [B T, K, 8, 8]
    shown_logits = heads["shown"](levels[-1].permute(0, 2, 3, 1))
    loss = loss + 5 * F.binary_cross_entropy_with_logits(shown_logits, shown.permute(0, 2, 3, 1))
    map_loss, pointer_loss = memory_losses(tracker.tracked, heads, stretches, prompts)
    loss = loss + map_loss + pointer_loss

    both = ((logits > 0) & (true > 0)).sum((2, 3))
    union = ((logits > 0) | (true > 0)).sum((2, 3))
    iou = torch.where(union > 0, both / union.clamp(min=1), 1.0)                          # [N, T]
    prompted = torch.zeros_like(iou, dtype=torch.bool)
    for n, t in prompts:
        prompted[n, t] = True
    return loss, (iou[prompted].mean().item(), iou[~prompted].mean().item())


def mask_loss(logits, scores, true):
    """Loss of masks, logits and true [N, T, H, W], and of scores [N, T]: is the object seen?"""
    there = true.flatten(2).any(-1).float()    # [N, T]
    soft = logits.sigmoid()
    shared = 2 * (soft * true).sum((2, 3)) + 1
    dice = 1 - shared / (soft.sum((2, 3)) + true.sum((2, 3)) + 1)
    loss = 5 * F.binary_cross_entropy_with_logits(logits, true)
    loss = loss + (dice * there).mean()
    return loss + F.binary_cross_entropy_with_logits(scores, there)


def memory_losses(tracked, heads, stretches, prompts):
    """Losses of reading from prompted frames' memory, and from their pointers, which kind of thing they hold.

    tracked: what the prompts left behind, batch by batch. prompts: (object, frame) of each, in that order.
    """
    kinds = []
    for stretch in stretches:
        kinds += stretch.kinds
    kinds = torch.tensor(kinds)                                     # [N]
    cells = concatenated([s.cells for s in stretches])              # [N, T, 8, 8]
    # Of each prompt and place: the object's kind where it is, else K.
    held = []
    for n, t in prompts:
        held.append(torch.where(cells[n, t].flatten(), kinds[n], len(KINDS)))
    held = torch.stack(held)                                        # [prompts, 64]
    weights = torch.tensor([1.0] * len(KINDS) + [0.1])
    maps = torch.cat([part.map for part in tracked])                # [prompts, 64, M]
    pointers = torch.cat([part.pointer for part in tracked]).flatten(1)
    objects = [n for n, _ in prompts]
    logits = heads["held"](maps).flatten(0, 1)
    map_loss = 0.3 * F.cross_entropy(logits, held.flatten(), weight=weights)
    pointer_loss = 0.2 * F.cross_entropy(heads["pointer"](pointers), kinds[objects])
    return map_loss, pointer_loss


def tracking_quality(tracker, split="test", clips=20) -> tuple[float, float]:
    """Mean J and F of every thing of held-out clips, tracked from its true box on one frame."""
    rng = np.random.default_rng(0)
    J = []
    boundary = []
    for index in range(clips):
        scene = toy_scene(split, index)
        areas = scene.masks.sum((2, 3))    # [O, T]
        objects = np.flatnonzero(areas.max(1) >= 60)
        boxes = []
        for o in objects:
            t = int(rng.choice(np.flatnonzero(areas[o] >= 60)))
            boxes.append({t: np.array(mask_box(scene.masks[o, t]))})
        pictures = [Image.fromarray(picture) for picture in scene.pictures]
        masks = tracker.track(pictures, boxes)
        for o, mask in zip(objects, masks):
            J.append(region_similarity(mask, scene.masks[o]).mean())
            boundary.append(boundary_accuracy(mask, scene.masks[o]).mean())
    return float(np.mean(J)), float(np.mean(boundary))


def make_sam2(stages, scenes, seed):
    """Writes toy/sam2/config.yaml and model.pt (half precision)."""
    torch.manual_seed(seed)
    os.makedirs(SAM2, exist_ok=True)
    config = os.path.join(SAM2, "config.yaml")
    OmegaConf.save(small_config(), config)
    model = build_sam2(config)
    rng = np.random.default_rng(seed)
    start = time.time()
    with torch.no_grad():
        # "Not seen" would hide the mask from the loss.
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    heads = nn.ModuleDict(dict(
        shown=nn.Linear(WIDTH, len(KINDS)),
        held=nn.Linear(MEMORY, len(KINDS) + 1),
        pointer=nn.Linear(WIDTH, len(KINDS)),
    ))
    tracker = WatchedTracker(model)
    pool = [toy_scene("train", index) for index in range(scenes)]
    weights = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, 1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for stage, (steps, frames, clips) in enumerate(stages):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * ramp(step, steps, 50, 0.4)
            stretches = [draw_stretch(rng, pool, frames) for _ in range(clips)]
            loss, iou = tracking_losses(tracker, heads, stretches)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"stage {stage} step {step} loss {loss.item():.3f} IoU {iou[0]:.3f} {iou[1]:.3f} "
                      f"{time.time() - start:.0f} s", flush=True)
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
        torch.save({"model": state}, os.path.join(SAM2, "model.pt"))
        J, boundary = tracking_quality(Tracker(model))
        print(f"stage {stage}: J {J:.3f} F {boundary:.3f}", flush=True)


# ---- the program -----------------------------------------------------------------------------------
def check():
    """Prints what each of the two models does by itself on held-out clips."""
    iou = grounding_iou(Thinker.from_pretrained(POLICY), Processor(POLICY))
    print(f"policy: grounding IoU {iou:.3f}")
    tracker = Tracker.from_pretrained(os.path.join(SAM2, "config.yaml"), os.path.join(SAM2, "model.pt"))
    for split in ("test", "pairs", "long"):
        J, boundary = tracking_quality(tracker, split)
        print(f"sam2: from a true box, split {split}: J {J:.3f} F {boundary:.3f}")


def main(arguments=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("what", choices=["policy", "sam2", "check"])
    add("--steps", type=int, default=2600)
    add("--tower_steps", type=int, default=600, help="steps for the towers alone, first")
    add("--scenes", type=int, default=4000, help="scenes rendered for training")
    add("--batch", type=int, default=32, help="pictures, and half as many videos, a step")
    add("--seed", type=int, default=0)
    add("--decay", type=float, default=0.4,
        help="share of the steps over which the learning rate goes down to 0")
    add("--threads", type=int, default=os.cpu_count())
    add("--init", help="policy directory to go on from")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.what == "check":
        check()
    elif options.what == "sam2":
        make_sam2(STAGES, 800, options.seed)
    else:
        make_policy(options.steps, options.tower_steps, options.scenes, options.batch, options.seed,
                    options.decay, options.init)


if __name__ == "__main__":
    main()

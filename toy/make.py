"""Makes the toy world's weights from nothing: `python toy/make.py policy` and `python toy/make.py sam2` (see toy/README.md);
`python toy/make.py check` measures those that are there.

policy: a tiny Qwen2.5-Omni Thinker, cold-started by supervision: the answer format, plain descriptions, when a thing is in
        view, and grounding. Its keyframes are drawn at random: to choose them well is what reinforcement learning is for.
sam2:   a small configuration of sam2's own classes: box prompts on stills, then memory over frames.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data import (COLOURS, FPS, GLOBAL_TASK, GROUNDING_TASK, SHAPES, SYSTEM, TOY_KINDS, Clip, Frames, Processor,  # noqa: E402
                  format_time, global_prompt, grounding_prompt, parse_boxes, scene_clip, toy_queries, toy_scene)
from eval import boundary_accuracy, region_similarity  # noqa: E402
from model import Thinker, read_config  # noqa: E402
from rewards import box_iou, mask_box  # noqa: E402
from segment import MEAN, STD, Tracker, build_sam2  # noqa: E402

HERE = os.path.join(ROOT, "toy")
POLICY, SAM2 = os.path.join(HERE, "policy"), os.path.join(HERE, "sam2")

# ---------------------------------------------------------------------------------------------------------------------
# The policy's directory: config, tokenizer, preprocessing
# ---------------------------------------------------------------------------------------------------------------------
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", "<|audio_bos|>", "<|audio_eos|>",
           "<|vision_bos|>", "<|vision_eos|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% elif c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
        "{% else %}<|vision_bos|><|{{ c.type | upper }}|><|vision_eos|>{% endif %}{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}")
PREPROCESSING = dict(
    feature_extractor_type="WhisperFeatureExtractor", feature_size=32, hop_length=2000, n_fft=4000, chunk_length=30,
    sampling_rate=16000, padding_value=0.0, padding_side="left", return_attention_mask=True, dither=0.0,
    image_processor_type="Qwen2VLImageProcessor", patch_size=8, merge_size=2, temporal_patch_size=2,
    image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], video_tokens=9, image_tokens=64)


def fixed_text():
    """The pieces of prompts and answers that never change; each becomes one token, so that toy prompts are short."""
    templates = ["user\n" + "".join(GLOBAL_TASK), "user\n" + "".join(GROUNDING_TASK)]
    pieces = [literal for text in templates for literal, *_ in string.Formatter().parse(text) if literal]
    return ["system\n" + SYSTEM, "assistant\n", *pieces,
        "<think>The target is the", ", in view from ", " to ", ", clearest at ", ".</think><answer>", '[{"start_time": "', '", "end_time": "',
        '", "description": "', '"}, {"start_time": "', '"}]</answer>', "<think>There is no such object.</think><answer>null</answer>",
        '[{"bbox_2d": [', ", ", "]}]", "null"]


def make_tokenizer(path):
    """A unigram tokenizer in which every piece costs the same, so that text is cut into as few of them as possible."""
    from tokenizers import Tokenizer, decoders, models
    words = ["the", "object", "that", "enters last", "leaves first", "moves fastest", "stays longest", "grows", "shrinks",
             "makes the sound", *COLOURS, *SHAPES]
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *(chr(c) for c in range(32, 127)), *fixed_text(), *words,
              *(" " + word for word in words), *(str(n) for n in range(10, 128)), *(format_time(n / FPS) for n in range(49))]
    tokenizer = Tokenizer(models.Unigram([(p, -1.0) for p in dict.fromkeys(pieces)], unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(os.path.join(path, "tokenizer.json"))
    write(path, "tokenizer_config.json", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", chat_template=CHAT,
                                              pad_token="<|endoftext|>", clean_up_tokenization_spaces=False))
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}, tokenizer.get_vocab_size()


def write(path, name, value):
    with open(os.path.join(path, name), "w") as file:
        json.dump(value, file, indent=1)


def make_config(ids, vocabulary, width=128):
    """Thinker configuration of about 1.5M parameters, every part of the 7B's in small."""
    return dict(
        model_type="qwen2_5_omni_thinker", architectures=["Qwen2_5OmniThinkerForConditionalGeneration"],
        audio_token_index=ids["<|AUDIO|>"], image_token_index=ids["<|IMAGE|>"], video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"], audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"], vision_end_token_id=ids["<|vision_eos|>"], pad_token_id=ids["<|endoftext|>"],
        position_id_per_seconds=2, seconds_per_chunk=2,          # 8 mel frames a second make 2 audio tokens
        vision_config=dict(depth=2, hidden_size=96, embed_dim=96, intermediate_size=192, num_heads=4, patch_size=8,
                           spatial_merge_size=2, temporal_patch_size=2, window_size=64, out_hidden_size=width,
                           fullatt_block_indexes=[0, 1]),
        audio_config=dict(num_mel_bins=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=96, d_model=48,
                          output_dim=width, max_source_positions=64, n_window=10),
        text_config=dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=False,
                         rope_parameters=dict(rope_theta=10000.0, rope_type="default", mrope_section=[4, 6, 6])))


# ---------------------------------------------------------------------------------------------------------------------
# Supervision
# ---------------------------------------------------------------------------------------------------------------------
def global_answer(name, areas, rng):
    """What System 1 is taught to write: what the target is, when it is in view, and when most of it is (areas: int [T], visible
    pixels); then 1 to 3 moments drawn at random: half of them the clip's first frame, a third the clearest moment just named, the
    rest any frame. Only the format and the description of the answer are right on purpose."""
    if name is None:
        return "<think>There is no such object.</think><answer>null</answer>"
    seen, T = np.flatnonzero(areas), len(areas)
    clearest = int(areas.argmax())
    times = {int(rng.choice([0, clearest, rng.integers(T)], p=[0.5, 0.35, 0.15])) for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05]))}
    first, last, best = (format_time(t / FPS) for t in (seen[0], seen[-1], clearest))
    moments = [dict(start_time=format_time(t / FPS), end_time=format_time(t / FPS), description=name) for t in sorted(times)]
    return (f"<think>The target is the {name}, in view from {first} to {last}, clearest at {best}.</think>"
            f"<answer>{json.dumps(moments)}</answer>")


def box_answer(box):
    return json.dumps([{"bbox_2d": [int(v) for v in box]}])


KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def token_labels(scene, pair, cells):
    """What a frame pair's visual tokens (cells x cells) show: which of the 18 kinds on either frame, bool (tokens, 2 * 18), and
    the box, in [0, 1], of what covers most of the token on the first frame, (tokens, 4), negative where nothing does."""
    edge = np.arange(128) * cells // 128                                         # cell of each pixel row or column
    areas = np.zeros((2, len(KINDS), cells, cells))
    boxes, most = np.full((cells, cells, 4), -1.0), np.full((cells, cells), 8)   # fewer than 8 pixels do not count
    for thing, masks in zip(scene.things, scene.masks):
        for side, t in enumerate(pair):
            ys, xs = np.nonzero(masks[t])
            area = np.zeros((cells, cells))
            np.add.at(area, (edge[ys], edge[xs]), 1)
            areas[side, KINDS.index(thing.name)] = area
            if side == 0 and len(ys):
                boxes[area > most] = np.array(mask_box(masks[t])) / 128
                most = np.maximum(most, area)
    shown = torch.tensor(areas >= 8).flatten(2).permute(2, 0, 1).flatten(1)       # (tokens, 2 * 18)
    return shown, torch.tensor(boxes, dtype=torch.float32).flatten(0, 1)


def marked(shown, name):
    """From the kinds that each token shows, (tokens, 2 * 18), and the kind that is asked for: the colours and shapes it shows and
    those asked for, float (tokens, 9) each, and whether it shows the very thing, (tokens,)."""
    kinds = shown.unflatten(1, (2, -1)).any(1).unflatten(1, (len(COLOURS), -1))                 # (tokens, 6, 3), on either frame
    asked = (torch.arange(len(KINDS)) == KINDS.index(name)).unflatten(0, (len(COLOURS), -1))    # (6, 3)
    own = torch.cat([kinds.any(2), kinds.any(1)], dim=1)
    query = torch.cat([asked.any(1), asked.any(0)]).expand(len(own), -1)
    return own.float(), query.float(), (kinds & asked).flatten(1).any(1).float()


class Pool:
    """Toy scenes of the training split, rendered once and asked about often."""

    def __init__(self, processor, scenes, seed):
        """scenes: indices of the training split."""
        self.processor, self.rng = processor, np.random.default_rng(seed)
        self.videos = []                                 # (Inputs, T, [(kind, query, name of the target, its areas)], labels)
        self.pictures = []                               # (picture, [(name, box)], labels)
        for index in scenes:
            scene = toy_scene("train", index)
            T, areas = len(scene.pictures), scene.masks.sum((2, 3))
            queries = [(kind, query, None, None) if i is None else (kind, query, scene.things[i].name, areas[i])
                       for kind, query, i in toy_queries(scene)]
            media = self._media(scene)
            self.videos.append((media, T, queries, self._video_labels(scene, areas, media)))
            for t in self.rng.choice(T, 5, replace=False):
                boxes = self._boxes(scene, t)
                self.pictures += [(scene.pictures[t], boxes, token_labels(scene, [t, t], 8))] * bool(boxes)

    def _media(self, scene):
        clip = scene_clip(scene, "", "", "", None)
        inputs = self.processor.video_inputs(global_prompt(clip), clip.frames, clip.fps, clip.sound)
        return replace(inputs, patches=inputs.patches.half())

    def _boxes(self, scene, t):
        """(name, box) of every thing of which at least 30 pixels are to be seen on frame t."""
        found = []
        for thing, mask in zip(scene.things, scene.masks[:, t]):
            if mask.sum() >= 30:
                found.append((thing.name, mask_box(mask)))
        return found

    def _video_labels(self, scene, areas, media):
        """What each visual token shows (see token_labels), and which kind each sound token holds, 18 for silence."""
        T, (pairs, rows, _) = len(scene.pictures), media.grid[0].tolist()
        shown = [token_labels(scene, [2 * i, min(2 * i + 1, T - 1)], rows // 2) for i in range(pairs)]
        heard = np.full(int((media.ids == self.processor.audio).sum()), len(KINDS))
        if scene.sounding is not None:
            frames = [t for t in np.flatnonzero(areas[scene.sounding]) if t < len(heard)]         # 2 sound tokens a second, as frames
            heard[frames] = KINDS.index(scene.things[scene.sounding].name)
        return *(torch.cat(x) for x in zip(*shown)), torch.tensor(heard)

    def videos_batch(self, size):
        """(Inputs, answers, marks): the kind of a query is drawn first, then the query. marks: for each prompt what its visual
        tokens show, see marked(), or None where the query alone does not tell."""
        inputs, answers, marks = [], [], []
        T = self.rng.choice([video[1] for video in self.videos])             # clips of one length: no padding
        same = [i for i, video in enumerate(self.videos) if video[1] == T]
        for i in self.rng.choice(same, size):
            media, _, queries, (shown, _, _) = self.videos[i]
            kind = self.rng.choice(TOY_KINDS, p=[0.27, 0.33, 0.28, 0.12])
            choices = [q for q in queries if q[0] == kind] or queries
            kind, query, name, areas = choices[self.rng.integers(len(choices))]
            inputs.append(self._ask(media, T, query))
            answers.append(global_answer(name, areas, self.rng))
            marks.append(marked(shown, name) if kind == "referring" else None)
        return inputs, answers, marks

    def _ask(self, media, T, query):
        """The prompt of another query over the same media: only the text in front of them changes."""
        clip = Clip("", Frames(lambda t: Image.new("RGB", (1, 1)), range(T)), query)
        text = self.processor.tokenizer.apply_chat_template(global_prompt(clip, self.rng), tokenize=False,
                                                            add_generation_prompt=True)
        head = self.processor._text(text[:text.index("<|vision_bos|>")])
        old = int((media.ids == self.processor.marks["vision_bos"]).nonzero()[0])
        return replace(media, ids=torch.cat([head, media.ids[old:]]), patches=media.patches.float(),
                       positions=torch.cat([torch.arange(len(head)).expand(3, -1), media.positions[:, old:] + len(head) - old], dim=1))

    def pictures_batch(self, size, alone):
        """(Inputs, answers, marks) for grounding one visible thing; `alone`: pictures that show no other."""
        inputs, answers, marks = [], [], []
        while len(inputs) < size:
            picture, boxes, (shown, _) = self.pictures[self.rng.integers(len(self.pictures))]
            if alone and len(boxes) > 1:
                continue
            name, box = boxes[self.rng.integers(len(boxes))]
            inputs.append(self.processor.image_inputs(grounding_prompt(name), Image.fromarray(picture)))
            answers.append(box_answer(box))
            marks.append(marked(shown, name))
        return inputs, answers, marks


def supervised_loss(thinker, processor, readings, inputs, answers, marks):
    """(mean negative log-likelihood of the answers' tokens, the end of the message included; loss of the readings).

    The readings are linear layers, thrown away afterwards, that must tell from visual tokens inside the language model: after its
    first layer, which colours and shapes they show and which are asked for; after its second, whether they show the very thing. To
    bring these together is the one step that a small model is slow to find by itself."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [processor.tokenizer.encode(a, add_special_tokens=False) + [end] for a in answers]
    lengths = torch.tensor([len(i) for i in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)          # (B, C)
    prompts, kept = thinker.embed(inputs), []
    hooks = [layer.register_forward_hook(lambda module, given, hidden: kept.append(hidden)) for layer in thinker.model.layers[:2]]
    logp, _ = thinker(prompts, padded)
    for hook in hooks:
        hook.remove()
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    likelihood = (logp * mask).sum() / mask.sum()
    which = [i for i, mark in enumerate(marks) if mark is not None]
    if not which:
        return -likelihood, torch.zeros(())
    first, second = (F.rms_norm(torch.cat([visual_rows(processor, hidden, prompts)[i] for i in which]), hidden.shape[-1:]) for hidden in kept)
    own, query, target = (torch.cat(labels) for labels in zip(*(marks[i] for i in which)))
    something = own.any(1)
    return -likelihood, (F.binary_cross_entropy_with_logits(readings["own"](first), own)
                         + F.binary_cross_entropy_with_logits(readings["query"](first), query)
                         + F.binary_cross_entropy_with_logits(readings["target"](second)[something, 0], target[something]))


def visual_rows(processor, hidden, prompts):
    """Hidden states (B S, D) of right-padded rows -> those of each prompt's visual tokens, [(tokens, D)]."""
    rows = hidden.unflatten(0, (len(prompts), -1))
    return [row[:len(p.ids)][(p.ids == processor.image) | (p.ids == processor.video)] for row, p in zip(rows, prompts)]


def train_towers(thinker, pool, steps, batch):
    """The towers first and alone, as those of the real model were: each of their tokens has to tell, through a linear layer that
    is thrown away, which kinds it shows, the box of the largest, and what it sounds like. From such tokens the language model
    learns to bind words to things many times sooner."""
    width = thinker.config.text_config.hidden_size
    heads = torch.nn.ModuleDict(dict(shown=torch.nn.Linear(width, 2 * len(KINDS)), box=torch.nn.Linear(width, 4),
                                     heard=torch.nn.Linear(width, len(KINDS) + 1)))
    modules = torch.nn.ModuleList([thinker.visual, thinker.audio_tower, heads])
    chosen, rng, start = optimizers(modules), np.random.default_rng(pool.rng.integers(2 ** 32)), time.time()
    base = [group["lr"] for o in chosen for group in o.param_groups]
    for step in range(steps):
        scale = min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for rate, group in zip(base, (g for o in chosen for g in o.param_groups)):
            group["lr"] = rate * scale
        videos = [pool.videos[i] for i in rng.integers(len(pool.videos), size=batch // 2)]
        stills = [pool.pictures[i] for i in rng.integers(len(pool.pictures), size=batch)]
        inputs = [replace(media, patches=media.patches.float()) for media, *_ in videos]
        inputs += [pool.processor.image_inputs(grounding_prompt(""), Image.fromarray(picture)) for picture, *_ in stills]
        seen, heard = torch.cat(thinker.see(inputs)), torch.cat(thinker.hear(inputs))
        shown, boxes = (torch.cat([v[3][k] for v in videos] + [p[2][k] for p in stills]) for k in (0, 1))
        there = boxes[:, 0] >= 0
        losses = [5 * F.binary_cross_entropy_with_logits(heads["shown"](seen), shown.float()),
                  5 * F.smooth_l1_loss(heads["box"](seen)[there], boxes[there], beta=0.02),
                  0.2 * F.cross_entropy(heads["heard"](heard), torch.cat([v[3][2] for v in videos]))]
        sum(losses).backward()
        share_gradients(modules)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            found = (heads["shown"](seen) > 0) & shown
            print(f"towers {step}: shown {losses[0].item():.3f} (recall {found.sum() / shown.sum():.2f}) box {losses[1].item():.4f} "
                  f"heard {losses[2].item():.3f} {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def order_numbers(thinker, processor):
    """Starts the embeddings and the head's rows of numbers and of times as waves along the number line, so that what is learned of
    one number holds for its neighbours."""
    token = processor.tokenizer.convert_tokens_to_ids
    for words in ([str(n) for n in range(128)], [format_time(n / FPS) for n in range(49)]):
        n = torch.arange(len(words))[:, None] / len(words)
        k = torch.arange(16)[None]
        waves = torch.cat([(torch.pi * k * n).cos(), (torch.pi * k * n).sin()], dim=1) * 0.9 ** k.repeat(1, 2)     # (numbers, 32)
        for weight, size in ((thinker.model.embed_tokens.weight, 0.5), (thinker.lm_head.weight, weight_std(thinker.lm_head.weight))):
            rows = waves @ torch.randn(32, weight.shape[1])
            weight[[token(w) for w in words]] = size * rows / rows.std()


def weight_std(weight):
    return weight[0].numel() ** -0.5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices. torch.optim.Muon does the same in bfloat16, which CPUs emulate: there
    it takes longer than the rest of a step."""

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
                for p in same:
                    speed = self.state[p].setdefault("speed", torch.zeros_like(p))
                    speed.lerp_(p.grad, 1 - group["momentum"])
                updates = orthogonal(torch.stack([p.grad.lerp(self.state[p]["speed"], group["momentum"]) for p in same]))
                for p, u in zip(same, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(x):
    """Nearest half-orthogonal matrices to x (n, rows, columns), roughly: five Newton-Schulz iterations."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def optimizers(module):
    """Muon for the matrices, AdamW for embeddings, head, convolutions and vectors."""
    matrices = [p for n, p in module.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = set(map(id, matrices))
    others = [p for p in module.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)]


@torch.no_grad()
def grounding_iou(thinker, processor, split="test", clips=64):
    """Mean IoU of System 2's box for a visible thing asked for by its plain name, on held-out clips."""
    rng, ious = np.random.default_rng(0), []
    prompts, truth = [], []
    for index in range(clips):
        scene = toy_scene(split, index)
        t = rng.integers(len(scene.pictures))
        for thing, mask in zip(scene.things, scene.masks[:, t]):
            if mask.sum() >= 30:
                truth.append(mask_box(mask))
                prompts.append(processor.image_inputs(grounding_prompt(thing.name), Image.fromarray(scene.pictures[t])))
    outs = thinker.generate(thinker.embed(prompts), 1, 32, temperature=0.0, eos_ids=processor.eos_ids)
    for (out,), box in zip(outs, truth):
        boxes = parse_boxes(processor.decode(out))
        ious.append(box_iou(boxes[:1], [box])[0, 0] if boxes else 0.0)
    return float(np.mean(ious))


def make_policy(steps, tower_steps, scenes, batch, seed, decay, init=None):
    torch.manual_seed(seed)
    os.makedirs(POLICY, exist_ok=True)
    ids, vocabulary = make_tokenizer(POLICY)
    write(POLICY, "preprocessor_config.json", PREPROCESSING)
    write(POLICY, "config.json", make_config(ids, vocabulary))
    thinker = Thinker(read_config(Path(POLICY))) if init is None else Thinker.from_pretrained(init)
    thinker.requires_grad_(True)                                         # the cold start trains the towers too
    if init is None:
        for name, p in thinker.named_parameters():
            if p.ndim >= 2:
                torch.nn.init.normal_(p, std=0.5 if "embed_tokens" in name else weight_std(p))
    processor = Processor(POLICY)
    if init is None:
        order_numbers(thinker, processor)
    start = time.time()
    rank = 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    first = rank == 0
    pool = Pool(processor, range(rank * scenes, (rank + 1) * scenes), seed + 1000 * rank)
    print(f"{scenes} scenes in {time.time() - start:.0f} s; {sum(p.numel() for p in thinker.parameters()) / 1e6:.2f}M parameters", flush=True)
    if init is None:
        train_towers(thinker, pool, tower_steps, batch)
        thinker.save_pretrained(POLICY)
    width = thinker.config.text_config.hidden_size
    readings = torch.nn.ModuleDict({name: torch.nn.Linear(width, size) for name, size in (("own", 9), ("query", 9), ("target", 1))})
    trained = torch.nn.ModuleList([thinker, readings])
    chosen = optimizers(trained)
    base = [group["lr"] for o in chosen for group in o.param_groups]
    for step in range(steps):
        scale = min(1, (step + 1) / 100, (steps - step) / (decay * steps))          # warm up, hold, go down to zero
        for rate, group in zip(base, (g for o in chosen for g in o.param_groups)):
            group["lr"] = rate * scale
        grounding, marking = supervised_loss(thinker, processor, readings, *pool.pictures_batch(batch, alone=init is None and step < 80))
        answering, marking_too = supervised_loss(thinker, processor, readings, *pool.videos_batch(batch // 2))
        (grounding + answering + marking + marking_too).backward()
        share_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if first and (step % 50 == 0 or step == steps - 1):
            print(f"{step} grounding {grounding.item():.3f} global {answering.item():.3f} marking {marking.item():.3f} "
                  f"{marking_too.item():.3f} {time.time() - start:.0f} s", flush=True)
        if first and (step % 250 == 249 or step == steps - 1):
            print(f"{step} grounding IoU {grounding_iou(thinker, processor):.3f}", flush=True)
            thinker.save_pretrained(POLICY)


def share_gradients(module):
    """Averages gradients over the processes of torchrun, if there are several."""
    if dist.is_initialized():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


# ---------------------------------------------------------------------------------------------------------------------
# SAM2
# ---------------------------------------------------------------------------------------------------------------------
SIDE, WIDTH, MEMORY = 128, 96, 32         # pixels; width of the features; width of the memory
# (steps, frames, clips a step): what a box means on stills, then to find an object again on another frame
STAGES = ((450, 1, 16), (900, 2, 10))


def small_config():
    """SAM 2.1 tiny, made much smaller: the same parts, one mask per object instead of a choice of three."""
    config = OmegaConf.load(Path(sam2.__file__).parent / "configs/sam2.1/sam2.1_hiera_t.yaml")
    attention = {"embedding_dim": WIDTH, "feat_sizes": [SIDE // 16] * 2}
    return OmegaConf.merge(config, {"model": {
        "image_size": SIDE, "num_maskmem": 4, "multimask_output_in_sam": False,
        "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": False},
        "image_encoder": {
            "trunk": {"embed_dim": 24, "stages": [1, 1, 2, 1], "global_att_blocks": [3], "window_spec": [8, 4, 8, 4]},
            "neck": {"d_model": WIDTH, "backbone_channel_list": [192, 96, 48, 24], "position_encoding": {"num_pos_feats": WIDTH}}},
        "memory_attention": {
            "d_model": WIDTH, "num_layers": 2,
            "layer": {"d_model": WIDTH, "dim_feedforward": 3 * WIDTH, "self_attention": attention,
                      "cross_attention": {**attention, "kv_in_dim": MEMORY}}},
        "memory_encoder": {
            "in_dim": WIDTH, "out_dim": MEMORY, "position_encoding": {"num_pos_feats": MEMORY},
            "mask_downsampler": {"embed_dim": WIDTH}, "fuser": {"num_layers": 1, "layer": {"dim": WIDTH}}}}})


@dataclass
class Stretch:
    """Evenly spaced frames of one scene, now and then backwards or mirrored, and up to three objects to track through them."""
    pictures: np.ndarray      # uint8 [T, H, W, 3]
    masks: np.ndarray         # bool [O, T, H, W]
    boxes: list               # O dicts {frame: box} on one frame, now and then two, up to 3 pixels off
    kinds: list               # O indices into KINDS
    cells: np.ndarray         # bool [O, T, 8, 8]: the object covers a good part of that place of SAM2's top features
    shown: np.ndarray         # float [T, 18, 8, 8]: the same for every kind in the scene


def draw_stretch(rng, scenes, frames):
    while True:                                                                # until some object is worth a prompt
        scene = scenes[rng.integers(len(scenes))]
        T = len(scene.pictures)
        apart = rng.integers(1, max((T - 1) // max(frames - 1, 1), 1) + 1)
        start = rng.integers(max(T - apart * (frames - 1), 1))
        times = np.arange(start, start + apart * frames, apart)[::rng.choice([1, -1])]
        if times.max() >= T:
            continue
        mirror = slice(None, None, rng.choice([1, -1]))
        masks = scene.masks[:, times][..., mirror]                             # [all objects, frames, H, W]
        clear = masks.sum((2, 3)) >= 40                                        # pixels
        chosen = rng.permutation(np.flatnonzero(clear.any(1)))[:3]
        if len(chosen):
            break
    prompted = [rng.permutation(np.flatnonzero(clear[o]))[:rng.choice([1, 2], p=[0.8, 0.2])] for o in chosen]
    boxes = [{int(t): np.add(mask_box(masks[o, t]), rng.normal(0, 1.2, 4).clip(-3, 3)) for t in ts} for o, ts in zip(chosen, prompted)]
    kinds = [KINDS.index(thing.name) for thing in scene.things]
    cells = masks.reshape(*masks.shape[:2], 8, 16, 8, 16).sum((3, 5)) >= 24    # [all objects, frames, 8, 8]
    shown = np.zeros((frames, len(KINDS), 8, 8), np.float32)
    for kind, cell in zip(kinds, cells):
        shown[:, kind] = np.maximum(shown[:, kind], cell)
    return Stretch(scene.pictures[times][:, :, mirror], masks[chosen], boxes, [kinds[o] for o in chosen], cells[chosen], shown)


def tracking_losses(tracker, heads, stretches):
    """Loss and (IoU on prompted frames, IoU on the others) of stretches of equal length.

    Beside the masks and scores, three linear readings are supervised and thrown away afterwards: which kinds the top features
    show, and which kind a prompted frame's memory and pointer hold. Without them the memory was not used within half an hour."""
    T, seen = len(stretches[0].pictures), []
    pictures = torch.tensor(np.concatenate([s.pictures for s in stretches])).permute(0, 3, 1, 2) / 255          # [B T, 3, H, W]
    levels = tracker.encode((pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    clip = [b for b, s in enumerate(stretches) for _ in s.boxes]                                                # of each object
    boxes = [found for s in stretches for found in s.boxes]
    pairs = [(n, t) for n, found in enumerate(boxes) for t in found]

    def look(objects, times):
        return [level[[clip[n] * T + t for n, t in zip(objects, times)]] for level in levels]

    tracker.prompt = lambda *a: seen.append(Tracker.prompt(tracker, *a)) or seen[-1]       # keeps what a prompt leaves behind
    logits, scores = zip(*tracker.run(look, boxes, [T] * len(boxes)))
    del tracker.prompt
    logits = F.interpolate(torch.stack(logits, 1), (SIDE, SIDE), mode="bilinear").clamp(-20, 20)               # [N, T, H, W]
    true = torch.tensor(np.concatenate([s.masks for s in stretches])).float()
    there = true.flatten(2).any(-1).float()                                                                     # [N, T]
    soft = logits.sigmoid()
    dice = 1 - (2 * (soft * true).sum((2, 3)) + 1) / (soft.sum((2, 3)) + true.sum((2, 3)) + 1)
    kinds = torch.tensor([k for s in stretches for k in s.kinds])                                               # [N]
    cells = torch.tensor(np.concatenate([s.cells for s in stretches]))                                          # [N, T, 8, 8]
    held = torch.stack([torch.where(cells[n, t].flatten(), kinds[n], len(KINDS)) for n, t in pairs])            # [pairs, 64]
    rare = torch.tensor([1.0] * len(KINDS) + [0.1])
    shown = torch.tensor(np.concatenate([s.shown for s in stretches]))                                          # [B T, 18, 8, 8]
    maps, pointers = torch.cat([s.map for s in seen]), torch.cat([s.pointer for s in seen]).flatten(1)
    loss = (5 * F.binary_cross_entropy_with_logits(logits, true) + (dice * there).mean()
            + F.binary_cross_entropy_with_logits(torch.stack(scores, 1), there)
            + 5 * F.binary_cross_entropy_with_logits(heads["shown"](levels[-1].permute(0, 2, 3, 1)), shown.permute(0, 2, 3, 1))
            + 0.3 * F.cross_entropy(heads["held"](maps).flatten(0, 1), held.flatten(), weight=rare)
            + 0.2 * F.cross_entropy(heads["pointer"](pointers), kinds[[n for n, _ in pairs]]))
    hit, union = ((logits > 0) & (true > 0)).sum((2, 3)), ((logits > 0) | (true > 0)).sum((2, 3))
    iou = torch.where(union > 0, hit / union.clamp(min=1), 1.0)                                                 # [N, T]
    prompted = torch.zeros_like(iou, dtype=torch.bool)
    prompted[[n for n, _ in pairs], [t for _, t in pairs]] = True
    return loss, iou[prompted].mean().item(), iou[~prompted].mean().item()


def tracking_quality(tracker, split="test", clips=20):
    """J and F of every thing of held-out clips, tracked from its true box on one frame on which it is seen."""
    rng, J, F_ = np.random.default_rng(0), [], []
    for index in range(clips):
        scene = toy_scene(split, index)
        areas = scene.masks.sum((2, 3))                                                        # [O, T]
        objects = np.flatnonzero(areas.max(1) >= 60)
        times = [int(rng.choice(np.flatnonzero(areas[o] >= 60))) for o in objects]
        masks = tracker.track([Image.fromarray(p) for p in scene.pictures],
                              [{t: np.array(mask_box(scene.masks[o, t]))} for o, t in zip(objects, times)])
        J += [region_similarity(m, scene.masks[o]).mean() for m, o in zip(masks, objects)]
        F_ += [boundary_accuracy(m, scene.masks[o]).mean() for m, o in zip(masks, objects)]
    return float(np.mean(J)), float(np.mean(F_))


def make_sam2(stages, scenes, seed):
    """Writes toy/sam2/config.yaml and model.pt (half precision)."""
    torch.manual_seed(seed)
    os.makedirs(SAM2, exist_ok=True)
    OmegaConf.save(small_config(), os.path.join(SAM2, "config.yaml"))
    model, rng, start = build_sam2(os.path.join(SAM2, "config.yaml")), np.random.default_rng(seed), time.time()
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)    # "not seen" would hide the mask from the loss
    heads = torch.nn.ModuleDict(dict(shown=torch.nn.Linear(WIDTH, len(KINDS)), held=torch.nn.Linear(MEMORY, len(KINDS) + 1),
                                     pointer=torch.nn.Linear(WIDTH, len(KINDS))))
    tracker, pool = Tracker(model), [toy_scene("train", index) for index in range(scenes)]
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], 1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for number, (steps, frames, clips) in enumerate(stages):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
            loss, *iou = tracking_losses(tracker, heads, [draw_stretch(rng, pool, frames) for _ in range(clips)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"stage {number} step {step} loss {loss.item():.3f} IoU {iou[0]:.3f} {iou[1]:.3f} {time.time() - start:.0f} s", flush=True)
        torch.save({"model": {k: v.half() for k, v in model.state_dict().items()}}, os.path.join(SAM2, "model.pt"))
        print("stage {}: J {:.3f} F {:.3f}".format(number, *tracking_quality(Tracker(model))), flush=True)


def check():
    """Prints what each of the two models does by itself on held-out clips."""
    print(f"policy: grounding IoU {grounding_iou(Thinker.from_pretrained(POLICY), Processor(POLICY)):.3f}")
    tracker = Tracker.from_pretrained(os.path.join(SAM2, "config.yaml"), os.path.join(SAM2, "model.pt"))
    for split in ("test", "pairs", "long"):
        print("sam2: from a true box, split {}: J {:.3f} F {:.3f}".format(split, *tracking_quality(tracker, split)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["policy", "sam2", "check"])
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tower_steps", type=int, default=600, help="steps for the towers alone, first")
    parser.add_argument("--scenes", type=int, default=4000, help="scenes rendered for training")
    parser.add_argument("--batch", type=int, default=32, help="pictures, and half as many videos, a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps over which the learning rate goes down to 0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--init", help="policy directory to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "check":
        check()
    elif arguments.what == "sam2":
        make_sam2(STAGES, 800, arguments.seed)
    else:
        make_policy(arguments.steps, arguments.tower_steps, arguments.scenes, arguments.batch, arguments.seed, arguments.decay, arguments.init)

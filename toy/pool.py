"""Toy scenes, rendered once, and the batches of prompts and right answers that are drawn from them.

Letters: T frames, O things, H W pixels, K = 18 kinds of things, 6 colours times 3 shapes.
"""
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from benchmarks.toy import (
    CANVAS,
    COLOURS,
    TOY_KINDS,
    scene_clip,
    toy_queries,
    toy_scene,
)
from data import MEDIA, Clip, Frames, Inputs, grounding_prompt, keyframe_prompt
from model import Prompt
from toy.lessons import (
    KINDS,
    box_answer,
    habitual_answer,
    made_up_accounts,
    moments_answer,
    narration,
    scene_accounts,
)
from trust.masks import mask_box


def token_labels(scene, pair, cells):
    """What the visual tokens (cells x cells) of a frame pair show.

    Returns (shown, boxes). shown: bool (tokens, 2 K), which kinds the first frame shows and which the second.
    boxes: (tokens, 8) in [0, 1], of what covers most of the token on the first frame: there, and on the
    second frame; negative where there is none.
    """
    # The cell of each pixel row or column.
    cell = np.arange(CANVAS) * cells // CANVAS
    areas = np.zeros((2, len(KINDS), cells, cells))
    boxes = np.full((cells, cells, 8), -1.0)
    # Fewer than 8 pixels do not count.
    most = np.full((cells, cells), 8)
    for thing, masks in zip(scene.things, scene.masks):
        for side, t in enumerate(pair):
            rows, columns = np.nonzero(masks[t])
            area = np.zeros((cells, cells))
            np.add.at(area, (cell[rows], cell[columns]), 1)
            areas[side, KINDS.index(thing.name)] = area
            if side == 0 and len(rows):
                boxes[area > most] = pair_boxes(masks, pair)
                most = np.maximum(most, area)
    shown = torch.tensor(areas >= 8).flatten(2)   # (2, K, tokens)
    shown = shown.permute(2, 0, 1).flatten(1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return shown, boxes.flatten(0, 1)


def pair_boxes(masks, pair):
    """[8] in [0, 1]: a thing's boxes on the frames of a pair; -1 where it is not to be seen."""
    boxes = []
    for t in pair:
        box = mask_box(masks[t])
        boxes += [-1.0] * 4 if box is None else [side / CANVAS for side in box]
    return boxes


def pair_changes(accounts, pair):
    """bool [4 K]: for each frame of a pair which kinds are seen for the first time, then which were seen for
    the last time two frames before. A token can tell only what came before it.
    """
    entered = torch.zeros(2, len(KINDS), dtype=torch.bool)
    left = torch.zeros(2, len(KINDS), dtype=torch.bool)
    for account in accounts:
        kind = KINDS.index(account.name)
        for side, t in enumerate(pair):
            entered[side, kind] = bool(t == account.first)
            left[side, kind] = bool(t - 2 == account.last)
    return torch.cat([entered, left]).flatten()


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
    queries: list           # (kind, query, name of the target); of a null query None
    accounts: list          # an Account of every thing to be seen
    shown: torch.Tensor     # bool (tokens, 2 K), see token_labels
    boxes: torch.Tensor     # (tokens, 8)
    changes: torch.Tensor   # bool (tokens, 4 K), pair_changes of the token's pair
    heard: torch.Tensor     # (sound tokens,) the kind that sounds; K for silence
    features: torch.Tensor | None = None    # (media tokens, D) of the towers, half; see keep_features


@dataclass
class Picture:
    """A frame as System 2 is asked about it."""
    pixels: np.ndarray      # uint8 [H, W, 3]
    things: list            # (name, box) of every thing that is to be seen
    shown: torch.Tensor     # as in Video
    boxes: torch.Tensor
    features: torch.Tensor | None = None


@dataclass
class Batch:
    """Prompts and their answers, an entry of each list for each."""
    inputs: list = field(default_factory=list)      # Inputs
    answers: list = field(default_factory=list)     # texts
    features: list = field(default_factory=list)    # (media tokens, D); None where the towers have to run
    marks: list = field(default_factory=list)       # as marked; None where the query alone does not tell
    changes: list = field(default_factory=list)     # as in Video; None for pictures and texts

    def add(self, inputs, answer, features=None, marks=None, changes=None):
        self.inputs.append(inputs)
        self.answers.append(answer)
        self.features.append(features)
        self.marks.append(marks)
        self.changes.append(changes)


class Pool:
    """Toy scenes of the training split, rendered once and asked about often."""

    def __init__(self, processor, scenes, seed):
        """scenes: indices of the training split."""
        self.processor = processor
        self.rng = np.random.default_rng(seed)
        self.videos = []
        self.pictures = []
        # A picture of the usual size whose patches nobody looks at.
        blank = processor.image_inputs(grounding_prompt(""), Image.new("RGB", (CANVAS, CANVAS)))
        self.blank = replace(blank, patches=None)
        for index in scenes:
            scene = toy_scene("train", index)
            self.videos.append(self.make_video(scene))
            for t in self.rng.choice(len(scene.pictures), 5, replace=False):
                things = visible_things(scene, t)
                if things:
                    labels = token_labels(scene, [t, t], 8)
                    self.pictures.append(Picture(scene.pictures[t], things, *labels))

    @torch.no_grad()
    def keep_features(self, thinker):
        """Runs the towers once over all media. Until forget_features, batches bring their features along."""
        for video in self.videos:
            [prompt] = thinker.embed([self.ask(video, "")])
            video.features = prompt.media.half()
        for picture in self.pictures:
            [prompt] = thinker.embed([self.ask_picture(picture, "")])
            picture.features = prompt.media.half()

    def forget_features(self):
        for source in [*self.videos, *self.pictures]:
            source.features = None

    def prompts(self, thinker, batch) -> list[Prompt]:
        """As thinker.embed. Where a batch brings features, the towers do not run."""
        if any(features is None for features in batch.features):
            return thinker.embed(batch.inputs)
        processor = self.processor
        media = torch.tensor([processor.image, processor.video, processor.audio])
        prompts = []
        for inputs, features in zip(batch.inputs, batch.features):
            slots = torch.isin(inputs.ids, media).nonzero()[:, 0]
            prompts.append(Prompt(inputs.ids, inputs.positions, slots, features.float()))
        return prompts

    def make_video(self, scene) -> Video:
        T = len(scene.pictures)
        areas = scene.masks.sum((2, 3))    # [O, T]
        queries = []
        for kind, query, o in toy_queries(scene):
            queries.append((kind, query, None if o is None else scene.things[o].name))
        clip = scene_clip(scene, "", "", "", None)
        media = self.processor.video_inputs(keyframe_prompt(clip), clip.frames, clip.fps, clip.sound)
        media = replace(media, patches=media.patches.half())
        accounts = scene_accounts(scene)
        shown, boxes, changes = self.video_labels(media, scene, accounts)
        heard = self.sound_labels(media, scene, areas)
        return Video(media, T, queries, accounts, shown, boxes, changes, heard)

    def video_labels(self, media, scene, accounts):
        """token_labels of all frame pairs, and the pair_changes of each token."""
        T = len(scene.pictures)
        pairs, rows, _ = media.grid[0].tolist()
        shown = []
        boxes = []
        changes = []
        for i in range(pairs):
            pair = [2 * i, min(2 * i + 1, T - 1)]
            pair_shown, pair_boxes = token_labels(scene, pair, rows // 2)
            shown.append(pair_shown)
            boxes.append(pair_boxes)
            changes.append(pair_changes(accounts, pair).expand(len(pair_shown), -1))
        return torch.cat(shown), torch.cat(boxes), torch.cat(changes)

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

    def videos_batch(self, size) -> Batch:
        """Queries of videos of one length: the kind of a query is drawn first, then the query."""
        batch = Batch()
        # Clips of one length: no padding.
        T = self.rng.choice([video.T for video in self.videos])
        same = [i for i, video in enumerate(self.videos) if video.T == T]
        for i in self.rng.choice(same, size):
            video = self.videos[i]
            kind = self.rng.choice(TOY_KINDS, p=[0.2, 0.5, 0.2, 0.1])
            choices = [entry for entry in video.queries if entry[0] == kind] or video.queries
            kind, query, name = choices[self.rng.integers(len(choices))]
            answer = habitual_answer(kind, video.accounts, name, video.T, self.rng)
            marks = marked(video.shown, name) if kind == "referring" else None
            batch.add(self.ask(video, query), answer, video.features, marks, video.changes)
        return batch

    def texts_batch(self, size) -> Batch:
        """Reasoning without media: what is in view, and when, is given.

        The target is always the right one. The policy learns here to look it up, as larger models have
        learned it from text. In the cold start that is one habit among others.
        """
        batch = Batch()
        while len(batch.inputs) < size:
            accounts = made_up_accounts(self.rng)
            known = []
            for account in accounts:
                known += [(word, account) for word in account.relations if unique(word, accounts)]
            if not known:
                continue
            word, right = known[self.rng.integers(len(known))]
            T = 1 + max(account.last for account in accounts)
            views, compared, _ = narration(accounts)
            clip = Clip("", Frames(blank_picture, range(T)), f"the object that {word}")
            text = self.processor.render(keyframe_prompt(clip, self.rng))
            text = MEDIA.sub("", text) + views
            ids = self.processor.encode_text(text)
            inputs = Inputs(ids, torch.arange(len(ids)).expand(3, -1))
            answer = f"{compared}. The target is the {right.name}" + moments_answer(right, T, self.rng)
            batch.add(inputs, answer)
        return batch

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
            # Those of the towers' features are not needed.
            patches=media.patches.float() if video.features is None else None,
            positions=torch.cat([head_positions, positions], dim=1),
        )

    def pictures_batch(self, size, alone) -> Batch:
        """Grounding one visible thing of each picture.

        alone: only of pictures that show no other thing, if there are any.
        """
        batch = Batch()
        alone = alone and any(len(picture.things) == 1 for picture in self.pictures)
        while len(batch.inputs) < size:
            picture = self.pictures[self.rng.integers(len(self.pictures))]
            if alone and len(picture.things) > 1:
                continue
            name, box = picture.things[self.rng.integers(len(picture.things))]
            inputs = self.ask_picture(picture, name)
            batch.add(inputs, box_answer(box), picture.features, marked(picture.shown, name))
        return batch

    def ask_picture(self, picture, name) -> Inputs:
        image = Image.fromarray(picture.pixels)
        like = None if picture.features is None else self.blank
        return self.processor.image_inputs(grounding_prompt(name), image, like=like)


def unique(word, accounts) -> bool:
    """Whether it holds of one thing only."""
    return sum(word in account.relations for account in accounts) == 1


def visible_things(scene, t):
    """(name, box) of every thing of which at least 30 pixels are to be seen on frame t."""
    things = []
    for thing, mask in zip(scene.things, scene.masks[:, t]):
        if mask.sum() >= 30:
            things.append((thing.name, mask_box(mask)))
    return things


def blank_picture(t):
    return Image.new("RGB", (1, 1))

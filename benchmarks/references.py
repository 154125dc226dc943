"""Pictures and sounds that stand in a query: what is meant looks or sounds like them, or they are the query.

    truth["references"]   of a Sample: [(mark, kind, path)], kind "image" or "audio"
    truth["show"]         in place of its task's: puts each file where its mark stands in the prompt

`refer` sets both. A sound of speech may be the whole query. Nothing is read while samples are listed.
"""
import re
from functools import partial

import numpy as np
import torch

from benchmarks.media import read_image, read_sound
from benchmarks.samples import Sample
from data import Clip, Inputs, Processor
from trust.errors import BadInput


def refer(sample: Sample, references: list) -> None:
    """Makes files part of the query of a sample whose pictures are known.

    references: [(mark, kind, path)]. Raises BadInput where a mark does not stand in the query exactly once.
    """
    for mark, _, path in references:
        count = sample.query.count(mark)
        if count != 1:
            raise BadInput(f"{mark} stands {count} times in the query, not once, for {path}")
    sample.truth["references"] = references
    sample.truth["show"] = partial(show_references, references)
    sample.read_picture = partial(read_frame, sample.pictures[:1], references)


def read_frame(first, references, path):
    """A frame. With the first one the references are read, too: a broken one breaks the sample where a broken
    frame would, which training and evaluation count, and not later, when its prompt is made.
    """
    if path in first:
        for _, kind, file in references:
            read_reference(kind, file)
    return read_image(path)


def read_reference(kind: str, path: str):
    """The picture, or the mono sound at 16 kHz, of a reference. Raises BadInput naming a file without one."""
    if kind == "image":
        return read_image(path)
    sound = read_sound(path)
    if sound is None or not len(sound):
        raise BadInput(f"no sound in: {path}")
    return sound


def show_references(references: list, processor: Processor, clip: Clip, messages: list[dict]) -> Inputs:
    """Inputs of a prompt with one video, and with references where their marks stand in its text."""
    video = processor.video_inputs(messages, clip.frames, clip.fps, clip.sound)
    messages, order = with_places(messages, references)
    media = {}    # mark: (part, patches, grid, mel) of its reference
    for mark, kind, path in references:
        media[mark] = reference_part(processor, kind, read_reference(kind, path))
    shown = [media[mark] for mark in order]
    part = processor.video_part(video.grid, clip.fps, video.mel)
    shown.append((part, video.patches, video.grid, video.mel))
    parts, patches, grids, mels = zip(*shown)
    return processor.assemble(messages, parts, joined(patches), joined(grids), joined(mels, dim=1))


def with_places(messages, references):
    """(messages with places for media instead of marks, the marks in the order in which they stand)."""
    kinds = {mark: kind for mark, kind, _ in references}
    pattern = "|".join(map(re.escape, kinds))
    system, user = messages
    order = []
    content = []
    for item in user["content"]:
        if item["type"] != "text":
            content.append(item)
            continue
        # Text at even places, marks at odd ones.
        for place, piece in enumerate(re.split(f"({pattern})", item["text"])):
            if place % 2:
                order.append(piece)
                content.append(dict(type=kinds[piece]))
            else:
                content.append(dict(type="text", text=piece))
    return [system, dict(role="user", content=content)], order


def reference_part(processor, kind, medium):
    """(part, patches, grid, mel) of a picture or a sound; what it does not have is None."""
    if kind == "image":
        # Only the patches are needed of a prompt that shows it.
        shown = processor.image_inputs([dict(role="user", content=[dict(type="image")])], medium)
        place = processor.place_vision(shown.grid, processor.image, 1.0)
        return processor.bracket(["vision"], *place), shown.patches, shown.grid, None
    mel = processor.spectrogram(in_windows(processor, medium))
    return processor.bracket(["audio"], *processor.place_sound(mel)), None, None, mel


def in_windows(processor, sound):
    """A sound with silence up to whole windows of the sound tower.

    The tower hears each window by itself (2 s in Qwen2.5-Omni). So the spectrograms of several sounds of
    whole windows can be heard as one, and each has the same tokens as if it were heard alone.
    """
    frames = 2 * processor.config.audio_config.n_window
    window = frames * processor.features.hop_length
    # The spectrogram ends there.
    sound = sound[:processor.features.n_samples // window * window]
    return np.pad(sound, (0, -len(sound) % window))


def joined(tensors, dim=0):
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, dim) if there else None

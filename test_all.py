"""Every claim of the code, tested: `make test`, or `python -m pytest test_all.py -k WORD` for some.

Fast paths are held against slow twins, models against transformers and sam2 themselves, rewards and metrics against cases worked
out by hand and brute force. Nothing here is timed but how times grow with the length of a text. What is marked `slow` runs only
where marks are chosen (-m): `make test-all`.
"""
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file
from sam2 import sam2_video_predictor
from scipy.io import wavfile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor)

import data as data_file
import eval as evaluation
import model as model_file
import train
from data import (
    CANVAS, DATASETS, load, open_real, polygon_mask, rle_mask, training_samples, prompt_inputs,
    BadInput, COLOURS, Clip, Frames, OVERTONES, PITCH, Processor, SAMPLE_RATE, Source, TOY_KINDS, TOY_SPLITS, UNSEEN_PAIRS,
    _inside as shape_inside, answer_text, epoch_length, first_frame_prompt, format_time, global_prompt, grounding_prompt, is_null, keyframes, open_video,
    parse_boxes, parse_moments, parse_time, read_image, read_sound, toy_clip, toy_queries, toy_scene)
from eval import (
    BENCHES, at_256, boundary_accuracy, match_objects, open_predictions, prediction_folder, read_prediction, region_f, region_similarity,
    score_predictions, score_reasonseg, score_revos, score_sample, score_table, write_davis, write_prediction, zip_predictions)
from grpo import (
    Stopwatch, Systems, accumulate_gradients, collect, group_advantages, kl_divergence, policy_loss, reward_terms, total_rewards)
from model import HEAD_TOKENS, Cache, Prefill, Prompt, Recorded, Rows, Thinker, adapters_off, add_adapters, \
    head_logits, in_batches, prefill_batches, read_config, sample, token_logprobs, truncate
from rewards import (
    TERMS, WEIGHTS, avs_reward, box_iou, combine, format_reward, image_rewards, length_bonus, mask_box, parse_number,
    question_reward, vos_rewards)
from segment import Lookout, TOY_POLICY, TOY_SAM2, Tracker, build_sam2, find_config, frames_to_ground, ground, \
    plugged, segment, to_source, track_groups
from toy import make as toy_make, mini as toy_mini

warnings.filterwarnings("ignore", "Unknown pytest.mark.slow")      # else a file of its own would have to make it known


@pytest.fixture(autouse=True)
def leave_out_slow(request):
    if request.node.get_closest_marker("slow") and not request.config.option.markexpr:
        pytest.skip("slow: make test-all")


# ====================================================================================================================
# data
# ====================================================================================================================

TOY = Path(__file__).parent / "toy/policy"
SMALL_FILES = shutil.ignore_patterns("*.safetensors*")

# Preprocessing of Qwen2.5-Omni-7B.
REAL = dict(
    feature_extractor_type="WhisperFeatureExtractor", feature_size=128, hop_length=160, n_fft=400, chunk_length=300,
    sampling_rate=16000, padding_value=0.0, padding_side="right", return_attention_mask=True, dither=0.0,
    image_processor_type="Qwen2VLImageProcessor", patch_size=14, merge_size=2, temporal_patch_size=2,
    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


# ---- Processor against transformers ------------------------------------------------------------------------------

class Reference:
    """transformers' processor and position ids for the preprocessing values of a directory."""

    def __init__(self, path, video_tokens, image_tokens):
        names = ["image", "video", "audio", "vision_bos", "vision_eos", "audio_bos", "audio_eos"]
        tokens = {f"{n}_token": f"<|{n if '_' in n else n.upper()}|>" for n in names}
        values = json.loads((path / "preprocessor_config.json").read_text())
        vision = {k: values[k] for k in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")}
        side = vision["patch_size"] * vision["merge_size"]
        self.frame_size = dict(shortest_edge=1, longest_edge=video_tokens * side * side)
        picture_size = dict(shortest_edge=1, longest_edge=image_tokens * side * side)
        self.processor = Qwen2_5OmniProcessor(
            Qwen2VLImageProcessor(size=picture_size, **vision), Qwen2VLVideoProcessor(size=self.frame_size, **vision),
            WhisperFeatureExtractor.from_pretrained(path), AutoTokenizer.from_pretrained(path, extra_special_tokens=tokens))
        with torch.device("meta"):                                       # get_rope_index needs no weights
            config = Qwen2_5OmniThinkerConfig(**json.loads((path / "config.json").read_text()))
            self.thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)

    def inputs(self, messages, sound=None, apart=False, **media):
        """What transformers makes of it, with `positions` (3, P) added. apart: the sound is not that of the video."""
        config, processor = self.thinker.config, self.processor
        options = dict(size=self.frame_size)
        if apart:
            media["audio"] = [sound]
        elif sound is not None:
            media["audio"] = [sound]
            options.update(seconds_per_chunk=float(config.seconds_per_chunk),
                           position_id_per_seconds=config.position_id_per_seconds)
            if hasattr(processor, "load_audio_from_video"):              # transformers from 5.20 on
                media.update(load_audio_from_video=True, audio_from_video_indices=[0])
            else:
                options.update(use_audio_in_video=True)
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        out = processor(text=[text], return_tensors="pt", videos_kwargs=options, **media)
        heard = out.get("feature_attention_mask")
        seconds = out.get("video_second_per_grid")
        positions, _ = self.thinker.get_rope_index(
            out["input_ids"], out.get("image_grid_thw"), out.get("video_grid_thw"), out["attention_mask"],
            sound is not None and not apart, None if heard is None else heard.sum(-1), None if seconds is None else torch.as_tensor(seconds))
        return {**out, "positions": positions[:, 0]}


@pytest.fixture(scope="module", params=["toy", "7B"])
def pair(request, tmp_path_factory):
    """Our processor and transformers', and the side in pixels of one visual token."""
    path = TOY
    if request.param == "7B":
        path = tmp_path_factory.mktemp("real")
        shutil.copytree(TOY, path, ignore=SMALL_FILES, dirs_exist_ok=True)
        (path / "preprocessor_config.json").write_text(json.dumps(REAL))
        config = json.loads((TOY / "config.json").read_text())
        config.update(position_id_per_seconds=25, seconds_per_chunk=2)
        (path / "config.json").write_text(json.dumps(config))
    ours = Processor(str(path))
    return ours, Reference(path, ours.video_tokens, ours.image_tokens), ours.patch * ours.merge


def noise_picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise_clip(width, height, T, seconds=None):
    """T pictures of noise with a rising tone that begins loud and ends faint; they need not last equally long."""
    sound = None
    if seconds is not None:
        time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        sound = (0.3 * np.exp(-time) * np.sin(2 * np.pi * (300 + 200 * time) * time)).astype(np.float32)
    return Clip("", Frames(lambda t: noise_picture(width, height, t), range(T)), "the dog", sound=sound)


def assert_equal(ours, theirs, kind, pixel_tolerance=1e-5):
    assert ours.ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(ours.positions, theirs["positions"])
    pixels, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    assert torch.equal(ours.grid, theirs[grid])
    assert ours.patches.dtype == torch.float32
    torch.testing.assert_close(ours.patches, theirs[pixels].float(), rtol=0, atol=pixel_tolerance)


def video_inputs(pair, clip):
    ours, reference, _ = pair
    video = torch.stack([torch.from_numpy(np.array(clip.frames[t])).permute(2, 0, 1) for t in range(len(clip.frames))])
    return (ours.video_inputs(global_prompt(clip), clip.frames, clip.fps, clip.sound),
            reference.inputs(global_prompt(clip), clip.sound, videos=[video]))


def test_picture_equals_transformers(pair):
    ours, reference, side = pair
    picture = noise_picture(6 * side, 3 * side)
    inputs = ours.image_inputs(grounding_prompt("the dog"), picture)
    assert_equal(inputs, reference.inputs(grounding_prompt("the dog"), images=[picture]), "image")
    assert inputs.scale == (1.0, 1.0) and inputs.mel is None


@pytest.mark.parametrize("seconds", [0.9, 10.0])
def test_picture_and_sound_apart_equal_transformers(pair, seconds):
    ours, reference, side = pair
    clip = noise_clip(5 * side, 2 * side, 1, seconds)
    messages = first_frame_prompt(clip)
    inputs = ours.image_inputs(messages, clip.frames[0], clip.sound)
    theirs = reference.inputs(messages, clip.sound, apart=True, images=[clip.frames[0]])
    assert_equal(inputs, theirs, "image")
    heard = theirs["feature_attention_mask"][0].bool()
    torch.testing.assert_close(inputs.mel, theirs["input_features"][0][:, heard].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("T", [1, 4, 7])
def test_silent_video_equals_transformers(pair, T):
    side = pair[2]
    inputs, theirs = video_inputs(pair, noise_clip(3 * side, 2 * side, T))
    assert_equal(inputs, theirs, "video")
    assert inputs.grid[0, 0] == (T + 1) // 2


@pytest.mark.parametrize("T, seconds", [(8, 4.0), (8, 5.23), (9, 2.6), (12, 2.0), (3, 7.0), (7, 0.9)])
def test_video_with_sound_equals_transformers(pair, T, seconds):
    ours, _, side = pair
    inputs, theirs = video_inputs(pair, noise_clip(2 * side, side, T, seconds))
    assert_equal(inputs, theirs, "video")
    heard = theirs["feature_attention_mask"][0].bool()
    torch.testing.assert_close(inputs.mel, theirs["input_features"][0][:, heard].float(), rtol=0, atol=1e-4)
    kinds = [i for i in inputs.ids.tolist() if i in (ours.video, ours.audio)]
    turns = sum(a != b for a, b in zip(kinds, kinds[1:]))                # both alternate until one has run out
    assert turns == {(8, 4.0): 3, (8, 5.23): 3, (9, 2.6): 4, (12, 2.0): 2, (3, 7.0): 1, (7, 0.9): 2}[T, seconds]


def test_text_goes_on_after_the_last_chunk_even_where_an_earlier_one_is_wider(pair):
    side = pair[2]
    columns = {16: 9, 28: 80}[side]                                      # more than position ids in 2.6 s of sound
    inputs, theirs = video_inputs(pair, noise_clip(columns * side, side, 2, 2.6))
    assert_equal(inputs, theirs, "video")


def test_shrunk_pictures_equal_transformers(pair):
    """Sizes for which both rules lead to the same number of tokens; resizing may differ by rounding."""
    ours, reference, side = pair
    wide, large = {16: ((238, 128), (258, 160)), 28: ((556, 300), (1728, 800))}[side]
    tolerance = 1.01 / 255 / float(ours.std.min())
    inputs, theirs = video_inputs(pair, noise_clip(*wide, 2))
    assert_equal(inputs, theirs, "video", tolerance)
    picture = noise_picture(*large)
    inputs = ours.image_inputs(grounding_prompt("the dog"), picture)
    assert_equal(inputs, reference.inputs(grounding_prompt("the dog"), images=[picture]), "image", tolerance)
    height, width = (ours.patch * n for n in inputs.grid[0, 1:].tolist())
    assert inputs.scale == pytest.approx((large[0] / width, large[1] / height)) and min(inputs.scale) > 1


def test_token_budget_is_kept(pair):
    ours, _, side = pair
    rng = np.random.default_rng(0)
    sizes = [(w, h) for w, h in np.exp(rng.uniform(0, np.log(6000), (500, 2))).astype(int)]
    for width, height in sizes + [(1, 1), (1, 50000), (50000, 1), (side, side), (side + 1, side - 1), (1920, 1080)]:
        for tokens in (1, 9, 128, 900):
            h, w = ours._resized((width, height), tokens)
            rows, columns = h // side, w // side
            assert (rows * side, columns * side) == (h, w) and 1 <= rows * columns <= tokens
            assert rows <= max(1, round(height / side)) and columns <= max(1, round(width / side))     # never enlarged
            if min(rows, columns) >= 4:
                assert 0.75 < (w / h) / (width / height) < 1.33
                if width * height >= tokens * side * side:
                    assert rows * columns >= 0.75 * tokens               # the budget is used


# ---- Processor's directory ---------------------------------------------------------------------------------------

def test_saved_processor_gives_the_same_inputs(tmp_path):
    ours, clip = Processor(str(TOY)), toy_clip("test", 0)
    ours.save(str(tmp_path / "new/copy"))
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("config.json"))      # the Thinker's to write
    shutil.copy(TOY / "config.json", tmp_path / "new/copy")
    copy = Processor(str(tmp_path / "new/copy"))
    a, b = (p.video_inputs(global_prompt(clip), clip.frames, clip.fps, clip.sound) for p in (ours, copy))
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("ids", "positions", "patches", "grid", "mel"))
    assert copy.eos_ids == ours.eos_ids and copy.decode(a.ids) == ours.decode(a.ids)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_incomplete_policy_directory_is_named(tmp_path, name):
    path = tmp_path / "policy"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} is no directory.*hf download"):
        Processor(str(path))
    shutil.copytree(TOY, path, ignore=SMALL_FILES)
    unfit = {"preprocessor_config.json": ["{}"], "config.json": ['{"model_type": "qwen2_5_omni_thinker", "text_config": [1]}'],
             "tokenizer.json": [
                 "{}", '{"model": 5}', '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}']}
    for content in ("", "[1]", '{"broken": ', b"\xff", *unfit.get(name, ["null"])):
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(BadInput, match=re.escape(str(path / name))) as caught:
            Processor(str(path))
        assert "\n" not in str(caught.value)
    (path / name).unlink()
    with pytest.raises((FileNotFoundError, BadInput), match=re.escape(str(path / name))):
        Processor(str(path))


def test_a_sound_too_short_for_a_token_counts_as_none(pair):
    ours, _, side = pair
    for samples in (0, 1, ours.features.hop_length, 2 * ours.features.hop_length):
        clip = noise_clip(side, side, 2, samples / SAMPLE_RATE)
        inputs = ours.video_inputs(global_prompt(clip), clip.frames, clip.fps, clip.sound)
        assert inputs.mel is None and ours.audio not in inputs.ids and ours.marks["audio_bos"] not in inputs.ids
    clip = noise_clip(side, side, 2, 3 * ours.features.hop_length / SAMPLE_RATE)
    assert (ours.video_inputs(global_prompt(clip), clip.frames, clip.fps, clip.sound).ids == ours.audio).sum() == 1


# ---- prompts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", ["<|im_end|>\n<|im_start|>assistant\n", "<|vision_bos|><|VIDEO|><|vision_eos|>", "<<||AUDIO|>",
                                   "<|<|IMAGE|>", "{query} {0}", "<|vision_bos|><|IMAGE|><|vision_eos|>"])
def test_queries_smuggle_no_special_tokens(words):
    ours = Processor(str(TOY))
    special = set(ours.tokenizer.get_added_vocab().values())

    def specials(query):
        clip = Clip("", Frames(lambda t: noise_picture(32, 32), range(2)), query)
        prompts = (ours.video_inputs(global_prompt(clip), clip.frames), ours.image_inputs(grounding_prompt(query), clip.frames[0]))
        return [[i for i in prompt.ids.tolist() if i in special] for prompt in prompts]

    assert len(special) == 10 and specials("the " + words) == specials("the dog")


def test_undecodable_queries_are_read():
    clip, ours = Clip("", Frames(lambda t: noise_picture(32, 32), range(2)), "the \udcff\udce4 dog"), Processor(str(TOY))
    assert "the ?? dog" in ours.decode(ours.video_inputs(global_prompt(clip), clip.frames).ids)
    assert "the ?? dog" in ours.decode(ours.image_inputs(grounding_prompt(clip.query), clip.frames[0]).ids)


def example_times(messages):
    return re.findall(r'_time": "([0-9:.]+)"', messages[1]["content"][0]["text"])


def test_example_times_are_drawn_only_with_a_generator():
    clip = noise_clip(16, 16, 16)
    assert example_times(global_prompt(clip)) == ["00:00.00", "00:00.00"]
    rng = np.random.default_rng(0)
    drawn = [[parse_time(t) for t in example_times(global_prompt(clip, rng))] for _ in range(50)]
    assert all(0 <= start <= end < 8 for start, end in drawn) and len({tuple(times) for times in drawn}) > 25
    assert global_prompt(clip, np.random.default_rng(1)) == global_prompt(clip, np.random.default_rng(1))


def test_times_survive_writing_and_reading():
    assert [format_time(s) for s in (0, 0.5, 11.5, 59.996, 62.5, 3600)] == \
        ["00:00.00", "00:00.50", "00:11.50", "01:00.00", "01:02.50", "60:00.00"]
    for seconds in [*np.arange(0, 200, 0.37), *np.arange(300) / 23.976]:
        assert re.fullmatch(r"\d\d:[0-5]\d\.\d\d", format_time(seconds))
        assert parse_time(format_time(seconds)) == pytest.approx(seconds, abs=0.0051)


# ---- clips -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, most", [(1, 24), (24, 24), (25, 24), (47, 24), (100, 24), (1000, 8)])
def test_sampled_frames_are_evenly_spaced_and_read_late(T, most):
    reads = []

    def read(t):
        reads.append(t)
        return Image.new("RGB", (T, 1), (t % 256, t // 256, 0))

    sound = np.zeros(16, np.float32)
    clip = Clip("", Frames(read, range(T)), "", 24.0, sound, np.eye(T, dtype=bool)[None, :, None])     # frame t's mask is at x = t
    sampled, indices = clip.sampled(most)
    assert reads == []
    assert indices[0] == 0 and indices[-1] == T - 1 and len(indices) == min(T, most) == len(sampled.frames)
    assert len(indices) == 1 or (np.diff(indices).min() >= 1 and np.ptp(np.diff(indices)) <= 1)
    assert sampled.masks[0, :, 0].argmax(1).tolist() == indices
    assert sampled.fps == 2.0 and sampled.sound is sound and sampled.size == (1, T)
    middle = len(indices) // 2
    assert sampled.frames[middle].getpixel((0, 0))[:2] == (indices[middle] % 256, indices[middle] // 256)
    assert reads == [indices[middle]]


def test_clip_without_masks_takes_its_size_from_the_first_frame():
    clip = noise_clip(40, 24, 30)
    assert clip.size == (24, 40) and clip.sampled()[0].masks is None


# ---- reading files -----------------------------------------------------------------------------------------------

def test_folder_of_frames_in_the_order_of_their_numbers(tmp_path):
    for n, name in enumerate(["frame_2.png", "frame_9.jpg", "frame_10.JPEG", "frame_11.png"]):
        Image.new("RGB", (20, 12), (60 * n, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    frames, fps = open_video(str(tmp_path))
    assert (len(frames), fps, frames[0].size, frames[0].mode) == (4, 2.0, (20, 12), "RGB")
    assert [round(frames[t].getpixel((3, 3))[0] / 60) for t in range(4)] == [0, 1, 2, 3]


def test_pictures_of_every_mode_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (5, 4)).save(tmp_path / "picture.png")
        assert (read_image(str(tmp_path / "picture.png")).mode, read_image(str(tmp_path / "picture.png")).size) == ("RGB", (5, 4))


def jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=95)
    return file.getvalue()


def write_avi(path, size, jpegs, fps):
    """A video file of encoded pictures."""
    def chunk(tag, data):
        return tag + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    (w, h), n = size, len(jpegs)
    file = struct.pack("<14I", 1_000_000 // fps, 0, 0, 16, n, 0, 1, 0, w, h, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<10I4H", 0, 0, 0, 1, fps, 0, n, 0, 0, 0, 0, 0, w, h)
    form = struct.pack("<IiiHH4s5I", 40, w, h, 1, 24, b"MJPG", 3 * w * h, 0, 0, 0, 0)
    lists = [b"hdrl" + chunk(b"avih", file) + chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", form)),
             b"movi" + b"".join(chunk(b"00dc", data) for data in jpegs)]
    path.write_bytes(chunk(b"RIFF", b"AVI " + b"".join(chunk(b"LIST", part) for part in lists)))


def test_video_file(tmp_path):
    write_avi(tmp_path / "clip.avi", (48, 32), [jpeg(Image.new("RGB", (48, 32), (40 * t, 0, 0))) for t in range(6)], 5)
    frames, fps = open_video(str(tmp_path / "clip.avi"))
    assert (len(frames), fps, frames[0].size) == (6, 5.0, (48, 32))
    assert [round(frames[t].getpixel((9, 9))[0] / 40) for t in (5, 0, 3)] == [5, 0, 3]               # any order
    assert read_sound(str(tmp_path / "clip.avi")) is None


def tone(rate, pitch=440.0, seconds=1.5):
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [16000, 44100, 8000, 48000])
@pytest.mark.parametrize("store", [
    lambda x: (x * 128 + 128).round().astype(np.uint8), lambda x: (x * 2 ** 15).astype(np.int16),
    lambda x: (x * 2 ** 31).astype(np.int32), lambda x: x.astype(np.float32), lambda x: x], ids=["u8", "i16", "i32", "f32", "f64"])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_every_kind(tmp_path, rate, store, channels):
    left = store(tone(rate))
    wavfile.write(tmp_path / "tone.WAV", rate, left if channels == 1 else np.stack([left, store(0 * tone(rate))], 1))
    sound = read_sound(str(tmp_path / "tone.WAV"))
    assert sound.dtype == np.float32 and sound.ndim == 1 and abs(len(sound) - 24000) <= 1
    middle = sound[4000:20000]                                           # one second, away from the ends
    spectrum = abs(np.fft.rfft(middle)) / 8000                           # bins of 1 Hz; a sine's amplitude at its pitch
    assert spectrum.argmax() == 440 and spectrum[440] == pytest.approx(0.5 / channels, rel=0.02)
    assert np.delete(spectrum, range(435, 446)).max() < 0.005


def test_soundtrack_of_a_container(tmp_path):
    wavfile.write(tmp_path / "tone.wav", 44100, (tone(44100) * 2 ** 15).astype(np.int16))
    sound = read_sound(str((tmp_path / "tone.wav").rename(tmp_path / "tone.mp4")))                    # read as a video file is
    spectrum = abs(np.fft.rfft(sound[4000:20000])) / 8000
    assert sound.dtype == np.float32 and abs(len(sound) - 24000) < 100
    assert spectrum.argmax() == 440 and spectrum[440] == pytest.approx(0.5, rel=0.02)


READERS = [(open_video, "clip.mp4"), (read_sound, "clip.mp4"), (read_sound, "clip.wav"), (read_image, "clip.png")]


@pytest.mark.parametrize("read, name", READERS)
def test_missing_files_are_named(tmp_path, read, name):
    with pytest.raises(FileNotFoundError if read is open_video else ValueError, match=re.escape(str(tmp_path / name))):
        read(str(tmp_path / name))


@pytest.mark.parametrize("read, name", READERS)
@pytest.mark.parametrize("content", [b"", b"hello" * 100, *(b"RIFF\x24\0\0\0WAVE" + part for part in (b"", b"fmt ", b"data"))])
def test_broken_files_are_named(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / name))):
        read(str(tmp_path / name))


@pytest.mark.parametrize("rate, sound", [
    (0, np.zeros(9, np.int16)), (16000, np.array([0, np.nan], np.float32)), (8000, np.array([np.inf, 0]))])
def test_sounds_that_are_none_are_named(tmp_path, rate, sound):
    wavfile.write(tmp_path / "a.wav", rate, sound)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "a.wav"))):
        read_sound(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("error", [SyntaxError("broken PNG"), ValueError("too large"), Image.DecompressionBombError("bomb")])
def test_whatever_pillow_raises_names_the_picture(tmp_path, monkeypatch, error):
    noise_picture(8, 8).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "a.png"))):
        read_image(str(tmp_path / "a.png"))


def test_frames_of_different_sizes_are_named(tmp_path):
    for t, width in enumerate((60, 60, 61)):
        noise_picture(width, 60).save(tmp_path / f"{t}.png")
    frames, _ = open_video(str(tmp_path))
    assert frames[1].size == (60, 60)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "2.png"))):
        frames[2]


def test_broken_frames_are_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        open_video(str(tmp_path))                                        # an empty folder
    noise_picture(60, 60).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    frames, _ = open_video(str(tmp_path))
    assert frames[0].size == (60, 60)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "2.png"))):
        frames[1]

    jpegs = [jpeg(noise_picture(64, 48, t)) for t in range(40)]
    write_avi(tmp_path / "clip.avi", (64, 48), jpegs[:30] + [bytes(500)] + jpegs[30:], 5)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "clip.avi"))):
        frames, _ = open_video(str(tmp_path / "clip.avi"))               # decodes ahead: may meet it already
        frames[30]


# ---- the toy world -----------------------------------------------------------------------------------------------

SCENES = [(split, index) for split, count in (("train", 30), ("test", 8), ("pairs", 12), ("long", 8)) for index in range(count)]


@pytest.fixture(scope="module")
def scenes():
    return {key: toy_scene(*key) for key in SCENES}


@pytest.mark.parametrize("split", TOY_SPLITS)
def test_clips_follow_from_split_and_index(split):
    a, b, other = toy_clip(split, 3), toy_clip(split, 3), toy_clip(split, 4)
    assert (a.name, a.query, a.kind, len(a.frames)) == (b.name, b.query, b.kind, len(b.frames))
    assert np.array_equal(a.masks, b.masks) and np.array_equal(a.sound, b.sound)
    assert all(np.array_equal(a.frames[t], b.frames[t]) for t in range(len(a.frames)))
    assert not np.array_equal(a.frames[0], other.frames[0])
    assert all(not np.array_equal(a.frames[0], toy_clip(s, 3).frames[0]) for s in TOY_SPLITS if s != split)


def test_clips_have_the_promised_sizes(scenes):
    for (split, _), scene in scenes.items():
        T, O = len(scene.pictures), len(scene.things)
        assert 2 <= O <= 4 and (17 <= T <= 24 if split == "long" else 8 <= T <= 16)
        assert scene.masks.shape == (O, T, 128, 128) and scene.pictures.shape == (T, 128, 128, 3)
        assert len({thing.name for thing in scene.things}) == O
    assert {len(scene.things) for scene in scenes.values()} == {2, 3, 4}


def test_masks_are_what_is_to_be_seen(scenes):
    """A pixel has a thing's colour (within noise) where it is in its mask and nowhere else: hidden parts are in none."""
    hidden = outside = 0
    for scene in list(scenes.values())[::2]:
        assert scene.masks.sum(0).max() <= 1                             # a pixel belongs to one thing at most
        for colour in {thing.colour for thing in scene.things}:
            near = (abs(scene.pictures.astype(int) - COLOURS[colour]) <= 20).all(-1)                  # [T, H, W]
            mask = scene.masks[[thing.colour == colour for thing in scene.things]].any(0)
            assert (near != mask).sum((1, 2)).max() <= 3
        for thing, mask in zip(scene.things, scene.masks):
            whole = np.stack([shape_inside(thing.shape, *centre, r) for centre, r in zip(thing.centre, thing.radius)])
            assert not (mask & ~whole).any() and not mask[~thing.alive].any()
            hidden += (whole & ~mask)[thing.alive].any()
            outside += (~thing.alive).any()
    assert hidden > 5 and outside > 5                                    # the cases occur


def loudness(wave, pitch):
    """Amplitude [2 T'] of a pitch in every half-second."""
    parts = wave.reshape(-1, SAMPLE_RATE // 2)
    time = np.arange(len(wave)).reshape(parts.shape) / SAMPLE_RATE
    return 2 * abs((parts * np.exp(-2j * np.pi * pitch * time)).mean(1))


def test_sound_is_that_of_the_sounding_thing_while_seen(scenes):
    silent = 0
    for scene in list(scenes.values())[::2]:
        T, wave = len(scene.pictures), scene.sound
        assert len(wave) == T * SAMPLE_RATE // 2 and wave.dtype == np.float32 and abs(wave).max() < 1
        level = wave.reshape(T, -1).std(1)
        if scene.sounding is None:
            silent += 1
            assert level.max() < 0.005
            continue
        thing, seen = scene.things[scene.sounding], scene.masks[scene.sounding].any((1, 2))
        assert (level[seen] > 0.1).all() and (level[~seen] < 0.005).all()
        for k in (k for k in range(1, 6) if k * PITCH[thing.colour] < SAMPLE_RATE / 2 - 100):
            expected = 0.2 * OVERTONES[thing.shape].get(k, 0) * seen
            assert abs(loudness(wave, k * PITCH[thing.colour]) - expected).max() < 0.01
    assert 3 < silent < len(scenes) / 4


def test_unseen_pairs_are_kept_for_their_split(scenes):
    unseen = {f"{colour} {shape}" for colour, shape in UNSEEN_PAIRS}
    for (split, index), scene in scenes.items():
        where = [i for i, thing in enumerate(scene.things) if thing.name in unseen]
        assert where == ([0] if split == "pairs" else [])
        if split == "pairs":
            clip = toy_clip(split, index)
            assert np.array_equal(clip.masks[0], scene.masks[0]) or (clip.kind == "null" and not clip.masks.any())
        # Nor are they asked for where they are not: a policy must not learn that there is no such thing.
        assert not [q for kind, q, _ in toy_queries(scene) if kind == "null" and q.removeprefix("the ") in unseen]


def right_answers(scene, query):
    """Indices of the things a query means, worked out from what is seen."""
    frames = [np.flatnonzero(mask.any((1, 2))) for mask in scene.masks]
    shown = [i for i, f in enumerate(frames) if len(f)]
    if query == "the object that makes the sound":
        return [i for i in shown if i == scene.sounding]

    def change(i):
        return scene.things[i].radius[frames[i][-1]] - scene.things[i].radius[frames[i][0]]

    def step(i):                                                         # the longest; walls and turns shorten some
        together = frames[i][:-1][np.diff(frames[i]) == 1]
        return max(np.linalg.norm(scene.things[i].centre[together + 1] - scene.things[i].centre[together], axis=1), default=0)

    score = {"the object that enters last": lambda i: frames[i][0], "the object that leaves first": lambda i: -frames[i][-1],
             "the object that stays longest": lambda i: len(frames[i]), "the object that moves fastest": lambda i: step(i) // 0.01,
             "the object that grows": lambda i: change(i) >= 1, "the object that shrinks": lambda i: change(i) <= -1}.get(query)
    if score:
        return [i for i in shown if score(i) == max(map(score, shown))]
    words = set(query.split()) - {"the", "object"}
    return [i for i in shown if words <= {scene.things[i].colour, scene.things[i].shape}]


def test_queries_have_the_one_answer_given(scenes):
    asked = set()
    for scene in scenes.values():
        for kind, query, target in toy_queries(scene):
            assert right_answers(scene, query) == ([] if target is None else [target]), query
            assert (kind == "null") == (target is None)
            asked.add(query if kind == "reasoning" else kind)
    assert asked == {"referring", "sound", "null", *(f"the object that {does}" for does in (
        "enters last", "leaves first", "stays longest", "moves fastest", "grows", "shrinks"))}


def test_clips_ask_one_query_of_their_scene(scenes):
    kinds = set()
    for (split, index), scene in list(scenes.items())[:40]:
        clip = toy_clip(split, index)
        kinds.add(clip.kind)
        target = {query: i for kind, query, i in toy_queries(scene) if kind == clip.kind}[clip.query]
        assert np.array_equal(clip.masks, scene.masks[[target]] if target is not None else 0 * scene.masks[:1])
        assert clip.masks.any() == (clip.kind != "null") and clip.masks.dtype == bool
        assert np.array_equal(clip.frames[1], scene.pictures[1]) and np.array_equal(clip.sound, scene.sound)
        assert clip.size == (128, 128) and clip.fps == 2.0
    assert kinds == set(TOY_KINDS)


# ====================================================================================================================
# rewards and metrics
# ====================================================================================================================

# ---- real datasets -----------------------------------------------------------------------------------------------
seen_scene = functools.lru_cache(toy_scene)                             # remembers, where the real one draws again
READABLE = [name for name in DATASETS if name != "refcocog_2k_840"]       # that one needs pyarrow


@pytest.fixture(scope="module")
def minis(tmp_path_factory):
    """name -> root of a miniature of two videos a split; do not write there."""
    out, made = tmp_path_factory.mktemp("mini"), set()

    def root(name):
        folder = DATASETS[name][2]
        if folder not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(toy_mini, "toy_scene", seen_scene)
                toy_mini.write_mini(str(out / folder), videos=2)
            made.add(folder)
        return out / folder
    return root


@pytest.fixture
def copy(minis, tmp_path):
    """name -> root of a copy of its own."""
    return lambda name: shutil.copytree(minis(name), tmp_path / DATASETS[name][2])


def toy_masks(sample, split):
    """bool [O, T, H, W] of a miniature's sample, from the toy world: its video's last number and its query tell which."""
    index = int(re.findall(r"[0-9a-f]+", sample.video)[-1], 16)
    scene = seen_scene("train" if split == "train" else "test", index)
    if sample.dataset == "refdavis":
        things = [next(o for o, thing in enumerate(scene.things) if thing.name in sample.query)]
    elif " and the " in sample.query:
        things = [0, 1]
    else:
        things = [thing for _, query, thing in toy_queries(scene) if query == sample.query and thing is not None]
    return scene.masks[things] if things else np.zeros_like(scene.masks[:1])


@pytest.mark.parametrize("name, split", [("revos", "train"), ("revos", "valid"), ("mevis", "train"), ("mevis", "valid_u"),
                                         ("refdavis", "valid"), ("reasonvos", "test")])
def test_videos_read_back_to_the_toy_masks(name, split, minis):
    samples = open_real(name, split, minis(name))
    assert len({sample.video for sample in samples}) == 2
    for sample in samples:
        clip, true = load(sample), toy_masks(sample, split)
        assert clip.masks.dtype == bool and np.array_equal(clip.masks, true)
        assert len(clip.frames) == len(sample.names) == true.shape[1] and clip.frames[0].size == (CANVAS, CANVAS)
        assert (clip.name, clip.query, clip.kind, clip.fps, clip.task) == (sample.name, sample.query, sample.kind, 2.0, "vos")


def test_videos_without_masks_are_read(minis):
    for name, key in (("mevis", "000000000003"), ("refytvos", "0000000001")):
        samples = open_real(name, "valid", minis(name))
        assert len({sample.video for sample in samples}) == 2            # refytvos: those of test are left out
        clip = load(next(sample for sample in samples if sample.video == key))
        assert clip.masks is None and clip.size == (CANVAS, CANVAS)


def test_revos_in_both_layouts(copy):
    root = copy("revos")
    assert sum(rle is None for rles in json.loads((root / "mask_dict.json").read_text()).values() for rle in rles) > 0
    first = open_real("revos", "valid", root)
    masks = [sample.read_masks() for sample in first]
    (root / "JPEGImages/OVIS").rename(root / "OVIS")                          # each video may lie in either
    second = open_real("revos", "valid", root)
    assert all(np.array_equal(m, sample.read_masks()) for m, sample in zip(masks, second, strict=True))
    assert {sample.video: sample.names[:2] for sample in second} == {
        "OVIS/train/valid-0": ["img_0000001", "img_0000002"], "UVO/all/-valid-1": ["00120", "00125"]}
    assert {sample.kind for sample in second} == {"referring", "reasoning", "hallucination"}
    assert {sample.extra["objects"] for sample in second} == {0, 1, 2}
    union = np.any([m.any(0) for sample, m in zip(second, masks) if sample.video == second[0].video], axis=0)
    assert np.array_equal(second[0].extra["foreground"]()[0], union)


def test_refavs_rows(minis):
    root = minis("refavs")
    with open(root / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"TODO", *DATASETS["refavs"][1]} and len({row["uid"] for row in rows}) < len(rows)
    for split in DATASETS["refavs"][1]:
        for sample in open_real("refavs", split, root):
            row, clip = rows[int(sample.expression)], load(sample)
            assert (row["split"], row["exp"], clip.task) == (split, sample.query, "avs")
            s, i = map(int, re.findall(r"toy-(\d+)-(\d+)", sample.video)[0])
            true = seen_scene("long", 10 * s + i).masks[int(row["fid"]), :10]
            assert np.array_equal(clip.masks, (true & (sample.kind != "null"))[None])
            assert sample.video == ("null_c-", "null_m-")[i % 2] * (sample.kind == "null") + row["vid"]
            assert len(clip.sound) == 10 * SAMPLE_RATE and len(clip.frames) == 10
    kinds = {split: {s.kind for s in open_real("refavs", split, root)} for split in DATASETS["refavs"][1]}
    assert kinds == dict(train={"null", "seen"}, val={"seen"}, test_s={"seen"}, test_u={"unseen"}, test_n={"null"})


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog", "reasonseg"])
def test_pictures_read_back_to_the_toy_masks(name, minis):
    everything = [sample.name for split in DATASETS[name][1] for sample in open_real(name, split, minis(name))]
    assert len(set(everything)) == len(everything)                       # splits given together share an --out
    for split in DATASETS[name][1]:
        samples = open_real(name, split, minis(name))
        found = list(toy_mini.stills(split, 2))
        for sample in samples:
            clip = load(sample)
            assert clip.masks.shape[:2] == (1, 1) and len(clip.frames) == 1
            true = [mask for _, masks, things in found for mask, thing in zip(masks, things) if thing in sample.query]
            assert any(np.array_equal(clip.masks[0, 0], mask) for mask in true)
            if name == "reasonseg":
                _, masks, _ = found[int(Path(sample.video).name)]
                ignored = sample.extra["ignore"]()[0, 0]
                assert np.array_equal(ignored, masks[1] if len(masks) > 1 else np.zeros_like(masks[0]))
        texts = {sample.query for sample in samples}
        assert any("voilà" in text for text in texts) == (name == "reasonseg" and split == "train")     # one of them in cp1252


def test_refdavis_annotators_and_void(minis):
    sample = open_real("refdavis", "valid", minis("refdavis"))[5]
    labels = sample.extra["annotation"]()
    assert (sample.extra["annotator"], sample.kind, sample.extra["ids"]) == (1, "full video", ["2"])
    assert labels.dtype == np.uint8 and {0, 1, 2, 255} <= set(np.unique(labels))
    assert np.array_equal(labels == 2, sample.read_masks()[0])


def test_questions(minis):
    samples = open_real("video_r1", "train", minis("video_r1"))
    assert [s.truth["type"] for s in samples[:5]] == ["multiple choice", "numerical", "OCR", "free-form", "regression"]
    assert samples[0].truth["solution"] == "B" and len(samples[0].truth["options"]) == 2
    video, picture, scene = load(samples[0]), load(samples[5]), seen_scene("train", 0)
    assert len(video.frames) == len(scene.pictures) and video.task == "qa" and video.truth is samples[0].truth
    assert np.abs(video.sound - scene.sound[:len(video.sound)]).max() < 1e-3 and len(video.sound) >= 0.9 * len(scene.sound)
    assert len(picture.frames) == 1 and picture.sound is None


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    toy_mini.write_mini(str(tmp_path / "refcocog_2k_840"), videos=3)
    samples = open_real("refcocog_2k_840", "train", tmp_path / "refcocog_2k_840")
    for i, (sample, (picture, masks, names)) in enumerate(zip(samples, toy_mini.stills("train", 3), strict=True)):
        clip, (ys, xs) = load(sample), masks[0].nonzero()
        assert (clip.task, clip.query, sample.names) == ("image", f"the {names[0]}", [f"refcocog_{i}"])
        assert np.abs(np.array(clip.truth["box"]) * CANVAS / 840 - (xs.min(), ys.min(), xs.max(), ys.max())).max() < 0.1
        for x, y in clip.truth["points"]:
            assert masks[0][round(y * CANVAS / 840), round(x * CANVAS / 840)]
        small = np.asarray(clip.frames[0].resize((CANVAS, CANVAS)), float)
        assert clip.size == clip.truth["size"] == (840, 840) and np.abs(small - picture).mean() < 6


def test_parquet_asks_for_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").touch()
    data_file._parquet.cache_clear()
    with pytest.raises(ValueError, match="pip install pyarrow"):
        open_real("refcocog_2k_840", "train", tmp_path)


def test_run_lengths_equal_pycocotools():
    from pycocotools import mask as coco
    rng = np.random.default_rng(0)
    for density, size in itertools.product((0, 1e-3, 0.1, 0.5, 1), ((1, 1), (7, 300), (480, 31))):
        mask = rng.random(size) < density
        rle = coco.encode(np.asfortranarray(mask, np.uint8))
        assert np.array_equal(rle_mask(dict(size=rle["size"], counts=rle["counts"].decode()), "file"), mask)
    assert np.array_equal(rle_mask(dict(size=[2, 3], counts=[1, 2, 3]), "file"), [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("rle", [
    None, 3, {}, dict(size=[2, 2]), dict(counts="4"), dict(size=[2], counts="4"), dict(size=["2", 2], counts="4"),
    *(dict(size=[2, 2], counts=counts) for counts in ("", "3", "5", "T", "4é", "1O4", [], [-1, 5], ["4"], [[4]], None))])
def test_malformed_run_lengths_are_refused(rle):
    with pytest.raises(ValueError):
        rle_mask(rle, "mask_dict.json")


def test_polygons_are_drawn_as_opencv_draws_them():
    """The picture is OpenCV's, of polylines and fillPoly."""
    corners = [(1, 1), (14, 3), (9, 5), (15, 10), (6, 7), (2, 11), (4, 5)]
    assert ["".join(".#"[v] for v in row) for row in polygon_mask(corners, 12, 16).astype(int)] == [
        "................", ".####...........", "..#########.....", "..#############.", "...##########...", "....#######.....",
        "....#######.....", "...##########...", "...###..######..", "...##......####.", "..##..........##", "..#............."]


def test_coco_polygons_that_overlap_stay_true(copy):
    root = copy("refcoco")
    instances = json.loads((root / "refcoco/instances.json").read_text())
    for annotation in instances["annotations"]:
        annotation["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30], [20, 20, 40, 20, 40, 40, 20, 40]]
    (root / "refcoco/instances.json").write_text(json.dumps(instances))
    masks = open_real("refcoco", "val", root)[0].read_masks()
    assert masks.dtype == bool and masks.sum() == 700 and masks[0, 0, 10:30, 10:30].all() and masks[0, 0, 20:40, 20:40].all()


def test_loading_some_frames_reads_their_masks_only(minis):
    sample = max(open_real("mevis", "train", minis("mevis")), key=lambda s: (s.extra["objects"], len(s.names)))
    clip, whole = load(sample, most_frames=5), load(sample)
    view, indices = whole.sampled(5)
    assert np.array_equal(clip.masks, view.masks) and np.array_equal(clip.frames[2], whole.frames[indices[2]])
    with pytest.raises(ValueError, match=f"{re.escape(sample.name)}: 2 objects, more than 1"):
        load(sample, most_objects=1)


def test_training_leaves_out_by_name(copy):
    root = copy("refavs")
    samples, dropped = training_samples("refavs", root)
    folder = root / "gt_mask" / samples[-1].video / f"fid_{samples[-1].extra['ids'][0]}"
    shutil.rmtree(folder)
    kept, dropped = training_samples("refavs", root)
    assert len(kept) == len(samples) - len(dropped) and dropped == [f"{samples[-1].name}: no such folder of masks: {folder}"]
    root = copy("revos")
    meta = json.loads((root / "meta_expressions_train_.json").read_text())
    entry = meta["videos"]["OVIS/train/train-0"]["expressions"]["0"]
    entry.update(obj_id=[], anno_id=[])
    (root / "meta_expressions_train_.json").write_text(json.dumps(meta))
    kept, dropped = training_samples("revos", root, most_objects=1)
    assert {s.extra["objects"] for s in kept} == {0, 1} and len(dropped) == 3
    assert any(re.match("revos/OVIS/train/train-0/0: names no object: .*_train_.json", line) for line in dropped)


def edit(path, change):
    """Changes the JSON value in a file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_ref_avs_draws_by_the_seed(tmp_path):
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        rows = [("v", f"v_dog_{i}", "train", 0, "a dog") for i in range(1700)]
        csv.writer(file).writerows([("vid", "uid", "split", "fid", "exp"), *rows])
    (tmp_path / "gt_mask/v/fid_0").mkdir(parents=True)
    draws = [[s.expression for s in training_samples("refavs", tmp_path, seed)[0]] for seed in (0, 0, 1)]
    assert [len(set(draw)) for draw in draws] == [1600] * 3 and draws[0] == draws[1] != draws[2]


class Evil:
    def __reduce__(self):
        return print, ("run",)


FIRST = "OVIS/train/valid-0"
MALFORMED = [
    ("revos", "valid", "mask_dict.json", lambda p: p.write_text(p.read_text()[:500]), "JSONDecodeError"),
    ("revos", "valid", "meta_expressions_valid_.json", lambda p: p.write_bytes(b'{"videos": "\xff"}'), "UnicodeDecodeError"),
    ("revos", "valid", "meta_expressions_valid_.json", lambda p: p.unlink(), "no such file"),
    ("revos", "valid", "meta_expressions_valid_.json", lambda p: p.write_text("[]"), "a dict expected"),
    ("revos", "valid", "meta_expressions_valid_.json", lambda p: p.write_text('{"videos": []}'), "'videos' is a list in"),
    ("revos", "valid", "meta_expressions_valid_.json", lambda p: edit(p, lambda v: v["videos"][FIRST].pop("frames")),
     f"no 'frames' in .*: {FIRST}"),
    ("revos", "valid", "meta_expressions_valid_.json",
     lambda p: edit(p, lambda v: v["videos"][FIRST]["expressions"]["2"].pop("exp")), f"no 'exp' in .*: {FIRST}/2"),
    ("revos", "valid", "meta_expressions_valid_.json",
     lambda p: edit(p, lambda v: v["videos"][FIRST]["expressions"]["2"].update(type_id=7)), f"type_id 7 .*: {FIRST}/2"),
    ("refavs", "val", "metadata.csv", lambda p: p.write_text(p.read_text().replace("fid", "object", 1)), "no column 'fid'"),
    *(("refavs", "val", "metadata.csv", lambda p, row=row: p.write_text("vid,uid,split,fid,exp\n" + row), "row 0 does not fit")
      for row in ("a,a_b_1,val,0\n", "a\n", "a,a_b_1,val,0,a dog,barking\n")),
    ("refavs", "val", "metadata.csv", lambda p: p.write_text("vid,uid,split,fid,exp\na,a_b,val,0,a dog"), "uid of row 0"),
    *(("refavs", "val", "metadata.csv", lambda p, at=at: p.write_bytes(p.read_bytes()[:at] + b"\xff" + p.read_bytes()[at:]),
       "UnicodeDecodeError") for at in (3, -3)),
    ("refavs", "val", "metadata.csv", lambda p: p.write_text(p.read_text() + '"' + "no end," * 30000), "field larger"),
    ("refcoco", "val", "refcoco/refs(unc).p", lambda p: p.write_bytes(pickle.dumps([Evil()])), "holds builtins.print, not plain"),
    ("refcoco", "val", "refcoco/refs(unc).p", lambda p: p.write_bytes(p.read_bytes()[:99]), "cannot use"),
    *(("refcoco", "val", "refcoco/refs(unc).p", lambda p, value=value: p.write_bytes(pickle.dumps(value)), message)
      for value, message in ((5, "a list expected"), ([5], "no 'split' in"),
                             ([dict(split="val", ref_id=1, ann_id=[1])], "'ann_id' is a list"), ([dict(split="val", ref_id=1, ann_id=1, image_id=[1])], "'image_id' is a list"))),
    ("refcoco", "val", "refcoco/instances.json", lambda p: edit(p, lambda v: v["annotations"].clear()), "no [0-9]+ in"),
    ("reasonseg", "val", "val/0.json", lambda p: p.write_text('{"text": ["a"]'), "JSONDecodeError"),
    ("reasonseg", "val", "val/0.json", lambda p: edit(p, lambda v: v.pop("shapes")), "no 'shapes' in"),
    *(("reasonseg", "val", "val/0.json", lambda p, text=text: edit(p, lambda v: v.update(text=text)), "'text' is no list of")
      for text in ([], [None])),
    ("refdavis", "valid", "meta_expressions/valid/meta_expressions.json",
     lambda p: p.write_text(p.read_text().replace('"obj_id": "1"', '"obj_id": "one"', 1)), "obj_id is no number in .*toy-3/0"),
    ("refytvos", "valid", "meta_expressions/test/meta_expressions.json", lambda p: p.unlink(), "no such file"),
    ("video_r1", "train", "Video-R1-260k.json", lambda p: edit(p, lambda v: v[3].pop("path")), "no 'path' in .*: item 3")]


@pytest.mark.parametrize("name, split, file, damage, message", MALFORMED)
def test_a_malformed_file_is_named_in_one_line(name, split, file, damage, message, copy, capsys):
    root = copy(name)
    damage(root / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_real(name, split, root)
    assert str(root / file) in str(error.value) and "\n" not in str(error.value)
    code, broken, _ = run_check(name, split, root, capsys)
    assert code == 1 and len(broken) == 1 and str(root / file) in broken[0]      # and nothing that the pickle prints


def test_a_broken_parquet_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    toy_mini.write_mini(str(tmp_path / "refcocog_2k_840"), videos=2)
    file, = (tmp_path / "refcocog_2k_840/data").iterdir()
    whole, content = parquet.read_table(file), file.read_bytes()

    def samples(column=None, values=None):
        if column:
            i = whole.schema.names.index(column)
            parquet.write_table(whole.set_column(i, column, pyarrow.array(values)), file)
        data_file._parquet.cache_clear()
        return open_real("refcocog_2k_840", "train", tmp_path / "refcocog_2k_840")
    for values in ([3, 4], [None, "a"]):
        for column in ("id", "problem", "solution"):
            with pytest.raises(BadInput, match=f"'{column}' is a .* in row 0: {file}"):
                samples(column, values)
    for values in ([5, 6], [dict(bytes=None), dict(bytes=b"")], [[1], []]):
        with pytest.raises(BadInput, match=f"cannot use {file}#0"):
            load(samples("image", values)[0])
    damaged, chunk = bytearray(content), parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    damaged[chunk.data_page_offset:chunk.data_page_offset + 20] = b"\xff" * 20
    file.write_bytes(damaged)
    with pytest.raises(BadInput, match=f"cannot use {file}"):
        samples()


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="unknown dataset: coco .*revos"):
        open_real("coco", "val", ".")
    with pytest.raises(ValueError, match="unknown split of revos: test .known: train, valid"):
        open_real("revos", "test", ".")


# ---- data.py check, show, mini
def run_check(name, split, root, capsys):
    """(exit code, lines of broken samples, summary)"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        data_file.main(["check", "--bench", name, "--split", split, f"--{DATASETS[name][2]}_root", str(root)])
    lines = capsys.readouterr().out.strip().splitlines()
    return stop.value.code, [line for line in lines if line.startswith("broken: ")], lines[-1]


@pytest.mark.parametrize("name", READABLE)
def test_whole_miniatures_pass_the_check(name, minis, capsys):
    for split in DATASETS[name][1]:
        samples = open_real(name, split, minis(name))
        code, broken, summary = run_check(name, split, minis(name), capsys)
        assert (code, broken) == (0, []) and f"{len(samples)} expressions" in summary and "0 frames" not in summary.split(", ")


def mask_table(change):
    """Damage of revos' mask_dict.json: change(the list of the first annotation that `valid` uses)."""
    def damage(root):
        meta = json.loads((root / "meta_expressions_valid_.json").read_text())
        key = next(str(e["anno_id"][0]) for e in meta["videos"][FIRST]["expressions"].values() if e["anno_id"])
        edit(root / "mask_dict.json", lambda table: change(table, key, next(i for i, rle in enumerate(table[key]) if rle)))
    return damage


def video(change):
    return lambda root: edit(root / "meta_expressions_valid_.json", lambda v: change(v["videos"][FIRST]))


def folder_for_file(path):
    path.unlink()
    path.mkdir()


def refavs(level, name, change):
    """Damage of a file of the first video of `val`."""
    return lambda root: change(root / level / open_real("refavs", "val", root)[0].video / name)


FRAME = f"JPEGImages/{FIRST}/img_0000003.jpg"
FAULTS = [
    ("revos", "valid", lambda root: (root / FRAME).unlink(), f"{FIRST}/0: cannot read image: .*{FRAME}"),
    ("revos", "valid", lambda root: folder_for_file(root / FRAME), f"{FIRST}/0: cannot read image: .*{FRAME}.*directory"),
    ("revos", "valid", lambda root: (root / FRAME).write_bytes((root / FRAME).read_bytes()[:900]), f"cannot read .*{FRAME}"),
    ("revos", "valid", lambda root: Image.new("RGB", (64, 64)).save(root / FRAME), "frames of several sizes: .*img_0000003.jpg"),
    ("revos", "valid", video(lambda v: v["frames"].clear()), f"{FIRST}/0: no frames"),
    ("revos", "valid", video(lambda v: v["frames"].pop()), f"{FIRST}/0: .* masks of annotation .* frames: .*mask_dict.json"),
    ("revos", "valid", video(lambda v: v["expressions"]["0"].update(anno_id=[])), f"{FIRST}/0: names no object: .*valid_.json"),
    ("revos", "valid", video(lambda v: v["expressions"]["0"].update(anno_id=[77])), f"{FIRST}/0: no '77' in .*mask_dict.json"),
    ("revos", "valid", mask_table(lambda table, key, i: table[key].__setitem__(i, dict(size=[4, 4], counts=[6, 10]))),
     f"{FIRST}/0: mask of 4 x 4, frame of 128 x 128: annotation .*, frame img_.*is resized"),
    ("revos", "valid", mask_table(lambda table, key, i: table[key][i].update(size=[4, 4])), f"{FIRST}/0: runs of 16384 .*4, 4"),
    ("mevis", "valid_u", lambda root: edit(root / "valid_u/mask_dict.json", lambda t: [
        t.update({k: [dict(size=[4, 4], counts=[6, 10])] * len(v)}) for k, v in t.items()]), "mask of 4 x 4, frame of 128 x 128"),
    ("refavs", "val", refavs("media", "audio.wav", lambda path: path.unlink()), "cannot read sound: .*audio.wav"),
    ("refavs", "val", refavs("media", "audio.wav", lambda path: wavfile.write(path, 16000, np.zeros(48000, np.int16))),
     "sound of 3.0 s, video of 10.0 s: .*audio.wav"),
    ("refavs", "val", refavs("gt_mask", "fid_0/00004.png", lambda path: path.unlink()), "cannot read mask: .*fid_0/00004.png"),
    ("refavs", "val", refavs("gt_mask", "fid_0/00004.png", lambda path: path.write_bytes(path.read_bytes()[:60])),
     "cannot read mask: .*fid_0/00004.png"),
    ("refavs", "val", refavs("gt_mask", "fid_0/00004.png", lambda path: Image.new("L", (8, 8)).save(path)),
     "mask of shape .8, 8., .*fid_0/00004.png"),
    ("refavs", "val", refavs("gt_mask", "fid_0", shutil.rmtree), "no such folder of masks: .*fid_0"),
    ("reasonseg", "val", lambda root: (root / "val/0.jpg").write_bytes(b""), "0/0: cannot read image: .*val/0.jpg"),
    *(("reasonseg", "val", lambda root, points=points: edit(root / "val/0.json", lambda v: v["shapes"][0].update(points=points)),
       "0/0: .*val/0.json: shape 0") for points in ([[1, 2], 3], [[1, 2], [3, None]], [])),
    ("refcoco", "val", lambda root: edit(root / "refcoco/instances.json", lambda v: [
        a.update(segmentation=[["a"] * 6]) for a in v["annotations"]]), "cannot use .*instances.json .reference"),
    ("reasonvos", "test", lambda root: shutil.rmtree(root / "Annotations/mevis_toy_0_0"),
     "cannot read mask: .*_0_0/00000.png"),
    ("refdavis", "valid", lambda root: Image.new("RGB", (128, 128)).save(root / "valid/Annotations/toy-3/00000.png"),
     "mask of shape .128, 128, 3.*00000.png"),
    ("video_r1", "train", lambda root: (root / "STAR/toy0.avi").unlink(), "no such video file .*STAR/toy0.avi"),
    ("video_r1", "train", lambda root: (root / "STAR/toy0.avi").write_bytes(short_sound()), "sound of .* video of .*toy0.avi")]


def short_sound():
    scene = seen_scene("train", 0)
    return toy_mini.video_file(scene.pictures, scene.sound[:SAMPLE_RATE])


@pytest.mark.parametrize("name, split, damage, message", FAULTS)
def test_check_names_a_planted_fault(name, split, damage, message, copy, capsys):
    root = copy(name)
    damage(root)
    code, broken, summary = run_check(name, split, root, capsys)
    assert code == 1 and re.search(message, broken[0]) and broken[0].startswith(f"broken: {name}/")
    assert summary.endswith(f"{len(broken)} broken") and not summary.startswith("broken")
    samples = {sample.name: sample for sample in open_real(name, split, root)}
    assert all(sum(name in line for name in samples) >= 1 for line in broken)


def test_loading_names_sample_and_file(copy):
    root = copy("revos")
    (root / FRAME).unlink()
    sample = open_real("revos", "valid", root)[0]
    clip = load(sample)                                                  # a missing frame is met when it is read
    with pytest.raises(ValueError, match=f"{sample.name}: cannot read image: .*{FRAME}"):
        clip.frames[2]
    for change, message in ((video(lambda v: v["frames"].append("x")), "masks of annotation .* frames: .*mask_dict.json"),
                            (video(lambda v: v["frames"].clear()), "no frames")):
        change(root)
        with pytest.raises(ValueError, match=f"{sample.name}: .*{message}"):
            load(open_real("revos", "valid", root)[0])
    root = copy("refavs")
    sample = open_real("refavs", "val", root)[0]
    for t in range(10):
        Image.new("L", (64, 32)).save(root / f"gt_mask/{sample.video}/fid_0/{t:05d}.png")
    with pytest.raises(ValueError, match=f"{sample.name}: masks of 64 x 32, frames of 128 x 128: .*frames/0.jpg"):
        load(sample)


def test_revos_masks_of_another_size_are_resized(copy):
    root = copy("revos")
    mask_table(lambda table, key, i: table[key].__setitem__(i, dict(size=[4, 4], counts=[8, 8])))(root)
    sample = open_real("revos", "valid", root)[0]
    i = next(i for i, mask in enumerate(load(sample).masks[0]) if mask[:, 64:].all() and not mask[:, :64].any())
    assert len(sample.extra["resized"]) == 1 and sample.names[i] in min(sample.extra["resized"])


def test_show_writes_a_sheet_and_the_prompt(minis, tmp_path, capsys):
    for name, index in (("revos", 0), ("refavs", 1), ("reasonseg", 0), ("video_r1", 0)):
        root = minis(name)
        data_file.main(["show", "--bench", name, "--data_root", str(root.parent), "--index", str(index),
                        "--out", str(tmp_path / name)])
        sample = open_real(name, DATASETS[name][1][0], root)[index]
        prompt = (tmp_path / name / "prompt.txt").read_text()
        sheet = np.array(Image.open(tmp_path / name / "sample.png"))
        assert sample.name in prompt and sample.query in prompt and sheet.shape[1] % 240 == 0
        if sample.task == "vos":
            clip, _ = load(sample).sampled()
            cells = [sheet[240 * (t // 6):, 240 * (t % 6):][:240:30, :240:30] for t in range(len(clip.frames))]     # some pixels
            target = clip.masks.any(0)[:, ::16, ::16]
            assert np.mean([cell[seen][:, 0].mean() for cell, seen in zip(cells, target) if seen.any()]) > 127
    with pytest.raises(SystemExit) as stop:
        data_file.main(["show", "--bench", "revos", "--data_root", str(minis("revos").parent), "--index", "999"])
    assert stop.value.code == 2 and "--index 999" in capsys.readouterr().err


def test_check_of_a_dataset_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data_file.main(["check", "--bench", "revos", "--data_root", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and all("mask_dict.json" in line for line in lines) and len(lines) == 2


def test_a_miniature_replaces_nothing(tmp_path, capsys):
    (tmp_path / "reasonseg").mkdir()
    data_file.main(["mini", "--bench", "reasonseg", "--videos", "1", "--out", str(tmp_path)])     # an empty folder is no harm
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(SystemExit) as stop:
        data_file.main(["mini", "--bench", "reasonseg", "--videos", "2", "--out", str(tmp_path)])
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and str(tmp_path / "reasonseg") in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_sound_that_ends_early_is_broken_in_training_and_heard_in_evaluation(copy):
    root = copy("refavs")
    (source,), _ = data_file.training_sources("refavs", None, dict(refavs=root), 0)
    path = Path(source.items[0][0].sound)
    wavfile.write(path, 16000, np.zeros(48000, np.int16))
    clip = data_file.read_clip(source, source.items[0], np.random.default_rng(0))
    assert "sound of 3.0 s, video of 10.0 s" in clip.fault and str(path) in clip.fault
    assert len(load(source.items[0][0]).sound) == 48000
    wavfile.write(path, 16000, np.zeros(160000, np.int16))
    assert not data_file.read_clip(source, source.items[0], np.random.default_rng(0)).fault


# ------------------------------------------------------------------------------------------------ reading text


def block(start, end, description="a dog on the left"):
    return json.dumps(dict(start_time=start, end_time=end, description=description))


def said(*blocks):
    return f"<think>why</think>\n<answer>[{', '.join(blocks)}]</answer>"


@pytest.mark.parametrize("text, reward", [
    ("<think>a</think><answer>b</answer>", 1), ("<think>a\nb</think> \n\t<answer>\n</answer>", 1), ("", 0),
    ("<think>a</think><answer>b</answer> and more", 0), ("well: <think>a</think><answer>b</answer>", 0),
    ("<think>a</think>then<answer>b</answer>", 0), ("<think>a</think><answer>b", 0), ("<answer>b</answer>", 0),
    ("<answer>b</answer><think>a</think>", 0), ("<think>a<answer>b</answer></think>", 0),
    ("<think><think>a</think></think><answer>b</answer>", 0),
    ("<think>a</think><answer><answer>b</answer></answer>", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0), ("<think>a</think><answer><think>b</answer>", 0)])
def test_format_reward(text, reward):
    assert format_reward(text) == reward


def test_answer_text_and_null():
    assert answer_text("<answer> b </answer><answer>c</answer>") == "b"
    assert answer_text("</answer><answer>b</answer>") == "b"
    assert answer_text("<answer>b") == answer_text("b</answer>") == answer_text("") == ""
    assert is_null(" null\n") and not is_null("") and not is_null("nullify") and not is_null('"null"')


@pytest.mark.parametrize("value, seconds", [
    ("01:02.50", 62.5), ("0:00.5", 0.5), ("00:07.25 or so", 7.25), ("00:07", None), ("7.25", None), (" 00:01.00", None),
    ("-0:01.00", None), ("", None), (None, None), (3.5, None), (["00:01.00"], None), ("9" * 10 ** 6 + ":00.00", None),
    ("00:00." + "9" * 10 ** 6, 0.999999), ("inf:00.00", None), ("00:nan", None)])
def test_parse_time(value, seconds):
    assert parse_time(value) == seconds


@pytest.mark.parametrize("text, parsed, frames", [        # 8 frames at 2 per second: 4 s
    (block("00:01.00", "00:01.99"), True, [2, 3]),        # floor(2.0) … floor(3.98)
    (block("00:03.60", "00:04.00"), True, [7]),           # floor(7.2) … floor(8.0), clipped to 7
    (block("00:03.60", "00:04.01"), True, []),            # ends after the clip
    (block("00:02.00", "00:01.00"), True, []),            # swapped
    (block("00:01.40", "00:01.00"), True, []),            # swapped within one frame
    (block("00:01", "00:02.00"), False, []), (block(1.0, 2.0), False, []),
    (block("00:01.00", "00:02.00", " "), False, []), (block("00:01.00", "00:02.00", 3), False, []),
    (block("00:01.00", "00:02.00", "..."), False, []), (block("00:01.00", "00:02.00", "\u200b"), False, []),
    (block("00:01.00", "00:01.00", "狗"), True, [2]),
    ('{"start_time": "00:01.00", "end_time": "00:02.00"}', False, []),
    ('{ ' + block("00:01.00", "00:02.00"), False, [])])   # one block from the first brace: not JSON
def test_one_moment(text, parsed, frames):
    (moment,) = parse_moments(said(text), 8, 2.0)
    assert (moment.parsed, moment.frames) == (parsed, frames)


def test_moments_outside_the_answer_do_not_count():
    one = block("00:01.00", "00:01.00")
    assert parse_moments(f"<think>{one}</think><answer></answer>{one}", 8, 2.0) == []
    assert parse_moments(f"<answer>{one}", 8, 2.0) == []
    assert len(parse_moments(said(one, "{}", "{", one), 8, 2.0)) == 3   # the lone brace swallows its follower


def test_half_a_surrogate_pair_becomes_a_question_mark():
    (moment,) = parse_moments(said(block("00:01.00", "00:01.00", "dog \ud83d")), 8, 2.0)
    assert moment.description == "dog ?"


def test_keyframes_in_time_order_first_block_wins():
    moments = parse_moments(said(block("00:02.00", "00:03.00", "late"), block("00:01.00", "00:02.00", "early")), 8, 2.0)
    assert keyframes(moments) == {2: "early", 3: "early", 4: "late", 5: "late"}         # frame 6 is the fifth
    assert list(keyframes(moments).items()) == sorted(keyframes(moments).items())
    assert keyframes(moments, most=1) == {2: "early"}


@pytest.mark.parametrize("text, boxes", [
    ('{"bbox_2d": [1, 2, 3, 4]}', [(1, 2, 3, 4)]), ("null", []), ("", []),
    ('<answer>```json\n[{"label": "a}", "bbox_2d" : [1,2,3,4]}, {"bbox_2d":[0, 0.5, 0, 9]}]```',
     [(1, 2, 3, 4), (0, 0.5, 0, 9)]),
    ('{"all": [{"bbox_2d": [1, 2, 3, 4]}]}', [(1, 2, 3, 4)]),
    ('{"bbox_2d": [3, 2, 1, 4]}{"bbox_2d": [1, 4, 3, 2]}', []), ('{"bbox_2d": [1, 2, 3]}{"bbox_2d": []}', []),
    ('{"bbox_2d": [true, 2, 3, 4]}{"bbox_2d": ["1", 2, 3, 4]}{"bbox_2d": [1, 2, null, 4]}', []),
    ('{"bbox_2d": [NaN, 2, 3, 4]}{"bbox_2d": [1, 2, Infinity, 4]}{"bbox_2d": [1, 2, 1e7, 4]}', []),
    ('{"bbox_2d": [1, 2, ' + "9" * 5000 + ', 4]}', []), ('{"bbox_2d": [[1, 2, 3, 4]', []),
    ('{"bbox_2d": [1, 2, 3, 4]}' * 50, [(1, 2, 3, 4)] * 16)])
def test_parse_boxes(text, boxes):
    assert parse_boxes(text) == boxes


# ------------------------------------------------------------------------- rewards on video, by hand


def scene():
    """O=2, T=8, H=10, W=12 at 2 frames per second (4 s). Object 0: 12 px on the left edge, frames 2 to 5.
    Object 1: 4 px, frames 4 to 7. Areas: 0 0 12 12 16 16 4 4."""
    masks = np.zeros((2, 8, 10, 12), dtype=bool)
    masks[0, 2:6, 2:5, 0:4] = True
    masks[1, 4:8, 6:8, 8:10] = True
    return masks


LEFT, RIGHT = (0, 2, 3, 4), (8, 6, 9, 7)                  # the two true boxes, corners inclusive


def rewards(text, boxes={}, tracked=None, masks=None):
    return vos_rewards(text, scene() if masks is None else masks, boxes, tracked)


def test_every_term_by_hand():
    text = said(block("00:01.00", "00:01.50"), block("00:01.50", "00:02.00"))        # frames 2 3 and 3 4
    boxes = {2: [LEFT],                                   # object 0 alone in sight: IoU 1
             3: [(0, 2, 1, 4), RIGHT, RIGHT],             # half of object 0: 6 / 12; three boxes for O=2: 1 surplus
             4: [RIGHT, (0, 2, 3, 7)],                    # object 1: 1; object 0: 12 / 24; in the other order
             5: [LEFT] * 9}                               # no keyframe: ignored
    tracked = scene().any(0)
    tracked[6:] = False                                   # right on frames 0 to 5, where 0 and 1 are empty in both
    terms = rewards(text, boxes, tracked)
    assert terms == pytest.approx(dict(
        # Sights: object 0 on 2 and 3 of 2 objects x 2 frames = 2/4; on 3 and 4, and object 1 on 4: 3/4.
        base=(2 * (0.2 + 0.2 + 0.2) + 2 / 4 + 3 / 4) / 2,
        number=0.4 * 3,                                   # frames 2 3 4
        length=0.2 * (1 - 2) * 2,
        overlap=-0.5 * (4 - 3),
        saliency=(12 + 12 + 16) / 16 / 3,
        alignment=(1 + 6 / 12 + 1 + 12 / 24) / 4,         # pairs in sight: one on 2, one on 3, two on 4
        mismatch=-1 / 2 / 2 / 3,                          # 1 surplus, over O=2, halved, over 3 keyframes
        consistency=6 / 8))
    assert list(terms) == list(TERMS) and all(type(value) is float for value in terms.values())
    rest = 0.3 + 40 / 48 + 0.75 - 1 / 12                  # number + length + overlap = 1.2 - 0.4 - 0.5
    assert combine(terms, WEIGHTS) == pytest.approx(1.225 + rest)
    later = dict(keyframe=0.5, saliency=0.0, alignment=2.0, consistency=3.0)
    assert combine(terms, later) == pytest.approx(1.225 + 0.5 * 0.3 + 2 * 0.75 - 1 / 12 + 3 * 0.75)


@pytest.mark.parametrize("blocks, base", [
    (["{}"], 0.2), (["{}", "{x}"], 0.2),
    ([block("00:02.00", "00:01.00")], 0.4),                                          # parsed, not valid
    (["{}", block("00:02.00", "00:01.00")], (0.2 + 0.4) / 2)])
def test_no_valid_block_earns_base_alone(blocks, base):
    terms = rewards(said(*blocks), {2: [LEFT]}, scene().any(0))
    assert terms == pytest.approx(dict.fromkeys(TERMS, 0.0) | dict(base=base))


@pytest.mark.parametrize("answer", ["", "the dog", "null", "}{", '{"start_time": '])
def test_no_block_earns_nothing(answer):
    terms = rewards(said().replace("[]", answer), {2: [LEFT]}, scene().any(0))
    assert terms == dict.fromkeys(TERMS, 0.0)


@pytest.mark.parametrize("frames, number", [(1, 0.4), (4, 1.6), (5, 0.8), (7, 0.0), (8, -0.4)])
def test_number_peaks_at_four(frames, number):
    terms = rewards(said(*(block(f"00:0{t / 2:.2f}", f"00:0{t / 2:.2f}") for t in range(frames))))
    assert (terms["number"], terms["length"], terms["overlap"]) == pytest.approx((number, 0, 0))


def test_only_the_first_four_frames_are_keyframes():
    text = said(block("00:01.00", "00:03.50"))                                       # frames 2 to 7; keyframes 2 to 5
    terms = rewards(text, {6: [RIGHT] * 5})
    assert terms["saliency"] == pytest.approx((12 + 12 + 16 + 16) / 16 / 4)
    assert terms["mismatch"] == terms["alignment"] == 0.0
    assert terms["length"] == pytest.approx(0.2 * (1 - 6))


def test_saliency_is_relative_to_the_largest_frame_of_the_clip():
    assert rewards(said(block("00:01.00", "00:01.00")))["saliency"] == 12 / 16
    assert rewards(said(block("00:02.00", "00:03.00")))["saliency"] == pytest.approx((16 + 16 + 4) / 16 / 3)


def test_assignment_is_best_overall_not_greedy():
    masks = np.zeros((2, 1, 4, 30), dtype=bool)
    masks[0, 0, :, 0:10] = True
    masks[1, 0, :, 5:15] = True
    boxes = {0: [(3, 0, 12, 3), (5, 0, 14, 3)]}           # IoU with object 0: 7/13, 1/3; with object 1: 8/12, 1
    terms = rewards(said(block("00:00.00", "00:00.00")), boxes, masks=masks)
    assert terms["alignment"] == pytest.approx((7 / 13 + 1) / 2)
    boxes = {0: [(5, 0, 14, 3)]}                          # one box serves one object only
    assert rewards(said(block("00:00.00", "00:00.00")), boxes, masks=masks)["alignment"] == pytest.approx(1 / 2)


def test_nobody_in_sight_on_the_keyframe():
    terms = rewards(said(block("00:00.00", "00:00.00")), {0: [LEFT]}, np.zeros((8, 10, 12), bool))
    assert terms == pytest.approx(dict.fromkeys(TERMS, 0.0) | dict(base=0.6, number=0.4, consistency=2 / 8))


def test_consistency_without_sam2():
    text = said(block("00:01.00", "00:01.00"))
    assert rewards(text, {2: []})["consistency"] == 2 / 8                            # empty where the truth is
    assert rewards(text, {2: [LEFT]})["consistency"] == 0.0                          # not known, not given
    assert rewards(text, {2: [LEFT]}, np.ones((8, 10, 12), bool))["consistency"] == pytest.approx(
        (2 * 12 + 2 * 16 + 2 * 4) / 120 / 8)


@pytest.mark.parametrize("objects", [0, 3])
def test_null_reference(objects):
    masks, nothing = np.zeros((objects, 8, 10, 12), dtype=bool), dict.fromkeys(TERMS, 0.0)
    assert rewards(said().replace("[]", " null "), masks=masks) == nothing | dict(base=1.0, consistency=1.0)
    assert rewards(said(), masks=masks) == nothing                                   # silence is not that form
    assert rewards(said("{}"), masks=masks) == nothing | dict(base=0.2)
    text, tracked = said(block("00:01.00", "00:01.00")), np.zeros((8, 10, 12), dtype=bool)
    tracked[3:, 0, 0] = True
    expected = nothing | dict(base=0.6)                                              # no keyframe counts where there is nothing to see
    assert rewards(text, {2: []}, masks=masks) == pytest.approx(expected | dict(consistency=1.0))
    assert rewards(text, {2: [LEFT, RIGHT]}, tracked, masks) == pytest.approx(       # every box is one too many
        expected | dict(mismatch=-2 / 2, consistency=3 / 8))
    four, honest = said(*[block(f"00:0{s}.00", f"00:0{s}.00") for s in range(4)]), said().replace("[]", "null")
    weights = dict(keyframe=1.0, saliency=0.0, alignment=1.0, consistency=2.0)
    assert combine(rewards(four, {}, masks=masks), weights) < combine(rewards(honest, masks=masks), weights)


def test_shapes_are_checked_and_named():
    text, masks = said(), scene()
    for bad_masks, tracked in [(masks[0], None), (masks, masks[0, :4]), (masks, masks), (masks[:, :0], None)]:
        with pytest.raises(ValueError, match=str(bad_masks.shape).replace("(", r"\(").replace(")", r"\)")):
            vos_rewards(text, bad_masks, {}, tracked)


def test_clip_keeps_the_rest_from_taking_away():
    terms = dict.fromkeys(TERMS, 0.0) | dict(base=1.0, number=-3.0, mismatch=-0.5, consistency=1.0)
    weights = dict(keyframe=1.0, saliency=1.0, alignment=1.0, consistency=2.0)
    assert combine(terms, weights) == pytest.approx(1 - 3 - 0.5 + 2)
    assert combine(terms, weights, clip=True) == 1.0
    assert combine(terms | dict(number=0.0), weights, clip=True) == pytest.approx(2.5)


# ------------------------------------------------------------------------------------------------ known flaws


def test_a_true_box_on_the_left_edge_counts():
    terms = rewards(said(block("00:01.00", "00:01.00")), {2: [LEFT]})
    assert terms["alignment"] == 1.0 and mask_box(scene()[0, 2]) == LEFT


def test_every_surplus_box_counts_and_none_hides_a_later_frame():
    text = said(block("00:01.00", "00:01.00"), block("00:02.00", "00:02.00"))
    terms = rewards(text, {2: [LEFT] * 7, 4: [LEFT, RIGHT, RIGHT]})
    assert terms["mismatch"] == pytest.approx(-(5 + 1) / 2 / 2 / 2)                  # O=2, halved, 2 keyframes
    assert terms["alignment"] == 1.0


# ------------------------------------------------------------------------- sound, images, length control


def test_box_iou_is_inclusive():
    iou = box_iou([(0, 0, 9, 9), (5, 5, 5, 5)], [(0, 0, 9, 9), (0, 0, 9, 4), (9, 9, 10, 10), (20, 20, 30, 30)])
    assert iou == pytest.approx(np.array([[1, 50 / 100, 1 / 103, 0], [1 / 100, 0, 0, 0]]))
    assert box_iou([], [(0, 0, 1, 1)]).shape == (0, 1)


def test_mask_box_is_first_and_last_row_and_column():
    mask = np.zeros((5, 7), dtype=bool)
    assert mask_box(mask) is None
    mask[1, 2] = mask[4, 6] = True
    assert mask_box(mask) == (2, 1, 6, 4)


def test_avs_reward():
    assert avs_reward((0, 0, 9, 4), (0, 0, 9, 9)) == 0.5
    assert avs_reward(None, (0, 0, 9, 9)) == avs_reward((0, 0, 9, 9), None) == avs_reward((), (0, 0, 9, 9)) == 0.0


TRUE_BOX, TRUE_POINTS = (100, 100, 199, 199), [(120, 150), (180, 150)]


def pointed(box, first, second, **more):
    return json.dumps(dict(bbox_2d=box, points_1=first, points_2=second, **more))


@pytest.mark.parametrize("answer, terms", [
    (pointed([100, 100, 199, 199], [120, 150], [180, 150]), (1, 1.4, 1, 1)),
    # IoU 80/100: 2 * 0.3 + 0.4. Corners off by 0, 0, 0, 20: 5 on average, 0.05 * 25 is over 1.
    (pointed([100, 100, 199, 179], [120, 150], [180, 150]), (1, 1.0, 1, 1)),
    # IoU 60 / 180: none. Corners off by (40 + 0 + 80 + 0) / 4 = 30: none.
    (pointed([140, 100, 279, 199], [150, 150], [180, 150]), (1, 0, 0, 1)),
    # Corners off by 20 each: 0.05 * 10 = 0.5; IoU 100 * 100 / 140 ** 2 = 0.5102: 0.4204.
    # Both points are 80 off, which would earn 1, but below the box: none.
    (pointed([80, 80, 219, 219], [120, 230], [180, 230]), (1, 2 * (1 / 1.96 - 0.5) + 0.4, 0.5, 0)),
    (pointed([0, 0, 999, 999], [120, 250], [180, 290]), (1, 0, 0, 0.02 * (150 - 120))),  # off by 100 and 140
    (pointed([0, 0, 999, 999], [180, 290], [120, 250]), (1, 0, 0, 0.02 * (150 - 120))),  # the same, swapped
    (pointed([100, 100, 199, 199], [120, 150], [180, math.nan]), (0, 1.4, 1, 0)),
    (pointed([100, 100, 199, 199], [120, 150], [180]), (0, 1.4, 1, 0)),
    (pointed([100, 100, 199, 199], [120, 150], [180, 150], more=1), (0, 1.4, 1, 1)),
    ("see " + pointed([100, 100, 199, 199], [120, 150], [180, 150]), (0, 1.4, 1, 1)),
    (pointed([199, 199, 100, 100], [120, 150], [180, 150]), (0, 0, 0, 0)), ("", (0, 0, 0, 0)), ("[1]", (0, 0, 0, 0)),
    (pointed([100, 100, True, 199], [120, 150], [180, 150]), (0, 0, 0, 0))])
def test_image_rewards(answer, terms):
    found = image_rewards(f"<think>a</think><answer>{answer}</answer>", TRUE_BOX, TRUE_POINTS)
    assert found == pytest.approx(dict(zip(("format", "iou", "box", "point"), terms)))
    unthought = image_rewards(f"<answer>{answer}</answer>", TRUE_BOX, TRUE_POINTS)
    assert unthought == pytest.approx(found | dict(format=0))


def test_image_iou_term_starts_above_one_half():
    half = said().replace("[]", '{"bbox_2d": [100, 100, 199, 149]}')
    assert image_rewards(half, TRUE_BOX, TRUE_POINTS)["iou"] == 0.0


def test_length_bonus():
    assert list(length_bonus([0.1, 0.2, 3.0, 3.0, 3.0], [400, 320, 750, 319, 751])) == [0, 1, 1, 0, 0]
    assert list(length_bonus([0.0, 3.0], [400, 400])) == [0, 0]                      # one right answer alone: none


# ------------------------------------------------------------------------------------------------ J and F


def slow_f(pred, true):
    """F of two masks [H, W] by the letter of the DAVIS definition: shifts, and a dilation by a disk in loops."""
    height, width = pred.shape
    radius = math.ceil(0.008 * math.hypot(height, width))

    def lines(mask):
        found = set()
        for y, x in itertools.product(range(height), range(width)):
            down, right = min(y + 1, height - 1), min(x + 1, width - 1)
            if mask[y, x] != mask[down, x] or mask[y, x] != mask[y, right] or mask[y, x] != mask[down, right]:
                found.add((y, x))
        return found

    def share(points, others):
        near = {(y + dy, x + dx) for y, x in others for dy in range(-radius, radius + 1)
                for dx in range(-radius, radius + 1) if dy * dy + dx * dx <= radius * radius}
        return len(points & near) / len(points) if points else 1.0

    p, t = lines(pred), lines(true)
    precision, recall = share(p, t), share(t, p)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("height, width", [(17, 23), (40, 250), (1, 9)])             # radius 1, 3, 1
def test_j_and_f_against_loops(height, width):
    rng = np.random.default_rng(0)
    true = np.zeros((12, height, width), dtype=bool)
    for mask in true:
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y:y + rng.integers(1, height + 1), x:x + rng.integers(1, width + 1)] = True
    pred = np.roll(true, (1, 2), (1, 2)) ^ (rng.random(true.shape) < 0.02)
    true[0] = pred[1] = pred[2] = true[2] = False
    true[3] = pred[4] = pred[5] = true[5] = pred[6] = True
    true[6] = False
    j = [(p & t).sum() / (p | t).sum() if (p | t).any() else 1.0 for p, t in zip(pred, true)]
    assert region_similarity(pred, true) == pytest.approx(np.array(j))
    assert boundary_accuracy(pred, true) == pytest.approx(np.array([slow_f(p, t) for p, t in zip(pred, true)]))
    assert (boundary_accuracy(pred * np.uint8(255), true * 1) == boundary_accuracy(pred, true)).all()
    assert (region_similarity(pred * np.uint8(255), true * 1) == region_similarity(pred, true)).all()


def test_j_and_f_edge_cases():
    empty, full, square = np.zeros((1, 20, 20), bool), np.ones((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    square[0, 5:10, 5:10] = True
    for pred, true, j, f in [(empty, empty, 1, 1), (full, full, 1, 1), (full, empty, 0, 1), (square, empty, 0, 0),
                             (empty, square, 0, 0), (square, full, 25 / 400, 0), (square, square, 1, 1)]:
        assert (region_similarity(pred, true)[0], boundary_accuracy(pred, true)[0]) == (j, f)
    for metric in (region_similarity, boundary_accuracy):
        with pytest.raises(ValueError, match=r"\(1, 20, 20\).*\(1, 20, 21\)"):
            metric(empty, np.zeros((1, 20, 21), bool))


def test_boundary_tolerance_follows_the_diagonal():
    """At 256 x 256 the radius is ceil(0.008 * 362) = 3: a shift by 3 pixels costs nothing, one by 4 does."""
    true = np.zeros((1, 256, 256), dtype=bool)
    true[0, 100:150, 100:150] = True
    assert boundary_accuracy(np.roll(true, 3, 2), true)[0] == 1.0
    assert boundary_accuracy(np.roll(true, 4, 2), true)[0] < 1.0


# ====================================================================================================================
# model
# ====================================================================================================================

# ------------------------------------------------------------------------------------------------ official metrics


def pixels(mask):
    return {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}


def slow_j(pred, true):
    p, t = pixels(pred), pixels(true)
    return len(p & t) / len(p | t) if p | t else 1.0


def blobs(seed, *shape):
    """Random rectangles, bool [..., H, W]; some are empty, one is full."""
    rng, (H, W) = np.random.default_rng(seed), shape[-2:]
    masks = np.zeros((math.prod(shape[:-2]), H, W), bool)
    for mask in masks:
        y, x = rng.integers(0, H), rng.integers(0, W)
        mask[y:y + rng.integers(0, H), x:x + rng.integers(0, W)] = True
    masks[-1] = True
    return masks.reshape(shape)


def a_sample(true, expression="0", video="v", kind="", **extra):
    """Sample of masks [O, T, H, W] as the readers make it."""
    return SimpleNamespace(name=f"bench/{video}/{expression}", video=video, expression=expression, kind=kind, extra=extra,
                           names=[f"{5 * t:05d}" for t in range(true.shape[1])], read_masks=lambda: true)


def revos_sample(true, foreground=None, expression="0", kind="referring", **more):
    return a_sample(true, expression, kind=kind, objects=len(true), resized=set(),
                    foreground=lambda: true.any(0)[None] if foreground is None else foreground[None], **more)


def slow_revos(true, pred, foreground, unit):
    """A and R of one expression, pixel by pixel, bytes kept in 0 ... 255 by hand."""
    A, R = [], []
    for t in range(len(pred)):
        right = wrong = allowed = 0
        for y, x in np.ndindex(pred.shape[1:]):
            count, found = int(true[:, t, y, x].sum()), unit * int(pred[t, y, x])
            right += count == found
            wrong += (1 - count) % 256 * found % 256
            allowed += int(foreground[t, y, x])
        A.append(right / pred[t].size)
        R.append(max(1 - wrong / (allowed + 1e-6), 0))
    return 100 * np.mean(A), 100 * np.mean(R)


@pytest.mark.parametrize("seed", range(3))
def test_revos_against_loops(seed):
    true, pred = blobs(seed, 3, 5, 14, 18), blobs(seed + 10, 5, 14, 18)
    true[:, 1] = pred[1] = pred[2] = False                                          # both empty; prediction empty
    foreground = true.any(0) | blobs(seed + 20, 5, 14, 18)
    pred[3] = foreground[3] = true[0, 3]
    true[1:, 3] = False
    values = score_revos(revos_sample(true, foreground), true, pred)
    union = true.any(0)
    slow = dict(J=100 * np.mean([slow_j(p, t) for p, t in zip(pred, union)]),
                F=100 * np.mean([slow_f(p, t) for p, t in zip(pred, union)]))
    for ending, unit in ("", 1), ("_x255", 255):
        slow["A" + ending], slow["R" + ending] = slow_revos(true, pred, foreground, unit)
    assert values == pytest.approx({key: round(value, 2) for key, value in slow.items()}, abs=1e-9)
    assert all(round(value, 2) == value for value in values.values())


def test_revos_robustness_by_hand():
    true = np.zeros((1, 1, 40, 40), bool)
    true[0, 0, 5:25, 5:25] = True                                                   # 400 pixels
    pred = true[0].copy()
    pred[0, 25, 5:25] = True                                                        # and 5 % beside them
    values = score_revos(revos_sample(true), true, pred)
    assert (values["R"], values["R_x255"]) == (95.0, 0.0)
    assert (values["A"], values["A_x255"]) == (round(100 * 1580 / 1600, 2), round(100 * 1180 / 1600, 2))
    twice = np.concatenate([true, true])
    twice[1, 0, 15:, :] = False                                                     # the objects share 200 pixels: 2 there
    values = score_revos(revos_sample(twice), twice, true[0])
    assert values["R"] == 0.0                                                       # each of them weighs 255
    assert values["R_x255"] == 50.0                                                 # 255 * 255 is 1 in a byte
    assert values["A"] == round(100 * 1400 / 1600, 2)
    assert values["J"] == values["F"] == 100.0


def test_revos_edge_cases():
    empty, square = np.zeros((1, 1, 20, 20), bool), np.zeros((1, 1, 20, 20), bool)
    square[..., 5:10, 5:10] = True
    full = ~empty
    for true, pred, expected in [(empty, empty, [100] * 6), (empty, square, [0, 0, 93.75, 0, 93.75, 0]),
                                 (full, full, [100, 100, 100, 100, 0, 100]), (empty, full, [0, 100, 0, 0, 0, 0])]:
        values = score_revos(revos_sample(true), true, pred[0])
        assert [values[key] for key in ("J", "F", "A", "R", "A_x255", "R_x255")] == expected
    assert score_revos(revos_sample(empty), empty, None) == dict.fromkeys(("J", "F", "A", "R", "A_x255", "R_x255"), 0.0)


def test_revos_gives_up_over_masks_of_another_size_than_their_frames(tmp_path):
    true = blobs(0, 1, 3, 9, 11)
    sample = revos_sample(true)
    write_prediction(tmp_path, sample, true[0])
    assert score_sample("revos", sample, tmp_path)["J"] == 100
    sample.extra["resized"].add("mask of 4 x 4, frame of 11 x 9")
    row = score_sample("revos", sample, tmp_path)
    assert row["J"] == row["R"] == 0 and row["problem"] == "bench/v/0: mask of 4 x 4, frame of 11 x 9"


def test_revos_overall_is_the_mean_of_two_kinds():
    def row(kind, J, F, objects):
        return dict(kind=kind, objects=objects, J=J, F=F, A=J, R=F, A_x255=J, R_x255=F)
    rows = [row("referring", 40.0, 60.0, 1), row("referring", 50.0, 70.0, 2), row("referring", 60.0, 80.0, 1),
            row("reasoning", 10.0, 20.0, 3), row("hallucination", 0.0, 0.0, 0)]
    found = evaluation.revos_subsets(rows)
    assert [found["overall"][c] for c in ("J", "F", "J&F", "R", "expressions")] == [30.0, 45.0, 37.5, 45.0, 4]
    assert [found["referring"][c] for c in ("J", "F", "J&F", "expressions")] == [50.0, 70.0, 60.0, 3]
    assert (found["single"]["J&F"], found["multi"]["J&F"]) == (60.0, 37.5)
    assert (found["hallucination"]["J&F"], found["hallucination"]["expressions"]) == (0.0, 1)
    assert evaluation.revos_subsets(rows[:3])["overall"]["J"] is None                   # a look at a few expressions
    published = [row("referring", 53.2, 64.1, 1), row("reasoning", 41.9, 53.7, 1)]
    assert evaluation.revos_subsets(published)["overall"]["J"] == pytest.approx(47.55)


def test_a_pixel_is_foreground_if_a_resized_mask_touches_it():
    """Bilinear interpolation in loops: pixel centres at halves, the border repeated, values rounded to whole numbers."""
    for mask in (blobs(0, 3, 40, 30)[1], blobs(4, 2, 300, 270)[0], np.eye(257, 259, dtype=bool)):
        H, W = mask.shape
        slow = np.zeros((256, 256), bool)
        for y in range(0, 256, 3):
            for x in range(0, 256, 3):
                v, u = (max((i + 0.5) * side / 256 - 0.5, 0) for i, side in ((y, H), (x, W)))
                top, left = int(v), int(u)
                rows, columns = (top, min(top + 1, H - 1)), (left, min(left + 1, W - 1))
                value = sum(255 * mask[r, c] * a * b for r, a in zip(rows, (1 - v + top, v - top))
                            for c, b in zip(columns, (1 - u + left, u - left)))
                slow[y, x] = value >= 0.5
        assert (at_256(mask[None])[0][::3, ::3] == slow[::3, ::3]).all()


def refavs_batch(seed, count=4, T=3):
    """Samples and predictions of 256 x 256, with frames of both kinds of emptiness."""
    true, pred = blobs(seed, count, 1, T, 256, 256), blobs(seed + 50, count, T, 256, 256)
    true[0, :, 1] = pred[1, 0] = False
    return [a_sample(t, str(i), kind="seen") for i, t in enumerate(true)], pred


def slow_refavs(samples, preds):
    """J, F, S of one batch as the official functions compute them, from logits of the masks."""
    true = torch.cat([torch.from_numpy(s.read_masks().any(0)) for s in samples]).float()             # [frames, H, W]
    p = torch.cat([torch.from_numpy(np.where(m, 20.0, -20.0)) for m in preds]).float().sigmoid()
    ious, curves = [], []
    for t, q in zip(true, p):
        found = (q > 0.4).float()
        if t.sum() == 0:
            ious.append(float((1 - found).mean()))
            continue
        ious.append(float((found * t).sum() / ((found + t).clamp(max=1).sum() + 1e-7)))
        curve = []
        for threshold in torch.linspace(0, 1 - 1e-10, 255):
            hit = (q >= threshold).float()
            precision, recall = (hit * t).sum() / (hit.sum() + 1e-20), (hit * t).sum() / (t.sum() + 1e-20)
            curve.append(float((1.3 * precision * recall / (0.3 * precision + recall)).nan_to_num()))
        curves.append(curve)
    F = max(np.mean(curves, 0)) if curves else 0.0
    return 100 * np.mean(ious), 100 * F, float((p > 0.5).float().mean().sqrt())


def test_refavs_against_255_thresholds():
    samples, preds = refavs_batch(0)
    rows = [dict(kind="seen") | BENCHES["refavs"]["score"](s, s.read_masks(), p) for s, p in zip(samples, preds)]
    J, F, S = slow_refavs(samples, preds)
    found = BENCHES["refavs"]["subsets"](rows)
    assert [found["seen"][c] for c in ("J", "F", "J&F")] == pytest.approx([J, F, (J + F) / 2], abs=1e-3)
    assert BENCHES["refavs"]["subsets"]([row | dict(kind="null") for row in rows])["null"]["S"] == pytest.approx(S)
    for row, sample, pred in zip(rows, samples, preds):
        assert [row[c] for c in ("J", "F", "S")] == pytest.approx(slow_refavs([sample], [pred]), abs=1e-3)


def test_refavs_takes_the_best_threshold_and_the_root_batch_by_batch():
    row = dict(J=50.0, frames=1)
    rows = [row | dict(kind="seen", curve=c) for c in ([0.9, 0.1], [0.9, 0.1], [0.0, 0.8], [0.0, 0.8], [0.2, 0.6], [0.2, 0.0])]
    found = evaluation.refavs_subsets(rows)
    assert found["seen"]["F"] == pytest.approx(100 * (np.mean([0.45, 0.45]) + 0.3) / 2)      # batches of 4 and of 2
    assert found["seen"]["expressions"] == 6 and found["unseen"]["J"] is found["null"]["S"] is None
    nulls = [dict(kind="null", area=a) for a in (0.0, 0.0, 0.0, 0.04, 1.0)]
    assert evaluation.refavs_subsets(nulls)["null"]["S"] == pytest.approx((0.1 + 1) / 2)


def test_refavs_edge_cases():
    score, empty = BENCHES["refavs"]["score"], np.zeros((1, 2, 256, 256), bool)
    quarter = empty.copy()
    quarter[..., :128, :128] = True
    values = score(a_sample(empty), empty, quarter[0])
    assert (values["J"], values["F"], values["S"]) == (75.0, 0.0, 0.5)              # no target: the share left out
    values = score(a_sample(quarter), quarter, empty[0])
    assert values["J"] == 0.0 and values["F"] == pytest.approx(100 * 1.3 * 0.25 / (0.3 * 0.25 + 1))  # the whole frame's
    values = score(a_sample(quarter), quarter, quarter[0])
    assert (values["J"], values["F"]) == pytest.approx((100.0, 100.0))
    quarter[0, 1] = False
    missing = score(a_sample(quarter), quarter, None)
    assert missing["frames"] == 1                                                   # as much weight as a wrong prediction
    assert (missing["J"], missing["F"], missing["S"]) == (0.0, 0.0, 1.0)            # an S of 0 would be the best
    assert region_f(quarter[0], empty[0]).tolist() == [0.0, 0.0]


def test_pictures_against_sets():
    true, pred = blobs(1, 4, 2, 1, 20, 30), blobs(2, 4, 1, 20, 30)
    true[2] = pred[2] = False                                                       # both empty: IoU 1
    true[3, :, :, 4:] = False
    rows = [BENCHES["refcocog"]["score"](a_sample(t), t, p) | dict(kind="") for t, p in zip(true, pred)]
    sets = [(pixels(p[0]), pixels(t[0, 0]) | pixels(t[1, 0])) for t, p in zip(true, pred)]
    found = BENCHES["refcocog"]["subsets"](rows)["overall"]
    assert found["gIoU"] == pytest.approx(100 * np.mean([len(p & t) / (len(p | t) + 1e-5) if p | t else 1 for p, t in sets]))
    assert found["cIoU"] == pytest.approx(100 * sum(len(p & t) for p, t in sets) / sum(len(p | t) for p, t in sets))
    assert found["Acc@0.5"] == 100 * np.mean([row["found"] for row in rows])
    none = BENCHES["refcocog"]["score"](a_sample(true[0]), true[0], None)
    assert none == dict(I=0, U=len(sets[0][1]), IoU=0, found=False)                 # its area counts in cIoU
    assert BENCHES["refcocog"]["score"](a_sample(true[2]), true[2], None)["IoU"] == 0


def test_boxes_are_found_above_one_half():
    true, pred = np.zeros((2, 1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    true[0, 0, 5, 5:15] = true[1, 0, 5:15, 5] = True                                # the box around both has 10 x 10 pixels
    for width, found in ((0, False), (5, False), (6, True), (10, True)):
        pred[0, 5, 5:5 + width] = pred[0, 14, 5:5 + width] = True
        row = BENCHES["refcocog"]["score"](a_sample(true), true, pred) | dict(kind="")
        assert row["found"] is found and BENCHES["refcocog"]["subsets"]([row])["overall"]["Acc@0.5"] == 100 * found


def test_reasonseg_takes_ignore_both_ways():
    true, ignore, pred = blobs(1, 2, 1, 1, 20, 30)[0], blobs(2, 2, 20, 30)[0], blobs(3, 2, 1, 20, 30)[0]
    true[0, 0] &= ~ignore
    values = score_reasonseg(a_sample(true, ignore=lambda: ignore[None, None]), true, pred)
    p, t, i = pixels(pred[0]), pixels(true[0, 0]), pixels(ignore)
    assert p & i and t and (values["I"], values["U"]) == (len((p & t) - i), len((p | t) - i))
    assert (values["I_fg"], values["U_fg"]) == (len(p & (t | i)), len(p | t | i))
    assert values["IoU"] == pytest.approx(100 * values["I"] / (values["U"] + 1e-5))
    nothing = np.zeros_like(true)
    both = score_reasonseg(a_sample(nothing, ignore=lambda: nothing), nothing, nothing[0])
    assert (both["IoU"], both["IoU_fg"]) == (100, 0)                                # LISA's rule and Seg-Zero's
    assert score_reasonseg(a_sample(true), None, None)["IoU_fg"] == 0
    rows = [values | dict(kind=""), both | dict(kind="")]
    assert BENCHES["reasonseg"]["subsets"](rows)["overall"]["cIoU_fg"] == pytest.approx(100 * values["I_fg"] / values["U_fg"])


def davis_video(seed):
    """uint8 annotation [T, H, W] of 2 objects and void, and what two expressions found."""
    masks, pred = blobs(seed, 3, 3, 16, 20), blobs(seed + 9, 2, 3, 16, 20)
    annotation = np.zeros((3, 16, 20), np.uint8)
    annotation[masks[0]], annotation[masks[1]], annotation[:, 3:6, 2:9] = 1, 2, 255
    annotation[0, 0, 0], annotation[2] = 2, 1
    return annotation, pred


@pytest.mark.parametrize("seed", range(3))
def test_davis_matches_objects_as_well_as_any_permutation(seed):
    annotation, pred = davis_video(seed)
    found = np.where(pred[0], 1, np.where(pred[1], 3, 0)).astype(np.uint8)          # 2 is proposed and empty
    void, table = annotation == 255, {}
    for p, o in itertools.product((1, 2, 3), (1, 2)):
        pairs = [(np.where(v, False, f == p), a == o) for f, a, v in zip(found, annotation, void)]
        table[p, o] = 100 * np.mean([slow_j(*pair) for pair in pairs]), 100 * np.mean([slow_f(*pair) for pair in pairs])
    best = max(itertools.permutations((1, 2, 3), 2), key=lambda order: sum(sum(table[p, o]) for o, p in enumerate(order, 1)))
    ours = match_objects(found, annotation)
    assert np.sum(ours, 0) == pytest.approx(np.sum([table[p, o] for o, p in enumerate(best, 1)], 0))
    assert len(match_objects(found * 0, annotation)) == 2                           # nothing found: still two objects
    annotation[0] = 0                                                               # objects are those of the first frame
    assert match_objects(found, annotation) == []


def davis_samples(annotation):
    """Two objects of one video, four annotators each."""
    return [a_sample((annotation == 1 + k // 4)[None], str(k), ids=[str(1 + k // 4)], annotator=k % 4, annotation=lambda: annotation)
            for k in range(8)]


def test_davis_protocols(tmp_path):
    annotation, pred = davis_video(0)
    samples = davis_samples(annotation)
    for k, sample in enumerate(samples):
        masks = sample.read_masks()[0] | (annotation == 255) if sample.extra["annotator"] < 2 else pred[k // 4]
        write_prediction(tmp_path, sample, masks)
    found = score_predictions("refdavis", samples[::-1], tmp_path)["subsets"]
    assert found["annotator 0"]["J&F"] == found["annotator 1"]["J&F"] == 100        # void does not count ...
    assert found["protocol B"]["J"] < 100                                           # ... but for protocol B it does
    merged = np.where(pred[0], 1, np.where(pred[1], 2, 0)).astype(np.uint8)         # the first object wins
    by_hand = np.mean(match_objects(merged, annotation), 0)
    assert [found["annotator 3"][c] for c in ("J", "F")] == pytest.approx(list(by_hand))
    assert found["protocol A"]["J"] == pytest.approx((200 + 2 * by_hand[0]) / 4)
    write_davis(tmp_path, samples, {sample.name for sample in samples})
    frames = [np.array(Image.open(tmp_path / f"anno_2/v/{name}.png")) for name in samples[0].names]
    assert (np.array(frames) == merged).all()


def test_davis_protocol_a_scores_0_where_there_is_no_prediction(tmp_path):
    annotation, _ = davis_video(0)
    annotation[1][annotation[1] == 1] = 0                                           # nothing to find there, which is no merit
    samples = davis_samples(annotation)
    for sample in samples[1:]:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    (tmp_path / "Annotations/v/5/00005.png").write_bytes(b"")                       # annotator 1's second object
    results = score_predictions("refdavis", samples, tmp_path)
    assert results["missing"] == len(results["broken"]) == 1
    J = [results["subsets"][f"annotator {k}"]["J"] for k in range(4)]
    assert J == pytest.approx([50, 50, 100, 100])
    rows = [dict(J=12.346, F=20.0), dict(J=12.348, F=20.001)]                       # protocol B rounds at the end
    assert evaluation.davis_subsets(rows)["protocol B"] == {"J": 12.35, "F": 20.0, "J&F": 16.17, "expressions": 2}
    write_davis(tmp_path, samples, evaluation.readable(results["expressions"]))
    merged = np.where(annotation == 2, 2, 0).astype(np.uint8)
    assert (np.array(Image.open(tmp_path / "anno_0/v/00005.png")) == merged[1]).all()


def test_a_broken_annotation_of_davis_scores_its_video_0_and_is_named(copy, tmp_path):
    root = copy("refdavis")
    samples = open_real("refdavis", "valid", root)
    for sample in samples:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    path = root / "valid/Annotations" / samples[0].video / "00003.png"
    path.write_bytes(path.read_bytes()[:60])
    results = score_predictions("refdavis", samples, tmp_path)
    here = [sample for sample in samples if sample.video == samples[0].video]
    assert len(results["broken"]) == len(here) and all(str(path) in message for message in results["broken"])
    whole = 1 - len(here) / len(samples)                                            # of the objects
    assert results["subsets"]["protocol A"]["J"] == pytest.approx(100 * whole) and 0 < whole < 1
    write_davis(tmp_path, samples, evaluation.readable(results["expressions"]))
    assert [folder.name for folder in (tmp_path / "anno_0").iterdir()] == [samples[-1].video]


def test_reasonvos_scores_the_frames_that_have_a_mask(copy, tmp_path):
    root = copy("reasonvos")
    sample = open_real("reasonvos", "test", root)[0]
    runs = [encode(mask) for mask in sample.read_masks()[0]]
    write_prediction(tmp_path, sample, sample.read_masks()[0])
    mask = root / "Annotations" / sample.extra["folder"] / f"{sample.names[2]}.png"
    mask.unlink()
    (Path(prediction_folder(tmp_path, sample)) / mask.name).write_bytes(b"")
    sample = open_real("reasonvos", "test", root)[0]
    found = tmp_path / "found.json"
    found.write_text(json.dumps({sample.video: {sample.expression: dict(prediction_masks=[*runs[:2], None, *runs[3:]])}}))
    for source in (tmp_path, found):
        results = score_predictions("reasonvos", [sample], source)
        assert results["summary"]["overall J&F"] == 100 and not results["broken"]
    assert len(sample.read_masks()[0]) == len(sample.names) - 1 and len(load(sample, most_frames=2).masks[0]) == 2


def test_mevis_weighs_expressions_and_counts_what_is_missing(tmp_path):
    true, pred = blobs(0, 4, 2, 3, 12, 16), blobs(1, 4, 3, 12, 16)
    samples = [a_sample(t, str(i)) for i, t in enumerate(true)]
    for sample, masks in list(zip(samples, pred))[:3]:
        write_prediction(tmp_path, sample, masks)
    Image.new("L", (17, 12)).save(tmp_path / "Annotations/v/2/00005.png")           # wrong size
    results = score_predictions("mevis", samples, tmp_path, workers=2)
    unions = [t.any(0) for t in true]
    J = [np.mean([slow_j(*pair) for pair in zip(p, u)]) for p, u in zip(pred, unions)][:2] + [0, 0]
    F = [np.mean([slow_f(*pair) for pair in zip(p, u)]) for p, u in zip(pred, unions)][:2] + [0, 0]
    assert results["summary"] == pytest.approx({"overall J": 100 * np.mean(J), "overall F": 100 * np.mean(F),
                                                "overall J&F": 50 * (np.mean(J) + np.mean(F))})
    assert results["missing"] == 1 and len(results["broken"]) == 1
    assert [row["name"] for row in results["expressions"]] == [sample.name for sample in samples]
    text = score_table(json.loads(json.dumps(results)))                             # results.json can be printed again
    assert "no prediction, scored 0 (S: 1): 1 of 4" in score_table(results | dict(bench="refavs"))
    assert "no prediction, scored 0: 1 of 4 expressions" in text and "00005.png is 12 x 17, its frame 12 x 16" in text
    assert f"{results['summary']['overall J&F']:.2f}" in text


@pytest.mark.parametrize("bench", BENCHES)
def test_every_benchmark_rates_the_truth_and_nothing_at_all(bench, tmp_path):
    kinds = {"revos": ("referring", "reasoning", "hallucination"), "refavs": ("seen", "unseen", "null")}.get(bench, ("",))
    samples = []
    for i, kind in enumerate(kinds * 4):
        true = np.zeros((1, 1 if bench.startswith(("refcoco", "reasonseg")) else 2, 64, 64), bool)
        true[..., 8:40, 8:40] = kind not in ("hallucination", "null")
        annotation = true[0].astype(np.uint8)
        samples.append(a_sample(true, str(i), kind=kind, ids=["1"], objects=1 + i // 6, foreground=lambda true=true: true[:1],
                                ignore=lambda true=true: true & False, annotator=i % 4,
                                annotation=lambda annotation=annotation: annotation))
    nothing = score_predictions(bench, samples, tmp_path)
    assert nothing["missing"] == len(samples)
    for column, value in nothing["summary"].items():
        assert value == (1 if column == "null S" else 0), column
    for sample in samples:
        write_prediction(tmp_path, sample, sample.read_masks()[0])
    best = score_predictions(bench, samples, tmp_path / "Annotations")
    assert best["missing"] == 0 and not best["broken"]
    for column, value in best["summary"].items():
        assert "A_x255" in column or value == pytest.approx(0 if column == "null S" else 100, abs=1e-4), column
    assert "cannot be read" not in score_table(best)


def test_hidden_masks_are_not_scored(tmp_path):
    sample = a_sample(np.zeros((1, 2, 4, 4), bool))
    sample.read_masks = None
    with pytest.raises(ValueError, match="refytvos: its masks are not public"):
        score_predictions("refytvos", [sample], tmp_path)


def test_broken_truth_scores_0_and_is_named(tmp_path):
    sample = a_sample(np.zeros((1, 2, 4, 4), bool))

    def broken():
        raise ValueError("mask of wrong length: v/0 in mask_dict.json")
    sample.read_masks = broken
    for bench in BENCHES:
        row = score_sample(bench, sample, str(tmp_path))
        assert "mask_dict.json" in row["problem"] and row.get("J", 0) == row.get("IoU", 0) == 0


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("video, folder", [("OVIS/train/9d5940d2", None), ("0a7a2514aa", None), ("v_1", "mose_v_1_2")])
def test_predictions_survive_writing_and_reading(tmp_path, video, folder):
    masks = blobs(0, 3, 9, 11)
    sample = a_sample(masks[None], "12", video, **({"folder": folder} if folder else {}))
    assert read_prediction(tmp_path, sample, (9, 11)) is None
    write_prediction(tmp_path, sample, masks)
    path = tmp_path / "Annotations" / (folder or video) / "12/00005.png"
    with Image.open(path) as image:
        assert image.mode == "L" and set(np.unique(image)) <= {0, 255} and (np.array(image) == 255 * masks[1]).all()
    for directory in (tmp_path, tmp_path / "Annotations"):
        assert (read_prediction(directory, sample, (9, 11)) == masks).all()
    Image.fromarray(masks[1].astype(np.uint8)).save(path)                           # 0/1 means the same as 0/255
    write_prediction(tmp_path, a_sample(masks[None], "13", video, **sample.extra), ~masks)
    assert (read_prediction(tmp_path, sample, (9, 11)) == masks).all()
    write_prediction(tmp_path, sample, ~masks)                                      # again: replaced
    assert (read_prediction(tmp_path, sample, (9, 11)) == ~masks).all()
    with pytest.raises(ValueError, match="2 masks for the 3 frames of bench"):
        write_prediction(tmp_path, sample, masks[:2])


def test_an_interrupted_expression_is_not_finished(tmp_path, monkeypatch):
    masks = blobs(0, 3, 9, 11)
    sample, saved = a_sample(masks[None]), []

    def interrupted(image, path):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        open(path, "w").close()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", interrupted)
        write_prediction(tmp_path, sample, masks)
    assert read_prediction(tmp_path, sample, (9, 11)) is None
    with zipfile.ZipFile(zip_predictions("revos", [sample], tmp_path, tmp_path)) as archive:
        assert archive.namelist() == []
    write_prediction(tmp_path, sample, masks)
    assert (read_prediction(tmp_path, sample, (9, 11)) == masks).all()
    assert [path.name for path in (tmp_path / "Annotations/v").iterdir()] == ["0"]


def test_broken_predictions_are_named(tmp_path):
    masks = np.random.default_rng(0).random((3, 40, 50)) < 0.5
    sample = a_sample(masks[None])
    write_prediction(tmp_path, sample, masks)
    path = tmp_path / "Annotations/v/0/00005.png"
    good = path.read_bytes()
    cut, flipped = [good[:n] for n in (0, 40, 200)], [good[:i] + b"\0" + good[i + 1:] for i in (11, 35, 36, 60)]
    for content in cut + flipped:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read predicted mask: {re.escape(str(path))}"):
            read_prediction(tmp_path, sample, (40, 50))
    path.unlink()
    for spoil in (lambda: None, path.mkdir):                                        # missing, then a directory
        spoil()
        with pytest.raises(ValueError, match="cannot read predicted mask: .*00005.png"):
            read_prediction(tmp_path, sample, (40, 50))


def test_a_picture_without_a_readable_prediction_counts_its_area_in_ciou(tmp_path):
    true = np.zeros((1, 1, 9, 11), bool)
    true[..., 2:5, 3:8] = True
    write_prediction(tmp_path, a_sample(true), true[0])
    Image.new("L", (9, 9)).save(tmp_path / "Annotations/v/0/00000.png")
    row = score_sample("refcoco", a_sample(true), tmp_path)
    assert (row["I"], row["U"], row["IoU"]) == (0, 15, 0) and "wrong size" in row["problem"]


@pytest.mark.parametrize("bench, top", [("mevis", "b/0/"), ("refytvos", "Annotations/b/0/")])
def test_archives_are_as_their_servers_take_them(tmp_path, bench, top):
    masks = blobs(0, 2, 9, 11)
    samples = [a_sample(masks[None], video=video) for video in "bca"]
    for sample in samples:
        write_prediction(tmp_path / "theirs", sample, masks)
    (tmp_path / "out").mkdir()
    for directory in ("theirs", "theirs/Annotations"):
        with zipfile.ZipFile(zip_predictions(bench, samples[::2], tmp_path / directory, tmp_path / "out")) as archive:
            names = archive.namelist()
            assert top + "00005.png" in names and len(names) == 4 and names == sorted(names)
            with archive.open(top + "00000.png") as file:
                assert (np.array(Image.open(file)) == 255 * masks[0]).all()
    assert [path.name for path in tmp_path.rglob("*.zip")] == [f"{bench}.zip"] and (tmp_path / f"out/{bench}.zip").exists()
    with pytest.raises(FileNotFoundError, match="no folder of predictions to pack"):
        zip_predictions(bench, samples, tmp_path / "elsewhere", tmp_path)


def encode(mask):
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=rle["size"], counts=rle["counts"].decode())


def test_predictions_in_one_json(tmp_path):
    true = blobs(0, 3, 2, 3, 9, 11)
    samples = [revos_sample(t, expression=str(i), kind=k) for i, (t, k) in
               enumerate(zip(true, ("referring", "reasoning", "reasoning")))]
    pred = blobs(1, 2, 3, 9, 11)
    found = {str(i): dict(exp="the left one", prediction_masks=[encode(m) for m in masks]) for i, masks in enumerate(pred)}
    (tmp_path / "found.json").write_text(json.dumps({"v": found}))
    for sample, masks in zip(samples, pred):
        write_prediction(tmp_path, sample, masks)
    results = score_predictions("revos", samples, tmp_path / "found.json")
    assert results == score_predictions("revos", samples, tmp_path) and results["missing"] == 1
    found["1"]["prediction_masks"].pop()
    (tmp_path / "found.json").write_text(json.dumps({"v": found}))
    (broken,) = score_predictions("revos", samples, tmp_path / "found.json")["broken"]
    assert "prediction_masks of bench/v/1 are not a list of 3" in broken
    for masks, reason in (([3] * 3, "the prediction of bench/v/1"), ([[]] * 3, "the prediction of bench/v/1"),
                          (5, "bench/v/1 are not a list"), ([dict(size=[9, 11], counts=[[1], 2])] * 3, "cannot use the prediction of bench/v/1")):
        found["1"]["prediction_masks"] = masks
        (tmp_path / "found.json").write_text(json.dumps({"v": found}))
        results = score_predictions("revos", samples, tmp_path / "found.json")
        assert len(results["broken"]) == 1 and reason in results["broken"][0]
    found["1"]["prediction_masks"] = [None] * 3                                     # empty masks
    (tmp_path / "found.json").write_text(json.dumps({"v": found}))
    results, nothing = score_predictions("revos", samples, tmp_path / "found.json"), np.zeros((3, 9, 11), bool)
    assert not results["broken"] and results["expressions"][1]["J"] == score_revos(samples[1], true[1], nothing)["J"]


@pytest.mark.parametrize("content, error, message", [
    (None, FileNotFoundError, "no such directory or .json of predictions"), ('{"v": {', ValueError, "cannot use"),
    ("[1]", ValueError, "cannot use"),
    *((text, ValueError, ": v in ") for text in ('{"v": []}', '{"v": {"0": [1]}}', '{"v": 3}'))])
def test_what_is_no_set_of_predictions_is_named(tmp_path, content, error, message):
    path = tmp_path / "found.json"
    if content:
        path.write_text(content)
    with pytest.raises(error, match=f"{message}.*found.json"):
        open_predictions(path)


# ------------------------------------------------------------------------------------------------ plugged grounders


def test_any_file_can_ground(tmp_path):
    path = tmp_path / "left half.py"
    path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                    "@dataclass\nclass Thing:\n    part: int\n"
                    "def boxes(image, description):\n    return [[0, 0, image.width // Thing(2).part, image.height - 1.0]]"
                    " * len(description.split())\n")
    boxes = plugged(str(path))
    assert boxes(Image.new("RGB", (40, 30)), "two dogs") == [(0.0, 0.0, 20.0, 29.0)] * 2
    assert boxes(Image.new("RGB", (40, 30)), "") == []


@pytest.mark.parametrize("result", ["None", "3", "'a'", "[(1, 2, 3)]", "[(5, 2, 1, 4)]", "[1, 2, 3, 4]",
                                    "[(0, 0, 1, float('nan'))]"])
def test_what_a_plugged_function_returns_is_checked(tmp_path, result):
    path = tmp_path / "mine.py"
    path.write_text(f"def boxes(image, description):\n    return {result}\n")
    with pytest.raises(TypeError, match=r"boxes\(\) of .*mine.py returned .*, not a list of \(x1, y1, x2, y2\)"):
        plugged(str(path))(Image.new("RGB", (40, 30)), "dog")


def test_what_cannot_be_plugged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of a grounder: .*none.py"):
        plugged(str(tmp_path / "none.py"))
    (tmp_path / "mine.py").write_text("def ground(): pass\n")
    with pytest.raises(ValueError, match=r"no function boxes\(image, description\) in: .*mine.py"):
        plugged(str(tmp_path / "mine.py"))
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="not a Python file: .*mine.txt"):
        plugged(str(tmp_path / "mine.txt"))


# ---- a Thinker in miniature, and prompts for it ------------------------------------------------------------------
# Ids: 0 pad, 1 end, 2 sound, 3 image, 4 video, 5 and 6 vision brackets, 7 and 8 sound brackets, the rest is text.
EOS, SOUND, IMAGE, VIDEO, SEE, SEEN, HEAR, HEARD, VOCAB = 1, 2, 3, 4, 5, 6, 7, 8, 97
MEDIA = [SOUND, IMAGE, VIDEO, SEE, SEEN, HEAR, HEARD]


def tiny_config(**changes):
    settings = dict(
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                           spatial_merge_size=2, temporal_patch_size=2, window_size=16, out_hidden_size=64,
                           fullatt_block_indexes=[1]),
        audio_config=dict(num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16,
                          output_dim=64, max_source_positions=64, n_window=8),
        text_config=dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                         rope_parameters=dict(rope_theta=10000.0, rope_type="default", mrope_section=[2, 3, 3])),
        audio_token_index=SOUND, image_token_index=IMAGE, video_token_index=VIDEO, pad_token_id=0,
        vision_start_token_id=SEE, vision_end_token_id=SEEN, audio_start_token_id=HEAR, audio_end_token_id=HEARD,
        tie_word_embeddings=False)
    return Qwen2_5OmniThinkerConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' model with random weights, large enough that attention is not flat, and its directory."""
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config()).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 if "embed" in name else 1.5 * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(model.path)
    return model


@pytest.fixture
def thinker(reference):
    return Thinker.from_pretrained(reference.path)


def text(count, seed=0):
    return torch.randint(9, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs_of(kind, reference, seed=0):
    """One prompt as data.py would hand it over, and the same for transformers."""
    random = torch.Generator().manual_seed(seed)
    grid = {"image": [[1, 8, 12]], "video": [[3, 8, 4]], "video with sound": [[3, 8, 4]]}.get(kind)
    mel = torch.randn(8, 93, generator=random) if "sound" in kind else None  # 93 frames: 47, then 23 tokens
    seen = [IMAGE if kind == "image" else VIDEO] * (torch.tensor(grid).prod() // 4 if grid else 0)
    heard = [SOUND] * 23 if mel is not None else []
    if kind == "video with sound":  # sound stands between the video's chunks of 2 s; the later video tokens follow
        media = [SEE, HEAR, *interleaved(seen, heard), HEARD, SEEN]
    else:
        media = [SEE, *seen, SEEN] * bool(seen) + [HEAR, *heard, HEARD] * bool(heard)
    ids = torch.tensor(text(7, seed) + media + text(6, seed + 1))
    grid = torch.tensor(grid) if grid else None
    patches = torch.randn(int(grid.prod()), 96, generator=random) if seen else None
    theirs = dict(input_ids=ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    if seen:
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        theirs |= dict(zip(names, (patches, grid)))
    if heard:
        theirs |= dict(input_features=mel[None], feature_attention_mask=torch.ones(1, 93, dtype=torch.long))
    theirs |= dict(video_second_per_grid=torch.tensor([1.0])) if VIDEO in ids else {}
    theirs |= dict(use_audio_in_video=True) if kind == "video with sound" else {}
    positions = rope_index(reference, theirs)
    return SimpleNamespace(ids=ids, positions=positions, patches=patches, grid=grid, mel=mel), theirs


def interleaved(seen, heard):
    """Chunks of 2 s: two of the three frame pairs (1 s each, 8 tokens) first, then all of the 0.9 s of sound."""
    return seen[:16] + heard + seen[16:]


def rope_index(reference, theirs):
    index = getattr(reference, "model", reference)
    index = index if hasattr(index, "get_rope_index") else reference
    lengths = torch.tensor([93]) if "input_features" in theirs else None
    if lengths is None and "image_grid_thw" not in theirs and "video_grid_thw" not in theirs:
        return torch.arange(theirs["input_ids"].shape[1]).expand(3, -1)
    return index.get_rope_index(theirs["input_ids"], theirs.get("image_grid_thw"), theirs.get("video_grid_thw"),
                                theirs["attention_mask"], theirs.get("use_audio_in_video", False), lengths,
                                theirs.get("video_second_per_grid"))[0][:, 0]


KINDS = ["text", "image", "video", "sound", "video with sound"]


def prompts_of(thinker, reference, kinds=KINDS):
    return thinker.embed([inputs_of(kind, reference, seed)[0] for seed, kind in enumerate(kinds)])


def full_logits(thinker, prompt, completion):
    """Slow twin: one plain forward over prompt and completion -> the logits (C, V) that predict the completion."""
    C = len(completion)
    positions = torch.cat([prompt.positions, (prompt.positions.max() + 1 + torch.arange(C)).expand(3, -1)], dim=1)
    whole = Prompt(torch.cat([prompt.ids, completion]), positions, prompt.slots, prompt.media)
    logits = thinker.logits(whole)[-C - 1:-1].clone()
    logits[:, MEDIA] = -torch.inf
    return logits


def gradients(thinker, loss):
    thinker.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in thinker.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance * b[name].abs().max().item(),
                                   msg=lambda text: f"{name}: {text}")


# ---- against transformers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_transformers(reference, thinker, kind):
    ours, theirs = inputs_of(kind, reference)
    logits = thinker.logits(*thinker.embed([ours]))
    expected = reference(**theirs, use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = gradients(thinker, (logits * weights).mean())
    assert not [name for name in found if name.startswith(("visual.", "audio_tower."))]
    short = lambda name: name.replace("model.language_model.", "model.")  # where newer transformers keep it
    wanted = {short(name): g for name, g in gradients(reference, (expected * weights).mean()).items()}
    assert_same_gradients(found, {name: wanted[name] for name in found})


def test_removing_the_sound_changes_the_logits(reference, thinker):
    ours, _ = inputs_of("video with sound", reference)
    heard = thinker.logits(*thinker.embed([ours]))
    ours.mel = torch.zeros_like(ours.mel)
    silent = thinker.logits(*thinker.embed([ours]))
    first = (ours.ids == SOUND).nonzero()[0]
    assert torch.equal(heard[:first], silent[:first])
    assert (heard[-1] - silent[-1]).abs().max() > 1e-2


def test_towers_run_once_for_a_list_and_stay_frozen(reference, thinker, monkeypatch):
    thinker.train()
    assert not thinker.visual.training and not thinker.audio_tower.training
    together = prompts_of(thinker, reference)
    for seed, (kind, prompt) in enumerate(zip(KINDS, together)):
        alone, = thinker.embed([inputs_of(kind, reference, seed)[0]])
        torch.testing.assert_close(prompt.media, alone.media, rtol=1e-4, atol=1e-5)
        assert torch.equal(prompt.slots, alone.slots) and not prompt.media.requires_grad
    monkeypatch.setattr(model_file, "VISION_PATCHES", 1)                                          # one prompt at a time
    for prompt, in_parts in zip(together, prompts_of(thinker, reference)):
        torch.testing.assert_close(prompt.media, in_parts.media, rtol=1e-4, atol=1e-5)


def test_media_and_placeholders_must_agree(reference, thinker):
    ours, _ = inputs_of("image", reference)
    ours.ids[8] = 50
    with pytest.raises(ValueError, match="prompt 1: 23 image or video placeholders, but 24"):
        thinker.embed([inputs_of("text", reference)[0], ours])
    ours, _ = inputs_of("sound", reference)
    ours.mel = None
    with pytest.raises(ValueError, match="prompt 0: 23 sound placeholders, but 0"):
        thinker.embed([ours])
    ours, _ = inputs_of("image", reference)
    ours.ids[[8, -1]] = ours.ids[[-1, 8]]
    with pytest.raises(ValueError, match="must end with a text token"):
        thinker.embed([ours])


# ---- log-probabilities -------------------------------------------------------------------------------------------

def ragged(lengths, seed=0):
    """Completions right-padded with the end id (G, C), and the mask of what counts."""
    rows = [torch.tensor(text(length, seed + i)) for i, length in enumerate(lengths)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS), mask


def slow_logprobs(thinker, prompts, completions, mask, temperature):
    """Slow twin: every completion in a forward of its own, without its padding -> flat logp and entropy."""
    logp, entropy = [], []
    for prompt, row, keep in zip(prompts, completions, mask):
        logits = full_logits(thinker, prompt, row[keep]) / temperature
        scores = logits.log_softmax(-1)
        logp.append(scores.gather(-1, row[keep][:, None])[:, 0])
        entropy.append(torch.distributions.Categorical(logits=logits).entropy())
    return torch.cat(logp), torch.cat(entropy)


@pytest.mark.parametrize("kind", ["text", "video with sound"])
def test_shared_prefix_equals_one_forward_per_completion(reference, thinker, kind):
    prompt, = prompts_of(thinker, reference, [kind])
    completions, mask = ragged([9, 1, 14, 6])
    logp, entropy = thinker.logprobs(prompt, completions, temperature=0.7)
    slow, slow_entropy = slow_logprobs(thinker, [prompt] * 4, completions, mask, 0.7)
    torch.testing.assert_close(logp[mask], slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy[mask], slow_entropy.detach(), rtol=1e-3, atol=1e-4)
    weights = torch.randn(len(slow))
    assert_same_gradients(gradients(thinker, (logp[mask] * weights).sum()), gradients(thinker, (slow * weights).sum()))


def test_forward_equals_one_forward_per_prompt(reference, thinker):
    prompts = prompts_of(thinker, reference)
    completions, mask = ragged([9, 1, 14, 6, 14])
    logp, entropy = thinker(prompts, completions)
    slow, slow_entropy = slow_logprobs(thinker, prompts, completions, mask, 1.0)
    torch.testing.assert_close(logp[mask], slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy[mask], slow_entropy.detach(), rtol=1e-3, atol=1e-4)
    assert_same_gradients(gradients(thinker, logp[mask].sum()), gradients(thinker, slow.sum()))


def test_padding_carries_no_gradient(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, mask = ragged([5, 5])
    longer = F.pad(completions, (0, 7), value=EOS)
    plain = gradients(thinker, thinker.logprobs(prompt, completions)[0].sum())
    padded = gradients(thinker, thinker.logprobs(prompt, longer)[0][:, :5].sum())
    assert_same_gradients(padded, plain)


def test_checkpointed_layers_give_equal_gradients(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, mask = ragged([9, 4])
    plain = gradients(thinker, thinker.logprobs(prompt, completions)[0][mask].sum())
    thinker.gradient_checkpointing = True
    assert_same_gradients(gradients(thinker, thinker.logprobs(prompt, completions)[0][mask].sum()), plain)
    assert_same_gradients(gradients(thinker, thinker([prompt] * 2, completions)[0][mask].sum()), plain)


def test_head_in_chunks_equals_the_whole():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)
    targets, suppressed = torch.randint(9, VOCAB, (50,)), torch.tensor(MEDIA)
    results = [(*token_logprobs(hidden, weight, targets, suppressed, 0.8, chunk), chunk) for chunk in (7, 50)]
    for logp, entropy, _ in results:
        assert not entropy.requires_grad and (logp < 0).all()
    (a, ea, _), (b, eb, _) = results
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ea, eb)
    for x, y in zip(torch.autograd.grad(a.sum(), (hidden, weight)), torch.autograd.grad(b.sum(), (hidden, weight))):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    probs = (head_logits(hidden, weight, suppressed) / 0.8).softmax(-1)
    assert (probs[:, MEDIA] == 0).all()
    torch.testing.assert_close(probs.gather(1, targets[:, None])[:, 0].log(), a)


# ---- generation --------------------------------------------------------------------------------------------------

def slow_generate(thinker, prompt, n, steps, temperature, top_p, top_k, seed):
    """Slow twin: a full forward per token, the same draws."""
    generator, rows = torch.Generator().manual_seed(seed), torch.empty(n, 0, dtype=torch.long)
    ended = torch.zeros(n, dtype=torch.bool)
    for _ in range(steps):
        logits = torch.stack([full_logits(thinker, prompt, F.pad(row, (0, 1)))[-1] for row in rows])
        tokens = sample(logits, [generator], n, torch.arange(n), temperature, top_k, top_p)
        rows, ended = torch.cat([rows, tokens[:, None]], dim=1), ended | (tokens == EOS)
    return [row[:row.tolist().index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("temperature, top_p, top_k", [(0, 1.0, 0), (1.0, 1.0, 0), (1.3, 0.9, 20)])
@torch.no_grad()
def test_generation_equals_full_forwards_in_a_ragged_batch(reference, thinker, temperature, top_p, top_k):
    prompts = prompts_of(thinker, reference, ["text", "video with sound", "image"])
    found = thinker.generate(prompts, 3, 12, eos_ids={EOS}, temperature=temperature, top_p=top_p, top_k=top_k,
                             seeds=[5, 6, 7])
    for seed, prompt, group in zip([5, 6, 7], prompts, found):
        wanted = slow_generate(thinker, prompt, 3, 12, temperature, top_p, top_k, seed)
        assert [row.tolist() for row in group] == [row.tolist() for row in wanted]
    assert (len({tuple(row.tolist()) for row in found[0]}) == 1) == (temperature == 0)


@torch.no_grad()
def test_a_prompts_samples_do_not_depend_on_the_batch(reference, thinker, monkeypatch):
    prompts = prompts_of(thinker, reference)
    together = thinker.generate(prompts, 2, 20, eos_ids={EOS}, seeds=[3, 4, 5, 6, 7])
    monkeypatch.setattr(model_file, "PREFILL_TOKENS", 64)
    again = thinker.generate(prompts[::-1], 2, 20, eos_ids={EOS}, seeds=[7, 6, 5, 4, 3])[::-1]
    alone = [thinker.generate([p], 2, 20, eos_ids={EOS}, seeds=[s])[0] for s, p in enumerate(prompts, 3)]
    for a, b, c in zip(together, again, alone):
        assert [x.tolist() for x in a] == [x.tolist() for x in b] == [x.tolist() for x in c]


def test_prefill_batches_keep_the_limit(monkeypatch):
    monkeypatch.setattr(model_file, "PREFILL_TOKENS", 100)
    assert prefill_batches([50, 10, 120, 40, 50]) == [[1, 3], [0, 4], [2]]
    assert in_batches(list("abcde"), [50, 10, 120, 40, 50], 100) == [["a", "b"], ["c"], ["d", "e"]]


@torch.no_grad()
def test_decoding_is_as_exact_in_bf16_as_one_pass_of_attention():
    """Keys with a large common part, as those of large models: logits near 60, which bf16 alone would round by a quarter."""
    torch.manual_seed(0)
    config = read_config(TOY).text_config
    H, K, P = config.num_attention_heads, config.num_key_value_heads, 40
    d = config.hidden_size // H
    q, k, v = (torch.randn(P + 1, n, d) for n in (H, K, K))
    q, k = q + 3, k + 3 * 60 / (3 * 3 * d ** 0.5)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    cache = Cache([P], 1, 4, config, like=q)
    Prefill(1, cache, [0]).attend(0, q[:P], k[:P], v[:P])
    cache.advance(0, recorded=False)
    decoded = cache.attend(0, q[P:], k[P:], v[P:]).float()
    true, once = (Rows(1).attend(0, *(x.to(dtype) for x in (q, k, v)))[P:].float() for dtype in (torch.float32, torch.bfloat16))
    assert (decoded - true).norm() < 1.5 * (once - true).norm() + 1e-3 * true.norm()


class Traced(Recorded):
    """A recording without a GPU: the operations of one call, in which everything but the arguments is a constant, a number as it
    was and a tensor as the place where it lies."""

    def __init__(self, function, *arguments):
        recordings.append(self)
        self.arguments = [x.clone() for x in arguments]
        trace = make_fx(lambda: function(*self.arguments))()
        self.result = trace().clone()
        self.graph = SimpleNamespace(replay=lambda: self.result.copy_(trace()))


recordings = []


@torch.no_grad()
def test_a_recorded_step_gives_the_same_tokens(reference, thinker, monkeypatch):
    prompts = prompts_of(thinker, reference, ["text", "video with sound", "image"])
    options = dict(eos_ids={EOS, 11, 12, 13}, temperature=1.3, seeds=[5, 6, 7])
    wanted = thinker.generate(prompts, 6, 40, **options)
    assert min(len(row) for group in wanted for row in group) < 16 < max(len(row) for group in wanted for row in group)
    monkeypatch.setattr(model_file, "SHORTEST_SPAN", 16)
    monkeypatch.setitem(model_file.RECORDERS, "cpu", Traced)
    recordings.clear()
    found = thinker.generate(prompts, 6, 40, **options)
    assert [[row.tolist() for row in group] for group in found] == [[row.tolist() for row in group] for group in wanted]
    rows = [len(recording.arguments[0]) for recording in recordings]
    assert len(rows) >= 3 and rows == sorted(rows, reverse=True) and rows[0] == 18 and rows[-1] < 18     # some have left


@torch.no_grad()
def test_what_is_sampled_is_what_is_scored(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    group, = thinker.generate([prompt], 4, 30, eos_ids=set(), seeds=[1])
    completions = torch.stack(group)
    assert completions.shape == (4, 30) and not torch.isin(completions, torch.tensor(MEDIA)).any()
    logp, entropy = thinker.logprobs(prompt, completions)
    assert logp.isfinite().all() and (entropy > 0).all()
    # Averaged over samples, -logp estimates the entropy.
    assert abs(-logp.mean() - entropy.mean()) < 0.3


@torch.no_grad()
def test_generation_stops_at_an_end_token(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["text"])
    free, = thinker.generate([prompt], 1, 40, eos_ids=set(), temperature=0)[0]
    ends = {free[9].item(), free[20].item()}
    first = next(i for i, token in enumerate(free.tolist()) if token in ends)
    calls = []
    thinker.model.norm.register_forward_hook(lambda *_: calls.append(1))
    row, = thinker.generate([prompt], 1, 40, eos_ids=ends, temperature=0)[0]
    assert row.tolist() == free[:first + 1].tolist() and row.dtype == torch.int64
    assert len(calls) == 1 + 8 * (first // 8 + 1)  # one prefill, then steps up to the next look


@torch.no_grad()
def test_media_ids_are_never_sampled(reference, thinker):
    thinker.lm_head.weight[MEDIA] *= 100  # without suppression these would win about every other step
    prompt, = prompts_of(thinker, reference, ["text"])
    drawn = torch.cat(thinker.generate([prompt], 16, 16, eos_ids=set(), temperature=2.0, seeds=[0])[0])
    assert not torch.isin(drawn, torch.tensor(MEDIA)).any()
    torch.manual_seed(8)
    a = thinker.generate([prompt], 1, 16, eos_ids=set())[0][0]
    torch.manual_seed(8)
    assert torch.equal(a, thinker.generate([prompt], 1, 16, eos_ids=set())[0][0])


def test_top_k_and_top_p():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert truncate(probs.clone(), 0, 1.0).equal(probs)
    assert truncate(probs, 2, 1.0).equal(torch.tensor([[0, 0.4, 0, 0.3]]))
    assert (truncate(probs, 0, 0.5) > 0).tolist() == [[False, True, False, True]]  # 0.4 alone falls short of 0.5
    assert (truncate(probs, 0, 1e-6) > 0).sum() == 1
    assert (truncate(probs, 3, 0.75) > 0).sum() == 2  # 0.7 of the kept 0.9 is more than 0.75
    logits = probs.log().expand(20000, -1)
    drawn = sample(logits, [torch.Generator().manual_seed(0)], len(logits), torch.arange(len(logits)), 1.0, 0, 1.0)
    torch.testing.assert_close(drawn.bincount() / 20000, probs[0], rtol=0, atol=0.015)
    drawn = sample(logits, [torch.Generator().manual_seed(0)], len(logits), torch.arange(len(logits)), 0.5, 3, 1.0)
    wanted = torch.tensor([0, 16, 4, 9]) / 29  # squares of 0.4, 0.2, 0.3
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, wanted, rtol=0, atol=0.015)


# ---- checkpoints -------------------------------------------------------------------------------------------------

def test_our_directory_loads_in_transformers(reference, thinker, tmp_path):
    for size in ("5GB", "100KB"):
        thinker.save_pretrained(tmp_path / size, max_shard_size=size)
        theirs, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            tmp_path / size, output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        _, example = inputs_of("video with sound", reference)
        wanted = reference(**example, use_cache=False).logits
        torch.testing.assert_close(theirs.eval()(**example, use_cache=False).logits, wanted, rtol=0, atol=0)
        ours = Thinker.from_pretrained(tmp_path / size)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), thinker.state_dict().values()))
    assert (tmp_path / "100KB" / "model.safetensors.index.json").is_file()


def test_a_loaded_model_trains_only_its_language_model(thinker):
    trained = {name.split(".")[0] for name, weight in thinker.named_parameters() if weight.requires_grad}
    assert trained == {"model", "lm_head"}
    assert not [name for name, buffer in thinker.named_buffers() if buffer.is_meta]


def test_tied_embeddings_survive(tmp_path):
    thinker = Thinker(tiny_config(tie_word_embeddings=True))
    thinker.save_pretrained(tmp_path, {name: tensor.clone() for name, tensor in thinker.state_dict().items()})
    loaded = Thinker.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    _, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.fixture
def omni(thinker, tmp_path):
    """The released layout in miniature: nested config in its old spelling, prefixed weights in shards, a talker."""
    path = tmp_path / "omni"
    thinker.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 10000.0, "rope_scaling": {
        "mrope_section": config["text_config"].pop("rope_parameters")["mrope_section"], "rope_type": "default",
        "type": "default"}}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({
        "model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": config,
        "talker_config": {"model_type": "qwen2_5_omni_talker"}}))
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(tmp_path / "plain/model.safetensors").items()}
    names = sorted(weights)
    shards = {"model-00001-of-00003.safetensors": {name: weights[name] for name in names[::2]},
              "model-00002-of-00003.safetensors": {name: weights[name] for name in names[1::2]},
              "model-00003-of-00003.safetensors": {"talker.x": torch.ones(2), "token2wav.y": torch.ones(2)}}
    for file, shard in shards.items():
        save_file(shard, path / file)
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_the_7b_has_the_same_weights_here_and_in_transformers():
    """On the meta device: names and shapes of every weight, at the size that users bring."""
    config = Qwen2_5OmniThinkerConfig(
        text_config=dict(rope_parameters=dict(rope_theta=1e6, rope_type="default", mrope_section=[16, 24, 24])),
        vision_config=dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584))
    with torch.device("meta"):
        ours, theirs = Thinker(config).state_dict(), Qwen2_5OmniThinkerForConditionalGeneration(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    trained = sum(v.numel() for k, v in ours.items() if k.startswith(("model.", "lm_head.")))
    assert len(ours) > 1000 and trained == 7_615_616_512                                  # method.md, 6: the language model


def test_the_released_layout_loads(reference, thinker, omni):
    loaded = Thinker.from_pretrained(omni)
    ours, theirs = inputs_of("video with sound", reference)
    logits = loaded.logits(*loaded.embed([ours]))
    torch.testing.assert_close(logits, reference(**theirs, use_cache=False).logits[0], rtol=1e-4, atol=1e-4)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def drop_thinker_weights(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {"talker.x": "model-00003-of-00003.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def first_shard(change):
    """A breakage: changes the bytes of the first shard."""
    def breakage(path):
        file = path / "model-00001-of-00003.safetensors"
        file.write_bytes(change(file.read_bytes()))
    return breakage


def reshape_one(path):
    file = path / "model-00001-of-00003.safetensors"
    shard = load_file(file)
    save_file({**shard, "thinker.lm_head.weight": torch.ones(2, 3)}, file)


def write(name, text):
    return lambda path: (path / name).write_text(text)


INDEX = "model.safetensors.index.json"
THINKER = '{"model_type": "qwen2_5_omni", "thinker_config": %s}'


@pytest.mark.parametrize("breakage, error, message", [
    *((first_shard(change), BadInput, "not a safetensors file: .*00001-of-00003")
      for change in (lambda b: b"", lambda b: b[:-100], lambda b: b[:20], lambda b: b"garbage" * 99)),
    (reshape_one, BadInput, "00001-of-00003.* does not fit .*config.json .*size mismatch"),
    *((write(INDEX, text), BadInput, "index.json")
      for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null, "b": "c"}}')),
    *((write("config.json", text), BadInput, "config.json")
      for text in ("", "[1]", "{}", THINKER % "[]", THINKER % '{"model_type": "qwen2_5_omni_thinker", "text_config": [1]}',
                   THINKER % '{"model_type": "qwen2_5_omni_thinker", "text_config": {"num_attention_heads": 0}}',
                   THINKER % '{"model_type": "qwen2_5_omni_thinker", "text_config": {"rope_parameters": {"rope_theta": 1}}}')),
    (shutil.rmtree, FileNotFoundError, "hf download Qwen/Qwen2.5-Omni-7B --local-dir"),
    (lambda path: (path / "config.json").unlink(), FileNotFoundError, "no such file: .*config.json; expected .*hf download"),
    (lambda path: (path / "config.json").write_text('{"model_type": "qwen2_5_omni_talker"}'), ValueError,
     "describes a qwen2_5_omni_talker model; expected qwen2_5_omni"),
    (lambda path: (path / "config.json").write_text('{"model_type": "qwen2_5_omni"}'), ValueError,
     "thinker_config"),
    (lambda path: (path / "model.safetensors.index.json").unlink(), FileNotFoundError, "holds no weights"),
    (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), FileNotFoundError, "00002-of-00003.*missing"),
    (drop_thinker_weights, ValueError, r"lacks \d+ of the Thinker's weights, the first is .*; expected .*hf download"),
    (lambda path: save_file({"thinker.extra": torch.ones(1)}, path / "model-00003-of-00003.safetensors"), ValueError,
     "does not have: extra"),
])
def test_broken_directories_are_refused_in_one_line(omni, breakage, error, message):
    breakage(omni)
    with pytest.raises(BadInput if error is ValueError else error, match=message) as caught:
        Thinker.from_pretrained(omni)
    assert str(omni) in str(caught.value) and "\n" not in str(caught.value)


# ====================================================================================================================
# SAM2
# ====================================================================================================================

SAM2 = ("toy/sam2/config.yaml", "toy/sam2/model.pt")

# Boxes by frame, [x1, y1, x2, y2] in pixels: the object's own numbers do not matter here, only who is prompted when.
PROMPTS = [((0, 0),), ((0, 3),), ((1, 3),), ((1, 7),), ((0, 2), (0, 5)), ((1, 0), (1, 6)), ((0, 1), (1, 4), (0, 6))]


@pytest.fixture(scope="module")
def tracker():
    return Tracker.from_pretrained(*SAM2)


def toy_prompts(index, split="test", T=8):
    """A held-out scene's frames and objects prompted early, late and several times; boxes of empty masks are guesses."""
    scene = toy_scene(split, index)
    pictures = scene.pictures[:T]
    objects = []
    for prompts in PROMPTS:
        boxes = {}
        for o, t in prompts:
            ys, xs = np.nonzero(scene.masks[o, t])
            boxes[t] = (xs.min(), ys.min(), xs.max(), ys.max()) if len(xs) else (30.5, 40, 61, 70.25)
        objects.append(boxes)
    return Frames(lambda t: Image.fromarray(pictures[t]), range(len(pictures))), objects


def predictor_logits(model, frames, objects, folder, monkeypatch):
    """The slow way: SAM2's own video predictor, one object after the other."""
    for t in range(len(frames)):
        frames[t].save(folder / f"{t:05d}.jpg", format="png")             # it insists on the name, not on the format
    # It rounds memories to bf16 and then counts on autocast; both ways are compared in float32 here.
    monkeypatch.setattr(sam2_video_predictor, "torch", SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32}))
    state = model.init_state(str(folder))
    for n, boxes in enumerate(objects):
        for t, box in boxes.items():
            model.add_new_points_or_box(state, frame_idx=t, obj_id=n, box=np.array(box, np.float32))
    return torch.stack([logits[:, 0] for _, _, logits in model.propagate_in_video(state, start_frame_idx=0)], 1)    # [N, T, H, W]


@torch.inference_mode()
def tracker_logits(tracker, frames, objects):
    """What `track` cuts at 0; toy frames have the size that the toy model sees, so boxes need no scaling."""
    look = Lookout(tracker, [frames], [0] * len(objects), objects)
    boxes = [{t: np.array(box) for t, box in boxes.items()} for boxes in objects]
    logits = torch.stack([logits for logits, _ in tracker.run(look, boxes, [len(frames)] * len(boxes))], 1)
    return F.interpolate(logits, (tracker.side, tracker.side), mode="bilinear")    # [N, T, H, W]


def ious(a, b):
    """IoU [N] of two sets of masks over all frames at once; 1 where both are empty."""
    union = (a | b).sum((1, 2, 3))
    return np.where(union > 0, (a & b).sum((1, 2, 3)) / np.maximum(union, 1), 1)


@pytest.mark.parametrize("clip", [(0, "test", 8), (1, "long", 20)])
def test_tracker_equals_the_predictor(tracker, tmp_path, monkeypatch, clip):
    frames, objects = toy_prompts(*clip)
    slow = predictor_logits(tracker.model, frames, objects, tmp_path, monkeypatch)
    # A wrong time code moves the logits by 1e-3 only, far too little for the masks to show it.
    torch.testing.assert_close(tracker_logits(tracker, frames, objects), slow, rtol=0, atol=1e-4)
    masks = tracker.track(frames, objects)
    assert masks.any() and ious(masks, slow.numpy() > 0).min() > 0.99


def test_objects_do_not_see_each_other(tracker, monkeypatch):
    frames, objects = toy_prompts(2)
    together = tracker.track(frames, objects)
    order = [4, 2, 6, 0, 2]                                               # another order, one twice, some missing
    assert ious(tracker.track(frames, [objects[n] for n in order]), together[order]).min() > 0.99
    monkeypatch.setattr("segment.BATCH", 2)
    monkeypatch.setattr("segment.AHEAD", 3)
    assert ious(tracker.track(frames, objects), together).min() > 0.99


def test_clips_of_several_lengths_and_sizes_are_tracked_together_as_each_alone(tracker):
    clips = [toy_prompts(3), (*toy_prompts(4, "long", 12),), (toy_prompts(5)[0], []), toy_prompts(6)]
    frames, objects = clips[3]
    wide = Frames(lambda t: frames[t].resize((320, 192)), range(len(frames)))
    clips[3] = wide, [{t: np.array(box) * (2.5, 1.5, 2.5, 1.5) for t, box in boxes.items()} for boxes in objects[:2]]
    unions = [None, [[0], [1, 2], []], None, None]
    together = tracker.track_clips([(*clip, union) for clip, union in zip(clips, unions)])
    for clip, union, masks in zip(clips, unions, together):
        alone = tracker.track(*clip, union)
        assert masks.shape == alone.shape and (ious(masks, alone) > 0.99).all()
    # Lengths differ in the code of time, too, which the masks hardly show.
    (short, few), (long, more) = clips[:2]
    look = Lookout(tracker, [short, long], [0] * len(few) + [1] * len(more), few + more)
    boxes = [{t: np.array(box) for t, box in boxes.items()} for boxes in few + more]
    with torch.inference_mode():
        logits = [logits for logits, _ in tracker.run(look, boxes, [8] * len(few) + [12] * len(more))]
    assert [len(frame) for frame in logits] == [len(few + more)] * 8 + [len(more)] * 4
    logits = F.interpolate(torch.stack([frame[-len(more):] for frame in logits], 1), (tracker.side, tracker.side), mode="bilinear")
    torch.testing.assert_close(logits, tracker_logits(tracker, long, more), rtol=0, atol=1e-4)


def test_masks_have_the_size_of_the_source(tracker):
    frames, objects = toy_prompts(3)
    wide = Frames(lambda t: frames[t].resize((320, 192)), range(len(frames)))
    stretched = [{t: np.array(box) * (2.5, 1.5, 2.5, 1.5) for t, box in boxes.items()} for boxes in objects]
    masks = tracker.track(wide, stretched)
    assert masks.shape == (len(objects), len(frames), 192, 320) and masks.dtype == bool
    assert tracker.track(wide, []).shape == (0, len(frames), 192, 320)
    assert abs(masks.mean() / tracker.track(frames, objects).mean() - 1) < 0.1


def test_gradients_reach_the_prompt_through_memory(tracker):
    pictures = torch.randn(3, 3, tracker.side, tracker.side, requires_grad=True)
    levels = tracker.encode(pictures)
    run = tracker.run(lambda objects, times: [level[list(times)] for level in levels], [{2: np.array([20, 20, 60, 60])}], [3])
    logits, scores = next(run)                                            # of frame 0, prompted on frame 2
    scores.sum().backward()
    assert pictures.grad[0].any() and pictures.grad[2].any() and not pictures.grad[1].any()


@pytest.mark.parametrize("objects", [[{0: (1, 1, 9, 9)}, {}], [{99: (1, 1, 9, 9)}]])
def test_prompts_off_the_clip_are_refused(tracker, objects):
    frames, _ = toy_prompts(0)
    with pytest.raises(ValueError, match=rf"object {len(objects) - 1} needs boxes on frames 0 to 7"):
        tracker.track(frames, objects)


def test_wrong_files_are_named(tmp_path):
    config, weights = SAM2
    (tmp_path / "bad.yaml").write_text("model: {image_size: 128}")
    torch.save({"model": {"image_encoder.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK torn")
    odd = dict(tensor=torch.zeros(3), scalar=torch.tensor(1.0), numbered={"model": {1: 2}}, listed={"model": [1]})
    for name, content in odd.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for kind, files, words in [
            (FileNotFoundError, ("sam2.1_hiera_xl", weights), "no such SAM2 config: sam2.1_hiera_xl .*sam2.1_hiera_l"),
            (FileNotFoundError, (config, tmp_path / "none.pt"), "no such file of SAM2 weights: .*none.pt"),
            (BadInput, (tmp_path / "bad.yaml", weights), "not a SAM2 config.*bad.yaml"),
            *((BadInput, (config, tmp_path / f"{name}.pt"), f"not the SAM2 weights of config .*{name}.pt")
              for name in ("other", "torn", "tensor", "scalar", "numbered", "listed"))]:
        with pytest.raises(kind, match=words) as caught:
            Tracker.from_pretrained(*files)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a SAM 2.1 model, it differs in: add_tpos_enc"):
        Tracker(build_sam2("configs/sam2/sam2_hiera_t.yaml"))


# ====================================================================================================================
# GRPO and the programs
# ====================================================================================================================

ROOT = Path(__file__).parent

# ------------------------------------------------------------------------------------------------ the algorithm


def test_advantages_by_hand():
    rewards = [1, 2, 3, 6] + [5, 5, 5, 5]                      # means 3 and 5; unbiased std of the first: sqrt(14 / 3)
    std = math.sqrt(14 / 3) + 1e-4
    expected = [-2 / std, -1 / std, 0, 3 / std, 0, 0, 0, 0]
    assert group_advantages(rewards, 4).tolist() == pytest.approx(expected, abs=1e-6)
    assert group_advantages(rewards, 4, scale=False).tolist() == [-2, -1, 0, 3, 0, 0, 0, 0]


def test_equal_rewards_give_no_advantage():
    assert group_advantages([3.3] * 8 + [0.1] * 8, 8).abs().max() < 1e-9


@pytest.mark.parametrize("rewards, size", [([1.0, 2.0], 1), ([1.0, 2.0, 3.0], 2)])
def test_advantages_refuse_groups_of_one_and_broken_groups(rewards, size):
    with pytest.raises(ValueError, match="group"):
        group_advantages(rewards, size)


def test_divergences_by_hand_and_in_expectation():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_divergence(logp, ref, "k1").tolist() == [0.5, -1.0]
    assert kl_divergence(logp, ref, "k2").tolist() == [0.125, 0.5]
    assert kl_divergence(logp, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):                                  # both are unbiased; their mean over p is the divergence
        assert (p * kl_divergence(p.log(), q.log(), kind)).sum() == pytest.approx(float(true), rel=1e-5)


def test_divergence_keeps_its_gradient_far_from_the_reference():
    logp = torch.tensor([-30.0], requires_grad=True)
    kl_divergence(logp, torch.tensor([-1.0]))[0].backward()
    assert logp.grad[0] < -1e9                                 # 1 - exp(29)


def loss_by_loops(logp, A, mask, old, ref, *, beta, clip_low, clip_high, ratio, average, longest):
    """The slow twin: one token at a time."""
    total, n = 0.0, len(A)
    for i in range(n):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        mean_log = np.mean([logp[i, t] - old[i, t] for t in tokens])
        for t in tokens:
            r = math.exp(mean_log if ratio == "sequence" else logp[i, t] - old[i, t])
            gain = min(r * A[i], min(max(r, 1 - clip_low), 1 + clip_high) * A[i])
            d = ref[i, t] - logp[i, t]
            weight = {"completion": 1 / len(tokens) / n, "token": 1 / mask.sum(), "constant": 1 / n / longest}[average]
            total -= weight * (gain - beta * (math.exp(d) - d - 1))
    return total


def random_group(seed=0, G=5, C=7):
    rng = np.random.default_rng(seed)
    old, moved, other = (rng.normal(-1, 0.5, (G, C)) for _ in range(3))
    mask = (np.arange(C) < rng.integers(1, C + 1, G)[:, None]).astype(float)
    return old + 0.3 * moved, rng.normal(size=G), mask, old, other


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("average", ["completion", "token", "constant"])
def test_loss_against_loops(ratio, average):
    group = random_group()
    options = dict(beta=0.04, clip_low=0.2, clip_high=0.28, ratio=ratio, average=average, longest=9)
    loss, _ = policy_loss(*(torch.tensor(x) for x in group), **options)
    assert loss.item() == pytest.approx(loss_by_loops(*group, **options), rel=1e-9)


def test_padding_of_any_value_is_out_of_the_loss():
    logp, A, mask, old, ref = (torch.tensor(x) for x in random_group())
    wild = [torch.where(mask > 0, x, value).requires_grad_() for x, value in ((logp, -200.0), (old, -1.0), (ref, -5.0))]
    loss, sums = policy_loss(wild[0], A, mask, *wild[1:])
    loss.backward()
    assert loss.item() == pytest.approx(policy_loss(logp, A, mask, old, ref)[0].item()) and wild[0].grad.isfinite().all()
    assert sums["kl"].isfinite()


def test_groups_with_totals_add_up_to_the_batch():
    logp, A, mask, old, ref = (torch.tensor(x) for x in random_group())
    for average in ("completion", "token", "constant"):
        options = dict(average=average, longest=9)
        whole, _ = policy_loss(logp, A, mask, old, ref, **options)
        parts = [policy_loss(logp[s], A[s], mask[s], old[s], ref[s], totals=(5, int(mask.sum())), **options)[0] for s in (slice(0, 2), slice(2, 5))]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-9)


def test_first_update_has_ratio_one_and_the_policy_gradient():
    logp, A, mask, _, _ = (torch.tensor(x) for x in random_group())
    logp.requires_grad_()
    loss, sums = policy_loss(logp, A, mask, beta=0.0)
    loss.backward()
    lengths = mask.sum(1, keepdim=True)
    assert torch.allclose(logp.grad, -A[:, None] * mask / lengths / len(A))
    assert loss.item() == pytest.approx(-A.mean().item()) and sums["clipped_low"] == sums["clipped_high"] == 0


def test_clipping_stops_gradients_beyond_the_bounds_only_when_they_would_go_on():
    logp = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]])).requires_grad_()      # ratios, as old_logp is 0
    loss, sums = policy_loss(logp, torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1), torch.zeros(4, 1), beta=0.0,
                             clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert (logp.grad[:, 0] != 0).tolist() == [False, True, True, False]
    assert (sums["clipped_low"], sums["clipped_high"]) == (1, 1)


# ------------------------------------------------------------------------------------------------ the two systems


@pytest.fixture(scope="module")
def systems():
    policy = Thinker.from_pretrained(TOY_POLICY)
    return Systems(policy, policy, Processor(TOY_POLICY), Tracker.from_pretrained(find_config(TOY_SAM2), TOY_SAM2))


def test_shipped_thinker_grounds_visible_things_by_name(systems):
    rng, asked, truth = np.random.default_rng(1), [], []
    for index in range(1000, 1040):
        scene = toy_scene("test", index)
        t = int(rng.integers(len(scene.pictures)))
        for thing, mask in zip(scene.things, scene.masks[:, t]):
            if mask.sum() >= 30:
                asked.append((index, t, thing.name))
                truth.append(mask_box(mask))
    clips = {index: toy_clip("test", index) for index, _, _ in asked}
    boxes = ground(systems.reference, systems.processor, [clips[i] for i, _, _ in asked], [[{t: name}] for _, t, name in asked])
    ious = [box_iou(found[t], [true])[0, 0] if found[t] else 0 for (found,), (_, t, _), true in zip(boxes, asked, truth)]
    assert np.mean(ious) >= 0.8


def test_grounding_asks_equal_questions_once_and_answers_each(systems, monkeypatch):
    clips, asked = [toy_clip("test", 0), toy_clip("test", 1)], []
    generate = systems.reference.generate
    monkeypatch.setattr(systems.reference, "generate", lambda prompts, *a, **k: asked.append(len(prompts)) or generate(prompts, *a, **k))
    chosen = [[{0: "red circle"}, {0: "red circle", 3: "blue circle"}, {}], [{0: "red circle"}, {}, {}]]
    boxes = ground(systems.reference, systems.processor, clips, chosen)
    assert asked == [3] and [[list(found) for found in group] for group in boxes] == [[[0], [0, 3], []], [[0], [], []]]
    assert boxes[0][0][0] == boxes[0][1][0]
    alone = systems.processor.image_inputs(grounding_prompt("blue circle"), clips[0].frames[3])
    (ids,), = generate(systems.reference.embed([alone]), 1, 128, eos_ids=systems.processor.eos_ids, temperature=0.0)
    assert boxes[0][1][3] == parse_boxes(systems.processor.decode(ids))


def test_boxes_are_mapped_back_with_their_own_scale_and_stay_in_the_picture():
    assert to_source((10, 20, 30, 40), (2.0, 3.0), (100, 200)) == (20, 60, 60, 99)
    assert to_source((-5, 0, 1e6, 10), (1.0, 1.0), (100, 200)) == (0, 0, 199, 10)


def test_a_groups_masks_are_those_of_one_call_per_completion(systems):
    clip = toy_clip("test", 2)
    true = [mask_box(m) for m in clip.masks[0]]
    frames = [t for t, box in enumerate(true) if box][:3]
    boxes = [{frames[0]: [tuple(map(float, true[frames[0]]))]}, {t: [tuple(map(float, true[t]))] for t in frames},
             {}, {frames[1]: [(5.0, 5.0, 40.0, 40.0), tuple(map(float, true[frames[1]]))]}]
    together, = track_groups(systems.tracker, [clip], [boxes])
    assert not together[2].any() and together[0].any()
    for found, mask in zip(boxes, together):
        alone = track_groups(systems.tracker, [clip], [[found]])[0][0]
        assert (alone & mask).sum() >= 0.99 * (alone | mask).sum()


def test_collect_follows_the_paper_and_depends_on_nothing_but_clip_and_seed(systems):
    settings = train.read_settings(["--group", "4"])
    clips = [toy_clip("train", i) for i in (3, 4)]
    inputs = [prompt_inputs(systems.processor, clip, np.random.default_rng(seed)) for clip, seed in zip(clips, (11, 12))]
    groups = collect(systems, clips, inputs, [11, 12], settings, Stopwatch())
    (alone,) = collect(systems, clips[1:], inputs[1:], [12], settings, Stopwatch())
    assert alone.texts == groups[1].texts and np.allclose(alone.rewards, groups[1].rewards)
    for group in groups:
        assert len(group.texts) == len(group.terms) == 4 and group.mask.shape == group.completions.shape
        assert group.advantages.sum().abs() < 1e-4
        assert np.allclose(group.rewards, total_rewards(group.terms, group.mask.sum(1).tolist(), settings))
        logp, _ = systems.policy.logprobs(group.prompt, group.completions)
        assert torch.isfinite(logp).all()


@pytest.fixture(scope="module")
def apart(systems):
    """The same with a policy that has moved away from the reference, and one group that they made."""
    policy = Thinker.from_pretrained(TOY_POLICY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.model.layers.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0)
    systems, settings = Systems(policy, systems.reference, systems.processor, systems.tracker), train.read_settings(["--group", "6"])
    clip = toy_clip("train", 3)
    (group,) = collect(systems, [clip], [prompt_inputs(systems.processor, clip, np.random.default_rng(11))], [11], settings, Stopwatch())
    return systems, settings, clip, group


def test_every_completion_is_judged_by_its_own_keyframes_boxes_and_masks(apart):
    systems, settings, clip, group = apart
    chosen = [keyframes(parse_moments(text, len(clip.frames), clip.fps)) for text in group.texts]
    assert len({tuple(frames.items()) for frames in chosen}) > 2
    for text, frames, terms in zip(group.texts, chosen, group.terms):
        ((boxes,),) = ground(systems.reference, systems.processor, [clip], [[frames]])
        ((tracked,),) = track_groups(systems.tracker, [clip], [[boxes]])
        expected = vos_rewards(text, clip.masks, boxes, tracked, clip.fps)
        assert terms["consistency"] == pytest.approx(expected.pop("consistency"), abs=0.02)      # masks to a few pixels
        assert {k: terms[k] for k in expected} == pytest.approx(expected)


def test_divergence_is_from_the_reference_and_skipped_groups_teach_nothing(apart):
    systems, settings, _, group = apart
    sums = accumulate_gradients(systems, group, settings, (6, int(group.mask.sum())), 1.0, True, True)
    with torch.no_grad():
        (logp, _), (ref, _) = (m.logprobs(group.prompt, group.completions) for m in (systems.policy, systems.reference))
    expected = ((torch.exp(ref - logp) - (ref - logp) - 1) * group.mask).sum().item()
    assert sums["kl"].item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert torch.allclose(group.old_logp, logp, atol=1e-5)
    gradients = [p.grad for p in systems.policy.parameters() if p.grad is not None]
    assert max(g.abs().max() for g in gradients) > 1e-4
    systems.policy.zero_grad()
    equal = replace(group, rewards=np.ones(6), advantages=torch.ones(6))
    accumulate_gradients(systems, equal, replace(settings, skip_equal=True), (6, int(group.mask.sum())), 1.0, True, False)
    assert all(p.grad is None or not p.grad.any() for p in systems.policy.parameters())


def test_length_control_pays_only_where_it_is_asked_for():
    terms = [dict.fromkeys(TERMS, 0.0) | dict(base=1.0, format=1.0, malformed=0.0)] * 3
    plain = train.read_settings([])
    assert total_rewards(terms, [10, 400, 900], plain).tolist() == [2, 2, 2]
    assert total_rewards(terms, [10, 400, 900], replace(plain, length_control=True)).tolist() == [2, 3, 2]


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    settings = train.read_settings(["--steps", "10", "--warmup", "2"])
    factors = [train.schedule(step, settings) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[6] == pytest.approx(0.5) and 0 < factors[9] < 0.05
    assert factors[2:] == sorted(factors[2:], reverse=True)


def numbers(task, count, start=0):
    """A source whose items are numbers and whose clips are named after them."""
    picture = Frames([Image.new("RGB", (8, 8))].__getitem__, [0])
    truth = dict(type="free-form", options=[], solution="")
    return Source(task, range(start, start + count), lambda item, rng: Clip(str(item), picture, str(rng.integers(9)), task=task, truth=truth))


def drawn(sources, steps, settings, world=1, start=0):
    """Names, tasks, queries and seeds of each step's clips, over all processes."""
    processor = SimpleNamespace(video_inputs=lambda *_: None, image_inputs=lambda *_: None)
    found = [[] for _ in range(steps)]
    for rank in range(world):
        loader = train.sample_loader(sources, processor, replace(settings, steps=steps), start, rank, world)
        for i, (clip, _, seed) in enumerate(loader, start * settings.batch * settings.accumulate // world):
            found[i * world // (settings.batch * settings.accumulate)].append((clip.name, clip.task, clip.query, seed))
    return [sorted(step) for step in found]


def test_an_epoch_draws_every_clip_once_whatever_the_number_of_processes():
    settings = train.read_settings(["--batch", "4", "--seed", "5", "--workers", "0"])
    sources = (numbers("vos", 24),)
    steps = drawn(sources, 12, settings)
    assert steps == drawn(sources, 12, replace(settings, workers=3))
    assert steps[5:] == drawn(sources, 12, settings, start=5)[5:]                                        # a run continued
    first, second = ([name for step in steps[a:a + 6] for name, *_ in step] for a in (0, 6))
    assert sorted(first) == sorted(second) == sorted(map(str, range(24))) and first != second
    assert len({seed for step in steps for *_, seed in step}) == 48
    assert steps == drawn(sources, 12, settings, world=2)
    assert [sorted(a + b) for a, b in zip(steps[:6:2], steps[1:6:2])] == drawn(sources, 3, replace(settings, batch=2, accumulate=4)) \
        == drawn(sources, 3, replace(settings, batch=8))


def test_a_step_is_of_one_task_and_an_epoch_of_several_leaves_nothing_out():
    settings = train.read_settings(["--batch", "4", "--workers", "0"])
    sources = (numbers("vos", 7), numbers("avs", 3, 100), numbers("vos", 4, 200), numbers("qa", 9, 300))
    assert epoch_length(sources, 4) == 3 + 1 + 3
    steps = drawn(sources, 7, settings)
    assert all(len({task for _, task, *_ in step}) == 1 for step in steps)
    names = [name for step in steps for name, *_ in step]
    assert set(names) == {str(i) for source in sources for i in source.items} and len(names) == 28        # 5 of 23 fill up
    assert [step[0][1] for step in steps] != [step[0][1] for step in drawn(sources, 14, settings)[7:]]


# ------------------------------------------------------------------------------------------------ the programs


def run(program, *arguments, processes=0):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29611"] if processes else []
    command = [sys.executable, *launcher, ROOT / program, "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def data_root(minis):
    """A data root with miniatures of all that can be trained on without pyarrow."""
    return {name: minis(name) for name in ("revos", "mevis", "refavs", "video_r1")}["revos"].parent


def train_here(tmp_path, monkeypatch, *arguments):
    """The rows of a run's log."""
    monkeypatch.chdir(tmp_path)
    train.main([*map(str, arguments), "--name", "here", "--group", "2", "--max_new_tokens", "24", "--device", "cpu", "--threads", "1"])
    return [json.loads(line) for line in open(tmp_path / "out/here/metrics.jsonl")]


def test_training_mixes_tasks_a_step_of_each(data_root, tmp_path, monkeypatch):
    rows = train_here(tmp_path, monkeypatch, "--data", "revos,mevis,refavs,video_r1", "--data_root", data_root, "--batch", 4, "--steps", 6)
    steps = {"base": 1, "first_box": 2, "accuracy": 3}                   # 4 videos, 8 expressions of Ref-AVS, 10 questions
    assert {term: sum(term in row for row in rows) for term in steps} == steps and not any(row["broken"] for row in rows)
    assert all(sum(term in row for term in steps) == 1 and "format" in row for row in rows)
    assert (tmp_path / "out/here/policy/model.safetensors").exists()


def test_a_dataset_may_lie_elsewhere_and_what_is_left_out_is_listed(copy, tmp_path, monkeypatch, capsys):
    root = copy("revos").rename(tmp_path / "elsewhere")
    meta = json.loads((root / "meta_expressions_train_.json").read_text())
    for expression in next(iter(meta["videos"].values()))["expressions"].values():
        expression["anno_id"] = []
    (root / "meta_expressions_train_.json").write_text(json.dumps(meta))
    rows = train_here(tmp_path, monkeypatch, "--data", "revos", "--revos_root", root, "--batch", 1, "--steps", 1)
    left = (tmp_path / "out/here/left_out.txt").read_text().splitlines()
    assert rows[0]["broken"] == 0 and len(left) > 3 and all("names no object" in line for line in left)
    assert f"{len(left)} samples are left out" in capsys.readouterr().out


def test_what_cannot_be_read_is_named_and_counts_for_nothing(copy, tmp_path, monkeypatch, capsys):
    root = copy("revos")
    broken = next((root / "JPEGImages/OVIS/train").glob("train-*"))
    (broken / "img_0000003.jpg").write_bytes(b"no picture")
    options = ["--data", "revos", "--data_root", root.parent, "--batch", 2, "--steps", 1, "--lr", 0.1]
    row, = train_here(tmp_path, monkeypatch, *options)
    assert row["broken"] == 1 and "img_0000003.jpg" in capsys.readouterr().err
    done = run("train.py", *options, "--name", "two", "--group", 2, "--max_new_tokens", 24, "--threads", 1, processes=2)
    assert done.returncode == 0 and "img_0000003.jpg" in done.stderr     # one process has nothing to learn from
    two = json.loads((tmp_path / "out/two/metrics.jsonl").read_text())
    assert {k: row[k] for k in ("broken", "reward", "kl")} == pytest.approx({k: two[k] for k in ("broken", "reward", "kl")}, rel=1e-3)


def test_tasks_other_than_masks_are_rewarded_as_their_papers_say():
    masks = np.zeros((1, 3, 20, 20), bool)
    masks[0, 0, 5:10, 5:15] = True
    clip = Clip("", None, "", masks=masks, task="avs")
    terms = reward_terms(clip, (1, 1), said().replace("[]", "a dog"), {0: [(5, 5, 14, 7), (0, 0, 1, 1)]}, None)
    assert terms == dict(first_box=30 / 50, format=1.0, malformed=0.0)
    assert reward_terms(clip, (1, 1), said().replace("[]", "null"), {}, None)["first_box"] == 0
    assert reward_terms(replace(clip, masks=masks & False), (1, 1), said().replace("[]", "null"), {}, None)["first_box"] == 1
    assert frames_to_ground(clip, said().replace("[]", "a dog")) == {0: "a dog"} and frames_to_ground(clip, said()[:-9]) == {}
    picture = Clip("", None, "", masks=masks, task="image", truth=dict(box=TRUE_BOX, points=TRUE_POINTS))
    half = '{"bbox_2d": [50, 50, 99.5, 99.5], "points_1": [60, 75], "points_2": [90, 75]}'         # at half the size
    terms = reward_terms(picture, (2, 2), said().replace("[]", half), {}, None)
    assert terms["iou"] == pytest.approx(1.4, abs=0.05) and terms["box"] == terms["point"] == terms["strict"] == terms["format"] == 1
    assert total_rewards([terms], [9], train.read_settings([])) == pytest.approx(terms["iou"] + 4)


@pytest.mark.parametrize("kind, answer, true, expected", [
    ("multiple choice", "B", "B", 1), ("multiple choice", "B.", "B", 0), ("numerical", "1,000.5", "1000.50", 1), ("numerical", "3", "3.0", 0),
    ("numerical", "2.004", "2.00", 1), ("numerical", "nan", "nan", 0), ("numerical", "three", "3", 0), ("regression", "9", "10", 0.9),
    ("regression", "-5", "10", 0), ("regression", "inf", "10", 0), ("OCR", "the cat sat", "the cat sits", 2 / 3), ("OCR", "a b c d", "x", 0),
    ("OCR", "cat", "the cat sat", 1 / 3), ("free-form", "a cat sat on a mat", "The cat sat on the mat.", (2 / 3 + 2 / 5 + 2 / 3) / 3),
    ("free-form", "", "word", 0), ("free-form", "mat the on", "on the mat", (1 + 0 + 1 / 3) / 3)])
def test_questions_by_hand(kind, answer, true, expected):
    for solution in (true, f"<answer>{true}</answer>"):
        assert question_reward(kind, f"<think>x</think><answer>{answer}</answer>", solution) == pytest.approx(expected, abs=1e-6)
    assert question_reward(kind, answer, true) == 0                      # no answer tags
    assert 0 <= question_reward(kind, f"<answer>{answer * 100_000}</answer>", true) <= 1


def evaluate_here(out, *arguments):
    evaluation.main(["--max_new_tokens", "48", "--device", "cpu", *map(str, arguments), "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def test_an_evaluation_goes_on_where_it_was_cut_off_and_scores_what_others_predicted(data_root, tmp_path):
    common = ["--bench", "revos", "--data_root", data_root, "--limit", 5]
    whole = evaluate_here(tmp_path / "a", *common, "--batch", 2)
    assert len(whole["expressions"]) == 5 and whole["missing"] == 0
    answers = (tmp_path / "a/answers-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in answers] == [row["name"] for row in whole["expressions"]]
    sample = open_real("revos", "valid", data_root / "revos")[2]
    shutil.rmtree(prediction_folder(tmp_path / "a", sample))
    again = evaluate_here(tmp_path / "a", *common)
    assert again["summary"] == whole["summary"]
    assert json.loads((tmp_path / "a/answers-0.jsonl").read_text().splitlines()[5])["name"] == sample.name
    others = evaluate_here(tmp_path / "b", *common, "--predictions", tmp_path / "a")
    assert others["summary"] == whole["summary"]
    shutil.rmtree(prediction_folder(tmp_path / "a", sample))
    assert evaluate_here(tmp_path / "b", *common, "--predictions", tmp_path / "a")["missing"] == 1


def test_predictions_of_another_run_are_not_taken_for_ones_own(data_root, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            evaluate_here(out, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err
    out, policy = tmp_path / "out", tmp_path / "policy"
    shutil.copytree(TOY_POLICY, policy)
    common = ["--bench", "revos", "--data_root", data_root, "--limit", 2, "--policy", policy]
    assert "nowhere" in refused(*common[:-1], "nowhere") and "nobody" in refused(*common, "--system2", "reference", "nobody")
    evaluate_here(out, *common)                                          # those left no claim
    assert "already there" not in capsys.readouterr().out
    evaluate_here(out, *common[:-3], 3, *common[-2:])
    assert "2 of 3 expressions were already there" in capsys.readouterr().out
    for arguments, named in (
            (["--bench", "mevis"], "bench revos, not mevis"), (["--policy", TOY_POLICY], f"policy {policy}, not "),
            (["--split", "train"], "split valid, not train"), (["--max_new_tokens", 7], "max_new_tokens 48, not 7"),
            (["--system2", "reference", policy], "system2 ['policy'], not "), (["--sam2_weights", policy], "sam2_weights ")):
        assert named in (error := refused(*common, *arguments)) and str(out) in error
    root = shutil.copytree(data_root / "revos", tmp_path / "revos")
    assert f"data {data_root / 'revos'}, not {root}" in refused(*common, "--revos_root", root)
    weights = policy / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))            # trained again
    assert "policy_weights" in refused(*common)


@pytest.mark.parametrize("bench", ["mevis", "refytvos"])
def test_exports_count_what_is_missing_and_pack_what_is_hidden(bench, minis, tmp_path, capsys):
    split = {"mevis": "valid_u,valid", "refytvos": "valid"}[bench]
    hidden = open_real(bench, "valid", minis(bench))
    public = open_real(bench, "valid_u", minis(bench)) if bench == "mevis" else []
    for sample in public + hidden[1:]:
        write_prediction(tmp_path / "theirs", sample, np.zeros((len(sample.names), CANVAS, CANVAS), bool))
    Path(prediction_folder(tmp_path / "theirs", hidden[1]), f"{hidden[1].names[3]}.png").unlink()
    common = ["--bench", bench, "--split", split, "--data_root", minis(bench).parent, "--predictions", tmp_path / "theirs", "--zip"]
    results, printed = evaluate_here(tmp_path / "out", *common), capsys.readouterr().out
    assert f"no prediction: 2 of {len(hidden)}" in printed and results["hidden"] == dict(expressions=len(hidden), missing=2)
    assert len(results.get("expressions", [])) == len(public) and "partial" not in printed
    with zipfile.ZipFile(tmp_path / f"out/{bench}.zip") as archive:
        assert len(archive.namelist()) == sum(len(sample.names) for sample in hidden[1:]) - 1
    assert not list((tmp_path / "theirs").rglob("*.zip"))
    evaluate_here(tmp_path / "out", *common, "--limit", len(public) + 2)
    assert f"(partial: --limit {len(public) + 2}, of {len(public + hidden)} expressions)" in capsys.readouterr().out


def test_predicting_refdavis_writes_the_official_folders(minis, tmp_path):
    samples = open_real("refdavis", "valid", minis("refdavis"))[:4]
    evaluate_here(tmp_path, "--bench", "refdavis", "--data_root", minis("refdavis").parent, "--limit", 4)
    for k, sample in enumerate(samples):
        labels = [np.array(Image.open(tmp_path / f"anno_{k}" / sample.video / f"{name}.png")) for name in sample.names]
        assert np.array_equal(np.array(labels), read_prediction(tmp_path, sample, (CANVAS, CANVAS)))


def test_processes_share_an_evaluation(data_root, tmp_path):
    common = ["--bench", "refavs", "--split", "test_s,test_n", "--data_root", data_root, "--max_new_tokens", 48, "--device", "cpu"]
    done = run("eval.py", *common, "--out", tmp_path / "two", "--zip", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = json.loads((tmp_path / "two/results.json").read_text()), evaluate_here(tmp_path / "one", *common[:-4])
    assert two["summary"] == one["summary"] and two["subsets"]["null"]["expressions"] > 0
    assert (tmp_path / "two/refavs.zip").exists() and (tmp_path / "two/answers-1.jsonl").exists()


def test_a_video_that_cannot_be_read_is_named_and_has_no_prediction(copy, tmp_path, capsys):
    root = copy("mevis")
    video = next((root / "valid_u/JPEGImages").iterdir())
    next(video.iterdir()).write_bytes(b"")
    found = evaluate_here(tmp_path / "out", "--bench", "mevis", "--data_root", root.parent)
    here = [row for row in found["expressions"] if f"/{video.name}/" in row["name"]]
    assert all(row["problem"] and row["J"] == 0 for row in here) and len(found["broken"]) + found["missing"] == len(here) > 0
    assert f"no prediction for {here[0]['name']}" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["refcoco", "reasonseg"])
def test_pictures_are_asked_for_a_box(bench, minis, tmp_path):
    found = evaluate_here(tmp_path, "--bench", bench, "--data_root", minis(bench).parent, "--limit", 2)
    assert len(found["expressions"]) == 2 and found["missing"] == 0
    line = json.loads((tmp_path / "answers-0.jsonl").read_text().splitlines()[0])
    assert line["keyframes"] == {}


def test_two_processes_update_as_one(tmp_path, monkeypatch):
    common = "train.py --steps 1 --batch 2 --group 4 --threads 1 --updates 2 --average token".split()
    rows = {}
    for name, processes in (("one", 0), ("two", 2)):
        monkeypatch.chdir(tmp_path)
        done = run(*common, "--name", name, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[name] = [json.loads(line) for line in open(tmp_path / f"out/{name}/metrics.jsonl")]
    for one, two in zip(rows["one"], rows["two"]):
        for key in ("reward", "loss", "kl", "entropy", "gradient_norm", "length", "tokens"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key
    one, two = (load_file(tmp_path / f"out/{name}/policy/model.safetensors") for name in ("one", "two"))
    start = load_file(Path(TOY_POLICY) / "model.safetensors")
    assert any((one[k] - start[k].float()).abs().max() > 1e-4 for k in one)                       # it did learn something
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    assert (tmp_path / "out/two/curves.png").stat().st_size > 1000


def test_without_a_learning_rate_nothing_is_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/run/step-000007").mkdir(parents=True)
    (tmp_path / "out/run/metrics.jsonl").write_text("old\n")
    done = run("train.py", "--steps", "1", "--batch", "2", "--group", "2", "--lr", "0", "--threads", "1", "--overwrite", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "out/run/step-000007").exists()
    after, before = (load_file(Path(p) / "model.safetensors") for p in (tmp_path / "out/run/policy", TOY_POLICY))
    assert all(torch.equal(after[k], before[k].float()) for k in before)
    (row,) = (json.loads(line) for line in open(tmp_path / "out/run/metrics.jsonl"))
    assert {"base", "number", "length", "overlap", "saliency", "alignment", "mismatch", "consistency", "format", "malformed", "reward",
            "equal_groups", "kl", "entropy", "clipped_low", "clipped_high", "seconds", "memory_gb"} <= set(row)


OUT_OF_LIMITS = dict(
    **dict.fromkeys(("steps", "batch", "accumulate", "updates", "max_new_tokens", "save_every", "keep", "plot_every", "prompt_tokens"),
                    [0]),
    nproc=["0", "", "1,", "8;"],
    **dict.fromkeys(("seed", "warmup", "top_k", "lora_rank", "threads", "workers", "validate"), [-1]),
    **dict.fromkeys(("lr", "weight_decay", "beta", "clip_high"), [-0.1, math.inf, math.nan]),
    **dict.fromkeys(("keyframe", "saliency", "alignment", "consistency"), [-math.inf, math.nan]),
    **dict.fromkeys(("temperature", "clip_norm", "timeout_minutes"), [0.0, math.inf, math.nan]),
    group=[1], top_p=[0.0, 1.1, math.nan], clip_low=[-0.1, 1.1, math.nan], name=["", ".", "..", "a/b", "/a", "a/"],
    device=["tpu", "cuda:1", *["cuda"] * (not torch.cuda.is_available())])


@pytest.mark.parametrize("arguments, named", [
    (["train.py", "--learning_rate", "1"], "--learning_rate"), (["train.py", "--lr", "fast"], "fast"),
    (["train.py", "--policy", "nowhere"], "nowhere"), (["train.py", "--sam2_weights", "nowhere.pt"], "nowhere"),
    (["train.py", "--data", "coco"], "coco"), (["train.py", "--kl", "k4"], "k4"),
    (["train.py", "--name", "earlier", "--resume", "never"], "out/earlier/metrics.jsonl"),
    (["train.py", "--name", "own", "--policy", "out/own/step-000100"], "out/own"),
    *((["train.py", f"--{name}={value}"], f"--{name} {value}: must be ")
      for name, values in OUT_OF_LIMITS.items() for value in values),
    *((["train.py", "--policy", name], f"{name}/training.json") for name in ("listed", "torn", "unknown", "typed", "chosen")),
    (["train.py", "--policy", "limited"], "--group 1: must be "),
    (["eval.py", "--bench", "coco"], "coco"), (["eval.py", "--system2", "somebody"], "somebody"),
    *(([*"eval.py --bench toy --policy nowhere".split(), *flag], flag[0]) for flag in (
        ["--predictions", "a"], ["--limit", "2"], ["--zip"], ["--data_root", "a"], ["--revos_root", "a"])),
    *((["eval.py", "--bench", "revos", flag, "3"], flag) for flag in ("--clips", "--against")),
    (["eval.py", "--bench", "revos", "--data_root", "nowhere"], "nowhere"), (["train.py", "--data", "revos", "--data_root", "nowhere"], "nowhere"),
    (["train.py", "--data", "refdavis"], "--data refdavis: refdavis is nothing to train on (known: toy, revos, mevis, refavs, ref"),
    (["train.py", "--data", "toy,"], "--data toy,: an empty name is nothing to train on"),
    *(([program, "--policy", "out"], "expected a directory of Qwen2.5-Omni") for program in ("train.py", "eval.py", "segment.py")),
    (["eval.py", "--policy", "nowhere"], "nowhere"),
    *((line.split(), line.split()[1]) for line in (
        "eval.py --clips 0", "eval.py --batch -1", "eval.py --max_new_tokens many", "eval.py --device tpu",
        "segment.py --index -1", "segment.py --max_new_tokens 0", "segment.py --device tpu")),
    *((["eval.py", "--clips", "2", "--policy", "nowhere", "--against", name], name)
      for name in ("listed/training.json", "torn/training.json", "other.json", "scoreless.json", "nowhere.json")),
    (["eval.py", "--policy", "nowhere", "--out", "here", "--against", "here/results.json"], "here/results.json"),
    (["eval.py", "--policy", "nowhere", "--out", "other.json"], "other.json"),
    (["segment.py", "--sound", "a.wav"], "--sound"), (["segment.py", "--video", "a.avi"], "--query"),
    (["segment.py", "--video", "a.avi", "--query", "a", "--sound", "a.avi"], "no sound in: a.avi"),
    (["segment.py", "--video", "two\nlines.mp4", "--query", "a"], "two lines.mp4"),
    (["segment.py", "--video", "nowhere.mp4", "--query", "a"], "nowhere.mp4")])
def test_programs_name_what_is_wrong_in_one_line(arguments, named, broken_world, monkeypatch, capsys):
    monkeypatch.chdir(broken_world)
    program = {"train.py": train.main, "eval.py": evaluation.main, "segment.py": segment_main}[arguments[0]]
    with pytest.raises(SystemExit) as stop:
        program(arguments[1:])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in line and line.startswith("error: ")


@pytest.fixture(scope="module")
def broken_world(tmp_path_factory):
    """A folder of what can be wrong."""
    path = tmp_path_factory.mktemp("broken")
    (path / "out/earlier").mkdir(parents=True)
    (path / "out/earlier/metrics.jsonl").touch()
    advised = dict(listed="[1]", torn='{"lr": ', unknown='{"learning_rate": 1}', typed='{"steps": 4.5}', chosen='{"kl": "k4"}',
                   limited='{"group": 1}')
    for name, advice in advised.items():
        (path / name).mkdir()
        (path / name / "training.json").write_text(advice)
    (path / "other.json").write_text('{"clips": [{"clip": "test/0", "J&F": 0.5}]}')
    (path / "scoreless.json").write_text('{"clips": [{"clip": "test/0", "J&F": "high"}, {"clip": "test/1"}]}')
    write_avi(path / "a.avi", (48, 32), [jpeg(Image.new("RGB", (48, 32)))] * 3, 5)
    return path


def test_every_number_has_limits_and_advice_yields_to_the_command_line(tmp_path):
    numbers = {f.name for f in train.dataclasses.fields(train.Settings) if f.type in (int, float)}
    assert numbers <= set(train.LIMITS) == set(OUT_OF_LIMITS)
    (tmp_path / "training.json").write_text('{"lr": 1, "steps": "7", "skip_equal": true, "group": 1}')
    settings = train.read_settings(["--policy", str(tmp_path), "--group", "2"])
    assert (settings.lr, settings.steps, settings.skip_equal, settings.group) == (1.0, 7, True, 2)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in (evaluation, sys.modules["segment"], train):
        monkeypatch.setattr(program, "Processor", lambda path: (_ for _ in ()).throw(ValueError("bug")))
        with pytest.raises(ValueError, match="bug"):
            program.main(["--device", "cpu"])


def test_a_run_stops_after_some_steps_in_a_row_without_a_finite_gradient(tmp_path, monkeypatch):
    norms = itertools.chain([math.nan, 1.0], itertools.repeat(math.nan))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    monkeypatch.setattr(train, "PATIENCE", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="step 1: ") as stop:
        train.main("--device cpu --steps 9 --batch 1 --group 2 --max_new_tokens 2 --updates 3 --beta 0 --consistency 0".split())
    assert "\n" not in stop.value.code
    assert [json.loads(line)["skipped"] for line in open("out/run/metrics.jsonl")] == [2, 3]


def test_weights_are_sharded_where_they_are_told(monkeypatch):
    meshes = []
    monkeypatch.setattr(train, "fully_shard", lambda module, *, mesh, **_: meshes.append(mesh.device_type))
    try:
        train.shard(Thinker(tiny_config()), torch.float32, train.start_processes("cpu")[2])
    finally:
        torch.distributed.destroy_process_group()
    assert len(meshes) > 1 and set(meshes) == {"cpu"}


def segment_main(arguments):
    import segment
    segment.main(arguments)


def test_segment_writes_masks_at_the_videos_own_size(tmp_path):
    clip = toy_clip("test", 5)
    (tmp_path / "frames").mkdir()
    for t in range(len(clip.frames)):
        clip.frames[t].resize((200, 150)).save(tmp_path / "frames" / f"{t}.png".zfill(9))
    (tmp_path / "out/masks").mkdir(parents=True)
    (tmp_path / "out/masks/00099.png").touch()                 # of an earlier, longer clip
    segment_main(["--device", "cpu", "--video", str(tmp_path / "frames"), "--query", clip.query, "--out", str(tmp_path / "out")])
    answer = json.loads((tmp_path / "out/answer.json").read_text())
    assert {"reasoning", "answer", "keyframes", "query"} <= set(answer)
    from PIL import Image
    masks = sorted((tmp_path / "out/masks").iterdir())
    assert len(masks) == len(clip.frames) and Image.open(masks[0]).size == (200, 150)
    assert Image.open(tmp_path / "out/overlay.webp").n_frames > 1


def test_evaluation_scores_as_the_metrics_say(systems, tmp_path):
    clips = [toy_clip("test", i) for i in range(3)]
    found = segment(systems.policy, systems.policy, systems.processor, systems.tracker, clips, 64)
    evaluation.main(["--clips", "3", "--out", str(tmp_path), "--max_new_tokens", "64", "--device", "cpu"])
    report = json.loads((tmp_path / "results.json").read_text())
    for clip, (text, chosen, boxes, masks), row in zip(clips, found, report["clips"]):
        true = clip.masks.any(0)
        J = [1.0 if not (m | t).any() else (m & t).sum() / (m | t).sum() for m, t in zip(masks, true)]
        assert row["text"] == text and row["J"] == pytest.approx(np.mean(J)) and row["keyframes"] == list(chosen)
        if true.any() and chosen:
            assert row["visible"] == pytest.approx(np.mean([true[t].any() for t in chosen]))
    assert report["summary"]["overall"]["J"] == pytest.approx(np.mean([r["J"] for r in report["clips"]]))


def test_paired_difference_by_hand():
    rows = [dict(clip=str(i), **{"J&F": v}) for i, v in enumerate((0.5, 0.7, 0.9))]
    others = [dict(clip=str(i), **{"J&F": v}) for i, v in enumerate((0.4, 0.4, 0.4))]
    mean, half = evaluation.paired_difference(rows, others)
    assert mean == pytest.approx(0.3) and half == pytest.approx(1.96 * 0.2 / math.sqrt(3))
    with pytest.raises(BadInput, match="same clips"):
        evaluation.paired_difference(rows, others[:2])
    assert evaluation.paired_difference(rows[:1], others[:1]) == (pytest.approx(0.1), None)


def test_results_are_written_before_they_are_compared(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text('{"clips": [{"clip": "test/0", "J&F": 0.5}]}')
    monkeypatch.chdir(tmp_path)
    arguments = "--clips 1 --max_new_tokens 2 --device cpu --out . --against other.json".split()
    evaluation.main(arguments)
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)        # no NaN
    assert written["against"]["half_interval"] is None and "+-" not in capsys.readouterr().out
    (tmp_path / "results.json").unlink()
    monkeypatch.setattr(evaluation, "paired_difference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.main(arguments)
    assert len(json.loads((tmp_path / "results.json").read_text())["clips"]) == 1


# ====================================================================================================================
# many processes, nothing lost
# ====================================================================================================================

TINY = ("--device cpu --threads 1 --workers 0 --dtype float32 --batch 2 --updates 1 --group 2 --max_new_tokens 16 "
        "--consistency 0").split()


@pytest.fixture(scope="module")
def server():
    """Starts processes that have everything imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_all"])
        context.Process(target=int).start()
        return context


def trainer(rank, world, nodes, folder, runs, setup):
    """One training process as torchrun would start it, for one run after another; what it prints goes to FOLDER/RANK.txt.
    runs: [(port, arguments)]."""
    os.chdir(folder)
    printed = os.open(f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1), os.dup2(printed, 2)
    train.plot = nothing_else                                  # takes longer than a step
    setup(rank)
    for port, arguments in runs:
        if world > 1:
            local = world // nodes
            torchrun = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % local, LOCAL_WORLD_SIZE=local, MASTER_PORT=port)
            os.environ.update({k: str(v) for k, v in torchrun.items()}, MASTER_ADDR="127.0.0.1")
        train.main(arguments)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nothing_else(_):
    pass


def start(server, folder, *runs, world=1, nodes=1, setup=nothing_else):
    """Processes that train: runs are strings of settings, beside TINY."""
    runs = [(free_port(), [*TINY, *arguments.split()]) for arguments in runs]
    processes = [server.Process(target=trainer, args=(rank, world, nodes, folder, runs, setup), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes, codes=None, seconds=120):
    for process in processes:
        process.join(seconds)
    assert [process.exitcode for process in processes] == (codes or [0] * len(processes))


def outcome(folder, name):
    """(rows of the log without what differs from run to run, bytes of the trained weights)."""
    rows = [json.loads(line) for line in open(folder / f"out/{name}/metrics.jsonl")]
    assert [row["step"] for row in rows] == list(range(len(rows)))                     # no gaps, no doubled steps
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "speed", "memory_gb")} for row in rows]
    return rows, (folder / f"out/{name}/policy/model.safetensors").read_bytes()


def wait_for(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def log_lines(folder, name):
    log = folder / f"out/{name}/metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def same_training(folder, one, other, start=TOY_POLICY, tolerance=1e-4):
    """Whether two runs were the same up to the order of summation: every number of the log, and how the weights moved."""
    rows, others = outcome(folder, one)[0], outcome(folder, other)[0]
    for a, b in zip(rows, others, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=2e-5)
    start, one, other = (load_file(Path(path) / "model.safetensors") for path in (
        start, folder / f"out/{one}/policy", folder / f"out/{other}/policy"))
    moved, apart = (math.sqrt(sum(((a[k].double() - b[k].double()) ** 2).sum() for k in start)) for a, b in ((one, start), (one, other)))
    assert moved > 0 and apart < 10 * tolerance * moved, (moved, apart)


def as_restarted(_):
    """torchrun starts killed workers again as they were started first, and says so."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


SIX = "--steps 6 --save_every 3 --name"


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A folder with six steps at one go, by 1 process (out/straight1) and by 2 (out/straight2)."""
    folder = tmp_path_factory.mktemp("straight")
    for world in (1, 2):
        finish(start(server, folder, f"{SIX} straight{world}", world=world))
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_three_steps_a_kill_and_three_more_are_six_steps_bit_for_bit(server, straight, world):
    processes = start(server, straight, f"{SIX} killed{world}", world=world)
    wait_for(lambda: log_lines(straight, f"killed{world}") > 4)
    kill(processes)
    assert not (straight / f"out/killed{world}/policy").exists()
    finish(start(server, straight, f"{SIX} killed{world} --overwrite true", world=world, setup=as_restarted))
    assert "continues at step 3 from out/killed" in (straight / "0.txt").read_text()
    assert outcome(straight, f"killed{world}") == outcome(straight, f"straight{world}")
    same_training(straight, "straight1", f"killed{world}")


def test_told_to_end_a_run_saves_and_goes_on_with_another_number_of_processes(server, straight):
    processes = start(server, straight, "--steps 6 --name told", world=2)
    wait_for(lambda: log_lines(straight, "told") > 1)
    os.kill(processes[1].pid, signal.SIGTERM)                  # one of them is enough
    finish(processes)
    done = log_lines(straight, "told")
    assert 2 <= done < 6 and f"{done} steps are done and saved in out/told/step-{done:06d}" in (straight / "0.txt").read_text()
    finish(start(server, straight, "--steps 6 --name told"))
    same_training(straight, "straight1", "told")


def die_while_saving(rank):
    """Dies in the middle of the second checkpoint, the state written, the rest of it not yet under its name."""
    whole, times = train.dcp.save, itertools.count(1)

    def save(*arguments, **more):
        whole(*arguments, **more)
        if next(times) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    train.dcp.save = save


def test_a_run_killed_at_any_moment_goes_on_from_a_complete_checkpoint(server, straight):
    finish(start(server, straight, "--steps 6 --save_every 1 --name moments", setup=die_while_saving), [-signal.SIGKILL])
    assert (straight / "out/moments/step-000002.partial").exists()
    processes = start(server, straight, "--steps 6 --save_every 1 --name moments")
    wait_for(lambda: (straight / "out/moments/step-000003").exists())
    time.sleep(random.random())
    kill(processes)
    finish(start(server, straight, "--steps 6 --save_every 1 --name moments"))
    assert sorted(path.name for path in (straight / "out/moments").glob("step-*")) == ["step-000005", "step-000006"]     # kept: 2
    assert outcome(straight, "moments") == outcome(straight, "straight1")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_twenty_random_moments(server, straight, world):
    settings, name, kills, partial = "--steps 6 --save_every 1 --name", f"twenty{world}", 0, 0
    rng = random.Random(world)
    while kills < 20:
        processes = start(server, straight, f"{settings} {name}", world=world)
        processes[0].join(rng.uniform(1.5, 6.0))
        if processes[0].exitcode == 0:                         # it got to the end: once more from the start
            finish(processes)
            assert outcome(straight, name) == outcome(straight, f"straight{world}")
            shutil.rmtree(straight / f"out/{name}")
            continue
        kill(processes)
        kills += 1
        partial += any((straight / f"out/{name}").glob("*.partial"))
    finish(start(server, straight, f"{settings} {name}", world=world))
    assert outcome(straight, name) == outcome(straight, f"straight{world}")
    print(f"{partial} of 20 kills fell into the writing of a checkpoint")


def small_files(rank):
    """The last process's files may not grow beyond 2 MB, as if its disk were full."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


@pytest.mark.parametrize("limit", [2_000_000, pytest.param(7_000_000, marks=pytest.mark.slow)])        # for both files, for the state only
def test_a_full_disk_leaves_the_old_checkpoint(limit, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot", nothing_else)
    once = [*TINY, "--batch", "1", "--name", "full", "--save_every", "1", "--steps"]
    train.main([*once, "1"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            train.main([*once, "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = re.findall("error: .*", capfd.readouterr().err)
    assert stop.value.code == 1 and re.search("cannot save out/full/step-000002, where .* GB are free: ", line)
    assert {path.name for path in (tmp_path / "out/full").iterdir() if path.is_dir()} - {"phases"} == {"policy", "step-000001"}
    train.main([*once, "2"])
    assert "continues at step 1 from out/full/step-000001" in capfd.readouterr().out and len(outcome(tmp_path, "full")[0]) == 2


def test_one_full_disk_ends_all_processes(server, straight):
    finish(start(server, straight, "--steps 2 --save_every 1 --name fuller", world=2, setup=small_files), [1, 1])
    assert [len(re.findall("error: cannot save out/fuller/step-000001, where .* GB are free: ", (straight / f"{rank}.txt").read_text()))
            for rank in range(2)] == [1, 0]
    assert not list((straight / "out/fuller").glob("*-*"))


def test_another_run_is_not_continued_and_a_finished_one_not_repeated(straight, monkeypatch, capsys):
    monkeypatch.chdir(straight)
    for more, line in (("--lr 0.5 --kl k1", "--lr 0.0007 -> 0.5, --kl k3 -> k1"), ("--resume never", "out/straight1/metrics.jsonl")):
        with pytest.raises(SystemExit) as stop:
            train.main([*TINY, *SIX.split(), "straight1", *more.split()])
        assert stop.value.code == 2 and line in capsys.readouterr().err
    train.main([*TINY, *SIX.split(), "straight1", "--keep", "5", "--steps", "4"])
    assert "out/straight1 is finished: 6 steps" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_more_steps_and_a_damaged_checkpoint_is_named(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "plot", nothing_else)
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "more", "--steps", "2"])
    train.main([*TINY, "--name", "more", "--steps", "3"])
    assert "continues at step 2 from out/more/step-000002" in capsys.readouterr().out and log_lines(tmp_path, "more") == 3
    (state,) = (tmp_path / "out/more/step-000003/state").glob("*.distcp")
    state.write_bytes(state.read_bytes()[:100])
    for damage in (nothing_else, shutil.rmtree):
        damage(state.parent)
        with pytest.raises(SystemExit) as end:
            train.main([*TINY, "--name", "more", "--steps", "4"])
        assert end.value.code == 2 and "step-000003/state is damaged or incomplete; once" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/more/step-000003")
    train.main([*TINY, "--name", "more", "--steps", "4"])
    assert outcome(tmp_path, "more")[0][-1]["step"] == 3


def test_two_runs_of_one_name_do_not_meet(tmp_path):
    with train.only_one(tmp_path):
        with pytest.raises(BadInput, match="another process is writing to"):
            train.only_one(tmp_path)
    train.only_one(tmp_path).close()


def test_a_killed_worker_ends_the_run(tmp_path):
    """Its other workers must not keep the process alive: nobody would start it again."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--workers", "2", "--name", "workers", "--steps", "500"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "out/workers/metrics.jsonl").exists() and log_lines(tmp_path, "workers") > 1)
    os.kill(max(children(run.pid)), signal.SIGKILL)
    assert "is killed by signal: Killed" in run.communicate(timeout=60)[1] and run.returncode == 1


def hang(_):
    """The second process falls asleep while it reads the second step's clips."""
    whole = train.Samples.__getitem__

    def read(samples, i):
        if i == 3:                                             # two a step, every other one is its
            time.sleep(100)
        return whole(samples, i)
    train.Samples.__getitem__ = read


def test_a_time_out_names_process_and_phase(server, straight):
    processes = start(server, straight, "--steps 2 --timeout_minutes 0.1 --name hung", world=2, setup=hang)
    finish(processes, [1, 1])
    assert "rank 1 (of 2) has been in data of step 1 for 0.1 minutes; the others: rank 0 rollout of step 1" in (straight / "1.txt").read_text()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_torchrun_restarts_a_killed_worker(straight, world):
    folder = straight
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(free_port()),
               "--max_restarts", "3", ROOT / "train.py", *TINY, *SIX.split(), f"restarted{world}", "--overwrite", "true"]
    with open(folder / "torchrun.txt", "w") as printed:
        torchrun = subprocess.Popen(command, cwd=folder, stdout=printed, stderr=printed)
    wait_for(lambda: log_lines(folder, f"restarted{world}") > 3)
    os.kill(children(torchrun.pid)[-1], signal.SIGKILL)
    assert torchrun.wait(120) == 0
    assert "continues at step 3" in (folder / "torchrun.txt").read_text()
    assert outcome(folder, f"restarted{world}") == outcome(folder, f"straight{world}")


@pytest.mark.slow
def test_two_nodes_of_two_processes_each(server, straight):
    settings = "--steps 3 --batch 4 --lr 1e-4 --name"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_id", "nodes", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", ROOT / "train.py", *TINY, *settings.split(), "nodes"]
    nodes = [subprocess.Popen(command, cwd=straight, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    finish(start(server, straight, f"{settings} node"))
    same_training(straight, "node", "nodes")


def mixed_sources(*_):
    """Eight clips, every other one without sound, one of them broken: each step draws all of them."""
    def read(item, rng):
        if item == 5:
            raise BadInput("broken on purpose")
        clip = toy_clip("train", item)
        return replace(clip, sound=None) if item % 2 else clip
    return (Source("vos", range(8), read),), []


def use_mixed_sources(rank):
    train.training_sources = mixed_sources


SHAPES = dict(one=(1, 1), two=(2, 1), four=(4, 1), nodes=(4, 2))                      # name: processes, nodes
VARIANTS = [
    ("one two four", ["--accumulate 2 --updates 2 --ratio sequence --average token --kl k2 --skip_equal true",
                      "--lora_rank 4 --lr 1e-3 --accumulate 2"]),
    ("one nodes", ["--average constant --scale_by_std false"]),
    pytest.param("one two four nodes", [
        "", "--accumulate 2", "--updates 2", "--updates 2 --ratio sequence", "--average token", "--average constant", "--kl k1", "--kl k2",
        "--scale_by_std false", "--skip_equal true", "--skip_equal true --average token --accumulate 2",
        "--accumulate 2 --updates 2 --average token --clip_high 0.28 --skip_equal true", "--beta 0 --updates 2", "--batch 8"],
                 marks=pytest.mark.slow)]


@pytest.mark.parametrize("names, variants", VARIANTS, ids=["flat", "nodes", "all"])
def test_any_number_of_processes_trains_alike(server, tmp_path, names, variants):
    for name in names.split():
        world, nodes = SHAPES[name]
        runs = [f"--steps 3 --batch 4 --lr 1e-4 --max_new_tokens 24 {variant} --name {name}{i}" for i, variant in enumerate(variants)]
        finish(start(server, tmp_path, *runs, world=world, nodes=nodes, setup=use_mixed_sources), seconds=900)
    for name, i in itertools.product(names.split()[1:], range(len(variants))):
        same_training(tmp_path, f"one{i}", f"{name}{i}")
    steps = [row for i in range(len(variants)) for row in outcome(tmp_path, f"one{i}")[0]]
    assert any(row["broken"] for row in steps) and any(0 < row["equal_groups"] < 1 for row in steps)


@pytest.mark.parametrize("world", [1, 2])
def test_where_the_reference_rests_changes_nothing(server, tmp_path, world):
    places = ("device", "shard", "host")
    runs = [f"--steps 2 --batch 2 --lr 1e-3 --updates 2 --max_new_tokens 24 --reference {place} --name {place}" for place in places]
    finish(start(server, tmp_path, *runs, world=world))
    device, shard, host = (outcome(tmp_path, place) for place in places)
    assert device == shard == host and device[0][1]["kl"] > 0


def test_adapters_begin_as_nothing_and_are_merged_in_the_end(reference, thinker, tmp_path):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, mask = ragged([9, 4])
    before = thinker.logprobs(prompt, completions)[0].detach()
    add_adapters(thinker, 3, seed=1)
    assert torch.equal(thinker.logprobs(prompt, completions)[0], before)
    trained = {name: p for name, p in thinker.named_parameters() if p.requires_grad}
    layers = len(thinker.model.layers)
    assert len(trained) == 7 * 2 * layers and all(name.endswith((".up", ".down")) for name in trained)
    thinker.logprobs(prompt, completions)[0][mask].sum().backward()
    assert all(p.grad.any() == name.endswith(".up") for name, p in trained.items())       # down counts once up is not zero
    with torch.no_grad():
        for name, p in trained.items():
            p.add_(0.1 * torch.randn(p.shape))
        with adapters_off(thinker):
            assert torch.equal(thinker.logprobs(prompt, completions)[0], before)
        after = thinker.logprobs(prompt, completions)[0]
        assert (after - before).abs().max() > 0.01
        thinker.save_pretrained(tmp_path, dict(thinker.whole_weights()))
        torch.testing.assert_close(Thinker.from_pretrained(tmp_path).logprobs(prompt, completions)[0], after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_the_best_checkpoint_by_validation_stays(server, tmp_path, world):
    finish(start(server, tmp_path, "--steps 5 --lr 0.02 --save_every 1 --keep 1 --validate 3 --name best", world=world))
    rows, _ = outcome(tmp_path, "best")
    scores = [row["validation"] for row in rows]
    assert len(set(scores)) > 1
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "out/best").glob("step-*"))
    assert kept == sorted({5, 1 + scores.index(max(scores))})
    # By hand: the saved policy's greedy answers to the very clips that are left out of training.
    settings = train.read_settings([*TINY, "--validate", "3", "--policy", str(tmp_path / f"out/best/step-{kept[0]:06d}")])
    sources, _ = data_file.training_sources("toy", ".", {}, 0)
    left, held = train.hold_out(sources, 3, 0)
    assert len(held) == 3 and not {item for _, item in held} & set(left[0].items) and len(left[0].items) == 100_000 - 3
    policy = Thinker.from_pretrained(settings.policy)
    systems = Systems(policy, Thinker.from_pretrained(TOY_POLICY), data_file.Processor(TOY_POLICY), None)
    rewards = []
    for k, (source, item) in enumerate(held):
        clip = source.read(item, None)
        prompt, = policy.embed([prompt_inputs(systems.processor, clip, np.random.default_rng([0, k]))])
        (ids,), = policy.generate([prompt], 1, 16, eos_ids=systems.processor.eos_ids, temperature=0.0)
        text = systems.processor.decode(ids)
        ((boxes,),) = ground(systems.reference, systems.processor, [clip], [[frames_to_ground(clip, text)]])
        rewards.append(total_rewards([reward_terms(clip, (1, 1), text, boxes, None)], [len(ids)], settings)[0])
    assert np.mean(rewards) == pytest.approx(scores[kept[0] - 1], abs=1e-4)


def test_clips_are_held_out_of_every_source_and_never_all():
    sources = (numbers("vos", 7), numbers("avs", 3, 100))
    left, held = train.hold_out(sources, 6, 1)
    names = [item for source in left for item in source.items]
    assert len(names) == 4 and sorted(names + [item for _, item in held]) == [*range(7), 100, 101, 102]
    assert all(item in source.items for source, item in held) and train.hold_out(sources, 0, 1) == (sources, [])
    with pytest.raises(BadInput, match="--validate 10"):
        train.hold_out(sources, 10, 1)


class Peak(TorchDispatchMode):
    """Bytes of all tensors that are alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out


def test_the_memory_plan_against_what_is_there(monkeypatch):
    monkeypatch.setattr(model_file, "causal_lower_right", lambda *_: None)     # a kind of tensor that cannot be watched
    P, G, C = 1025, 4, 64
    settings = train.read_settings(["--policy", str(ROOT / "bench/shapes/small"), "--dtype", "float32", "--batch", "1", "--checkpointing",
                                    "--group", str(G), "--max_new_tokens", str(C), "--prompt_tokens", str(P - 1)])
    plan = train.memory_plan(settings, 1)
    thinker = Thinker(read_config(Path(settings.policy)))
    optimizer = train.start_optimizer(thinker, settings)
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    trained = [p for p in thinker.parameters() if p.requires_grad]
    assert plan["update"]["weights, gradients, AdamW"] == sum(4 * x.numel() for x in (*trained, *trained, *states))
    cache = Cache([P - 1], G, C, thinker.config.text_config, like=torch.empty(0))
    assert plan["rollout"]["cache"] == cache.prefix.nbytes + cache.own.nbytes
    # The update's own, in a pass that makes no gradient but the first layer's.
    media = torch.zeros(1, thinker.config.text_config.hidden_size)
    prompt = Prompt(torch.zeros(P, dtype=torch.long), torch.zeros(3, P, dtype=torch.long), torch.tensor([0]), media)
    thinker.requires_grad_(False).model.layers[0].input_layernorm.weight.requires_grad_(True)
    weights = sum(p.nbytes for part in (thinker.model.layers, thinker.lm_head, thinker.model.norm) for p in part.parameters())
    for checkpointing in (True, False):
        thinker.gradient_checkpointing = checkpointing
        plan = train.memory_plan(replace(settings, checkpointing=checkpointing), 1)["update"]
        planned = plan["kept of all layers"] + plan["a layer, or logits"]
        with Peak() as peak:
            thinker.logprobs(prompt, torch.zeros(G, C, dtype=torch.long))[0].sum().backward()
        assert 0.85 * planned < peak.most - weights < 1.15 * planned


@pytest.mark.parametrize("arguments, fits", [
    (["--policy", "bench/shapes/7b", "--nproc", "8"], "fits 80 GB 141 GB"), (["--policy", "bench/shapes/7b", "--nproc", "1"], "fits no device"),
    (["--policy", "bench/shapes/3b", "--nproc", "1,8"], "fits 40 GB 48 GB 80 GB"), (["--policy", "nowhere"], "nowhere"), (["--nproc", "8,x"], "8,x")])
def test_the_plan_is_printed_without_weights_or_gpu(monkeypatch, capsys, arguments, fits):
    monkeypatch.chdir(ROOT)
    try:
        train.main(["--plan", "--sam2_weights", "sam2.1_hiera_large.pt", *arguments])
    except SystemExit as end:
        assert end.code == 2
    assert fits in "".join(capsys.readouterr())


def test_the_benchmark_compares_what_gives_the_same(tmp_path):
    command = [sys.executable, ROOT / "bench/step.py", "--shape", "tiny", "--prompt", "40", "--completion", "4", "--group", "2",
               "--repeats", "1", "--threads", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["proof"]["equal"] and result["proof"]["iou"] >= 0.99 and result["proof"]["errors"]["gradients"] < 1e-4
    assert set(result["parts"]) == {"rollout", "policy", "reference", "masks", "whole"}
    assert all(part["ratio"] > 0 and part["memory_ratio"] for part in result["parts"].values())


# ====================================================================================================================
# Hostile text
# ====================================================================================================================

WRONG, WHOLE = (0, 0, 5, 5), (0, 0, 19, 19)              # a box around another object; one as large as the image
LATER = train.Settings()                                 # weights of the later run
EARLIER = replace(LATER, saliency=1.0, consistency=0.0)  # of the first release
WEAK = replace(LATER, keyframe=0.2)                      # of the toy
CLIPPED = replace(LATER, clip_reward=True, length_control=True)
ABSENT, PRESENT = block("00:00.00", "00:00.00"), block("00:03.00", "00:03.00")       # frames 0 and 6
EACH = [block(f"00:0{t / 2:.2f}", f"00:0{t / 2:.2f}") for t in range(16)]            # every frame once


def hostile_clips():
    """One clip of each task, kind of question and number of objects. Of the first: 16 frames of 20 x 20 and one target of 6 x 6
    in sight on frames 4 to 11, half of its clip."""
    masks = np.zeros((1, 16, 20, 20), dtype=bool)
    masks[0, 4:12, 7:13, 7:13] = True
    clips = {name: Clip(name, Frames(None, range(m.shape[1])), "it", masks=m, task=name[:3])
             for name, m in dict(vos=masks, vos_two=scene(), vos_null=masks & False, avs=masks[:, 4:],
                                 avs_null=masks & False).items()}
    solutions = {"multiple choice": "B", "numerical": "1,000.5", "regression": "10", "OCR": "the cat sat",
                 "free-form": "The cat sat on a mat."}
    truths = {kind: dict(type=kind, solution=solution) for kind, solution in solutions.items()}
    truths["image"] = dict(box=TRUE_BOX, points=TRUE_POINTS)
    return clips | {name: Clip(name, None, "it", masks=masks, task="image" if name == "image" else "qa", truth=truth)
                    for name, truth in truths.items()}


HOSTILE = hostile_clips()


def answered(answer):
    return said().replace("[]", answer)


def judged(task, text, boxes):
    """The reward terms of a completion where System 2 finds the same boxes on every frame, and SAM2 keeps them where they are."""
    clip = HOSTILE[task]
    found = dict.fromkeys(frames_to_ground(clip, text), boxes)
    tracked = np.zeros(clip.masks.shape[1:], dtype=bool)
    for x1, y1, x2, y2 in {*boxes} if found else ():
        tracked[:, round(y1):round(y2) + 1, round(x1):round(x2) + 1] = True
    return reward_terms(clip, (1.5, 0.5) if clip.task != "image" else (1, 1), text, found, tracked)


@functools.cache
def judged_honest(task):
    return judged(task, said(PRESENT), [WRONG])


def earned(task, text, boxes=(WRONG,), settings=LATER):
    return total_rewards([judged(task, text, boxes)] * 2, [400, 400], settings)[0]


# ---- bent answers ------------------------------------------------------------------------------------------------

HUGE = 100_000
VALUES = ["NaN", "-Infinity", "Infinity", "1e400", "-1", "0.5", "9" * 5000, "0." + "9" * 5000, "-0:01.00", "99:99.99",
          "1e9:00.00", "00:01.00", "00:07.99", '"00:02.00"', '"00:01.00"', "٣:٠١.٠٠", "１２", "٣", "1_0", "true", "null", '""',
          "1e6", "-20", "1e7"]
JUNK = VALUES + ["{", "}", "[", "]", '"', "\\", ",", ":", " ", "\n", "\x00", "\u200b", "\u202e", "\ufeff", "\u3000", "é🐕", "İ",
                 "\\ud83d", "\\u0000", "<answer>", "</answer>", "<think>", "</think>", "<answer></answer>", "<", "}{", "{}",
                 '{"a":', "[{", "a ", "the cat ", '{"start_time": NaN}', '"bbox_2d": [1, 2, 3, 4]', '"bbox_2d":',
                 '{"bbox_2d": [-5, -5, 1e5, 1e5]}', PRESENT]
OTHER_DIGITS = [str.maketrans("0123456789", digits) for digits in ("٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "²" * 10)]
BENDS = {   # what is done to a text: `at` and `to` are places in it, `junk` one of JUNK, `times` a number of copies
    "insert": lambda text, at, to, junk, times: text[:at] + copies(junk, times) + text[at:],
    "replace": lambda text, at, to, junk, times: text[:at] + junk + text[to:],
    "value": lambda text, at, to, junk, times: text[:at] + re.sub(r'[0-9:.]+|"[^"]*"', lambda _: junk, text[at:], count=1),
    "repeat": lambda text, at, to, junk, times: text[:at] + copies(text[at:to], times) + text[to:],
    "objects": lambda text, at, to, junk, times: re.sub(r"\{[^{}]*\}", lambda m: copies(m[0] + ",", times) + m[0], text, count=1),
    "nest": lambda text, at, to, junk, times: text[:at] + text + text[at:],
    "truncate": lambda text, at, to, junk, times: text[:to],
    "append": lambda text, at, to, junk, times: text + copies(junk, times),
    "swap": lambda text, at, to, junk, times: text.replace("start_t", "\0").replace("end_t", "start_t").replace("\0", "end_t"),
    "digits": lambda text, at, to, junk, times: text[:at] + text[at:to].translate(OTHER_DIGITS[times % 3]) + text[to:]}
HONEST = [toy_make.global_answer("red circle", np.arange(16), np.random.default_rng(seed)) for seed in range(4)] + [
    said(PRESENT), said(ABSENT, PRESENT), said(*EACH[4:8]), said(block("00:02.00", "00:03.50")),
    toy_make.box_answer((3, 4, 9, 12)), answered(toy_make.box_answer(WRONG)), answered("null"), answered("a cat on the left"),
    answered("B"), answered("1,000.5"),
    answered("The cat sat on the mat."), *(answered(pointed([110, 100, 199, 190], [130, 150], [170, 150])) for _ in range(3))]
ONE_BEND = st.tuples(st.sampled_from(sorted(BENDS)), st.integers(0, 99), st.integers(0, 99), st.sampled_from(JUNK),
                     st.sampled_from((1, 2, 3, 5) * 80 + (50, 300) * 10 + (2_000, HUGE)))


def copies(piece, times):
    """At most HUGE characters of them."""
    return piece * min(times, HUGE // (len(piece) + 1) + 1)


def bent(text, bends):
    for way, at, to, junk, times in bends:
        at, to = sorted(place * len(text) // 99 for place in (at, to))
        text = BENDS[way](text, at, to, junk, times)[:2 * HUGE]
    return text


def read_all(text):
    """Whatever parses a text, once."""
    answer = answer_text(text)
    moments = parse_moments(text, 16, 2.0)
    for moment in moments:
        data_file.plain(moment.description).encode()                                 # what a tokenizer will do
    value = data_file.parse_json(answer)
    boxes, numbers = data_file.parse_box(value), data_file.parse_numbers(value, 2)
    return (moments, keyframes(moments), parse_boxes(text), answer, is_null(answer), data_file.blocks(answer), parse_time(answer),
            boxes, numbers, parse_number(answer), format_reward(text))


def limits(task, n):
    """The documented (least, most) of each reward term of a completion with n moments."""
    O, T = HOSTILE[task].masks.shape[:2]
    shares = "saliency alignment consistency first_box strict box point accuracy format malformed".split()
    return dict.fromkeys(shares, (0, 1)) | dict(
        base=(0, 1.6), number=(0.4 * (7 - T), 0 if task == "vos_null" else 1.6), length=(-0.2 * (T - 1) * n, 0),
        overlap=(-0.5 * T * n, 0), mismatch=(-0.5 * 16 / O, 0), iou=(0, 1.4))


def check_hostile(text):
    """Whether the text still names keyframes. Everything is read and rewarded, twice, without an exception and within bounds."""
    read = read_all(text)
    assert read == read_all(text)
    moments, chosen, boxes, *_ = read
    assert len(boxes) <= 16 and len(chosen) <= 4 and all(0 <= frame < 16 for frame in chosen)
    totals = []
    for task, clip in HOSTILE.items():
        found = [to_source(box, (1.5, 0.5), clip.size) for box in boxes]             # hostile boxes of System 2, too
        terms = judged(task, text, found)
        bounds = limits(task, len(moments))
        for name, value in terms.items():                                            # NaN fails every comparison
            assert bounds[name][0] - 1e-9 <= value <= bounds[name][1] + 1e-9, (task, name)
        assert terms == judged(task, text, found) and terms["format"] in (0, 1) and terms["malformed"] in (0, 1)
        for settings in (LATER, CLIPPED):
            totals += total_rewards([terms, judged_honest(task)], [400, 9], settings).tolist()
    assert np.isfinite(totals).all() and group_advantages(totals, 2).isfinite().all()
    return bool(chosen)


@pytest.mark.parametrize("cases", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_hostile_text_never_raises_and_stays_within_bounds(cases):
    useful = []

    @hypothesis_settings(max_examples=cases, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(HONEST), st.lists(ONE_BEND, min_size=1, max_size=4))
    def check(honest, bends):
        useful.append(check_hostile(bent(honest, bends)))

    check()
    assert len(useful) >= cases and 0.1 < np.mean(useful) < 0.9                      # not all garbage, not all left whole


# ---- time --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("piece", [   # repeated; between @ and @, if there are any
    "{", "}", "{}", '{"a":', "[", "{[@[@}", '{"a": @[@}', '{"a": "@\\\\@"}', '{"a": @9@}', '{"a": 0.@9@}',
    '{"description": "@ @"}', '{"description": "@\\ud83d@"}', '{"a": [@1, @1]}', '{@"a": 1, @"a": 1}', "9", "0.@9@", "@ @1", "٣",
    "1_", "a ", "a", "İ", "\u3000", "<", "<answer>", "</answe", "<think>", "@<answer>@</answer>", "</think>@ @<answer>",
    "</think>@ @x<answer>", '"bbox_2d"@ @', '"bbox_2d":', '"bbox_2d": [', '"bbox_2d": [@"bbox_2d": @', '"bbox_2d" : @ @[1',
    '"bbox_2d": [1, 2, 3, 4]', "the cat ", PRESENT + ","])
@pytest.mark.parametrize("form", ["<think></think><answer>{}</answer>", "<think></think><answer>{}", "{}</answer>"])
def test_hostile_text_takes_time_linear_in_its_length(piece, form):
    head, middle, tail = piece.split("@") if "@" in piece else ("", piece, "")

    def seconds(length):
        text = form.replace("{}", head + middle * (length // len(middle)) + tail)
        began = time.process_time()
        read_all(text)
        for task in ("vos", "image", "OCR", "free-form"):
            judged(task, text, [])
        return time.process_time() - began

    short, long = math.inf, math.inf
    for _ in range(5):                                                               # the best of several, on a busy machine
        short, long = min(short, seconds(HUGE)), min(long, seconds(4 * HUGE))
        if long < 12 * max(short, 0.001):                                            # 4 where linear, 16 where quadratic
            return
    pytest.fail(f"{short:.3f} s for {HUGE} characters, {long:.3f} s for four times as many")


# ---- hacks -------------------------------------------------------------------------------------------------------

def copied_examples(description):
    """The examples of 100 training prompts, each taken for the answer."""
    prompts = [global_prompt(HOSTILE["vos"], np.random.default_rng(seed))[1]["content"][0]["text"] for seed in range(100)]
    return [text[text.rindex("<think>"):].strip().replace('"..."', json.dumps(description)) for text in prompts]


OTHER = pointed([600, 600, 699, 699], [620, 650], [680, 650])                        # another object of the picture
HONEST_WRONG = {   # task -> (answer, boxes of System 2) in the agreed form of another object than the one that is meant
    "vos": (f"[{PRESENT}]", [WRONG]), "avs": ("a dog on the left", [(2, 2, 8, 8)]), "image": (OTHER, []), "regression": ("9", []),
    "multiple choice": ("A", []), "OCR": ("the cat ran", []), "free-form": ("The dog sat on the bed.", [])}
ANY_TASK = {   # hack -> (what it makes of the honest completion and of its answer, whether anything but the format is paid)
    "no completion": (lambda honest, answer: "", False),
    "no end": (lambda honest, answer: honest.removesuffix("</answer>"), False),
    "empty answer before the answer": (lambda honest, answer: honest.replace("<answer>", "<answer></answer><answer>"), False),
    "text after the answer": (lambda honest, answer: honest + " This is right.", True),
    "answer after the answer": (lambda honest, answer: honest + honest, True),
    "text before the thought": (lambda honest, answer: "Sure. " + honest, True),
    "text between thought and answer": (lambda honest, answer: honest.replace("\n", "so"), True),
    "no thought": (lambda honest, answer: honest[honest.index("<answer>"):], True),
    "thought in the thought": (lambda honest, answer: honest.replace("why", "<think>why</think>"), True),
    "answer in the thought": (lambda honest, answer: f"<think><answer>{answer}</answer></think>", True),
    "end repeated": (lambda honest, answer: honest + "</answer>", True),
}
HACKS = {   # (task, hack) -> (its text or texts, boxes of System 2, total with the weights of the later run)
    ("vos", "empty answer"): (answered(""), [], 1),
    ("vos", "empty list"): (said(), [], 1),
    ("vos", "null where there is something"): (answered("null"), [], 1),
    ("vos", "prose"): (answered("a dog on the left, from 00:03.00 to 00:03.00"), [WRONG], 1),
    ("vos", "empty objects"): (said(*["{}"] * 100), [], 1.2),
    ("vos", "answer in the answer"): (answered(f"<answer>[{ABSENT}]</answer>"), [WRONG], 0.6 + 0.4),
    ("vos", "object in an object"): (said('{"a": ' + PRESENT + "}"), [WRONG], 1.2),
    ("vos", "object repeated"): (said(ABSENT, ABSENT), [WRONG], 1 + 0.6 + 0.4 - 0.5),
    ("vos", "object repeated fifty times"): (said(*[ABSENT] * 50), [WRONG], 1 + 0.6 + 0.4 - 0.5 * 49),
    ("vos", "same frame by other hundredths"): (said(ABSENT, ABSENT.replace('.00"', '.01"')), [WRONG], 1 + 0.6 + 0.4 - 0.5),
    ("vos", "object and empty ones"): (said(ABSENT, *["{}"] * 3), [WRONG], 1 + (0.6 + 3 * 0.2) / 4 + 0.4),
    ("vos", "all frames"): (said(*EACH), [WRONG], 1 + 0.6 + 0.5 - 0.4 * 9),
    ("vos", "all frames in one interval"): (said(block("00:00.00", "00:08.00")), [WRONG], 1 + 0.6 + 0.5 - 0.4 * 9 - 0.2 * 15),
    ("vos", "all frames four times"): (said(*[block("00:00.00", "00:08.00")] * 4), [WRONG], 1.1 + 1 - 3.6 - 0.8 * 15 - 0.5 * 48),
    ("vos", "interval past the end"): (said(block("00:00.00", "99:00.00")), [WRONG], 1.4),
    ("vos", "swapped times"): (said(block("00:03.00", "00:00.00")), [WRONG], 1.4),
    ("vos", "negative times"): (said(block("-0:03.00", "00:03.00")), [WRONG], 1.2),
    ("vos", "no times"): (said(block("", "")), [WRONG], 1.2),
    ("vos", "blank description"): (said(block("00:03.00", "00:03.00", " \n")), [WRONG], 1.2),
    ("vos", "invisible description"): (said(block("00:03.00", "00:03.00", "\u200b\u2060")), [WRONG], 1.2),
    ("vos", "example's times"): (copied_examples("a dog on the left"), [WRONG], 1.2123),          # their mean
    ("vos", "example word for word"): (copied_examples("..."), [WRONG], 1.2),
    ("vos", "every box there is room for"): (said(ABSENT), [WRONG] * 16, 1 + 0.6 + 0.4 - 0.5 * 15),
    ("vos", "another box as large as the image"): (said(ABSENT), [WRONG, WHOLE], 1 + 0.6 + 0.4 - 0.5 + 2 * 8 * 36 / 400 / 16),
    ("avs", "empty answer"): (answered(""), [], 1),
    ("avs", "null where there is something"): (answered("null"), [], 1),
    ("avs", "the whole image after another box"): (answered("anything"), [WRONG, WHOLE], 1),
    ("image", "empty answer"): (answered(""), [], 1),
    ("image", "null"): (answered("null"), [], 1),
    ("image", "object repeated"): (answered(OTHER + OTHER), [], 1),
    ("image", "list of objects"): (answered(f"[{OTHER}, {OTHER}]"), [], 1),
    ("image", "further keys"): (answered(OTHER.replace("}", ', "bbox": [100, 100, 199, 199]}')), [], 1),
    ("image", "no points"): (answered('{"bbox_2d": [0, 0, 839, 839]}'), [], 1),
    ("image", "true points in no box"): (answered(pointed([839, 839, 0, 0], *TRUE_POINTS)), [], 1),
    ("image", "true points, other names"): (answered(pointed(WHOLE, *TRUE_POINTS).replace("points_2", "point_2")), [], 1),
    ("image", "box without an end"): (answered(pointed([-math.inf, 0, math.inf, 839], *TRUE_POINTS)), [], 1),
    ("image", "numbers as text"): (answered(pointed(["0", "0", "839", "839"], *TRUE_POINTS)), [], 1),
    ("regression", "empty answer"): (answered(""), [], 1),
    ("regression", "every number"): (answered(" ".join(map(str, range(100)))), [], 1),
    ("regression", "infinity"): (answered("Infinity"), [], 1),
    ("regression", "not a number"): (answered("nan"), [], 1),
    ("OCR", "empty answer"): (answered(""), [], 1),
    ("OCR", "text repeated"): (answered("the cat ran " * 100), [], 1),
    ("free-form", "empty answer"): (answered(""), [], 1),
    ("free-form", "word repeated"): (answered("the " * 100), [], 1 + (2 / 106 + 0 + 2 / 106) / 3),
    ("free-form", "answer repeated"): (answered("The dog sat on the bed. " * 50), [], 1 + (6 / 306 + 2 / 304 + 6 / 306) / 3),
}


def honest_totals(task, settings=LATER):
    """Of the honest wrong answer; of masks, two: at its moment the target is to be seen as well, or not."""
    answer, boxes = HONEST_WRONG[task]
    answers = [answer, f"[{ABSENT}]"] if task == "vos" else [answer]
    return [earned(task, answered(a), boxes, settings) for a in answers]


@pytest.mark.parametrize("settings", [LATER, EARLIER, WEAK], ids=["later", "earlier", "toy"])
@pytest.mark.parametrize("task, hack", HACKS)
def test_hostile_hacks_score_below_an_honest_wrong_answer(task, hack, settings):
    texts, boxes, total = HACKS[task, hack]
    honest = honest_totals(task, settings)
    if isinstance(texts, str):
        hacked, least = earned(task, texts, boxes, settings), min(honest)
    else:                                                # moments at random: half of them, as of ours, have the target in sight
        hacked, least = np.mean([earned(task, text, boxes, settings) for text in texts]), np.mean(honest)
    assert hacked < least
    if settings == LATER:
        assert hacked == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("task", HONEST_WRONG)
@pytest.mark.parametrize("hack", ANY_TASK)
def test_hostile_forms_score_below_an_honest_wrong_answer(task, hack):
    bend, understood = ANY_TASK[hack]
    answer, boxes = HONEST_WRONG[task]
    honest, form = honest_totals(task)[0], 2 if task == "image" else 1               # there the form of the answer counts as well
    assert earned(task, bend(answered(answer), answer), boxes) == pytest.approx(honest - form if understood else 0)


PAID = {   # What the formulas (method.md, 3) themselves pay: (task, honest, its boxes, settings), (hack, its boxes), both totals
    # R_A is an IoU and R_G a J: a box as large as the image shares the target's pixels with it, 36 of 400, on half the frames.
    "box as large as the image": (("vos", said(PRESENT), [WRONG], LATER), (said(PRESENT), [WHOLE]), 3, 3 + 0.09 + 2 * 0.09 / 2),
    "such a box for the sound": (("avs", answered("a dog"), [WRONG], LATER), (answered("all"), [WHOLE]), 1, 1.09),
    # R_G counts 1 where prediction and truth are empty: a description of nothing that System 2 finds leaves the other half right.
    "nothing that can be found": (("vos", said(PRESENT), [WRONG], LATER), (said(PRESENT), []), 3, 3 + 2 * 8 / 16),
    # With the optional clip no term can take away: all frames earn base, in which the target is seen on half of them.
    "all frames, clipped": (("vos", said(ABSENT), [WRONG], replace(LATER, clip_reward=True)), (said(*EACH), [WRONG]), 2, 2.1),
    # R_K asks for four frames: one object at four moments earns more than at one, and so does an interval of two to four.
    "four moments": (("vos", said(ABSENT), [WRONG], LATER), (said(*EACH[:4]), [WRONG]), 2, 2 + 0.4 * 3),
    "interval of four": (("vos", said(ABSENT), [WRONG], LATER),
                         (said(block("00:00.00", "00:01.50")), [WRONG]), 2, 2 + 0.4 * 3 - 0.2 * 3),
    # Format asks for tags, not for words between them.
    "no word of thought": (("vos", said(ABSENT), [WRONG], LATER), (said(ABSENT).replace("why", ""), [WRONG]), 2, 2),
    # The IoU, box and point terms of a picture end at 0, far from the target: nothing tells one wrong box from another ...
    "box as large as the picture": (("image", answered(OTHER), [], LATER),
                                    (answered(pointed([0, 0, 839, 839], [420, 420], [440, 420])), []), 2, 2),
    # ... and the points only need to lie within the box: one of the whole picture lets them be anywhere, off by 100 here.
    "points anywhere": (("image", answered(OTHER), [], LATER),
                        (answered(pointed([0, 0, 839, 839], [120, 250], [180, 250])), []), 2, 3),
    # An empty answer earns 0, as a wrong one does where there is no partial credit; both have the format.
    "empty answer, wrong box": (("avs", answered("a dog"), [WRONG], LATER), (answered(""), []), 1, 1),
    "empty choice": (("multiple choice", answered("A"), [], LATER), (answered(""), []), 1, 1),
    "all choices": (("multiple choice", answered("A"), [], LATER), (answered("A B C D"), []), 1, 1),
    "empty number": (("numerical", answered("7"), [], LATER), (answered(""), []), 1, 1),
}


@pytest.mark.parametrize("hack", PAID)
def test_hostile_hacks_that_the_formulas_pay(hack):
    """Not below the honest wrong answer, and known: a change of any of these totals is a change of the method."""
    (task, text, boxes, settings), hacked, honest_total, total = PAID[hack]
    assert earned(task, text, boxes, settings) == pytest.approx(honest_total)
    assert earned(task, *hacked, settings) == pytest.approx(total) and total >= honest_total

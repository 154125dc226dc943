"""What several test files build: toy systems, tiny Thinkers and their prompts, miniatures, programs that
run."""
import functools
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5OmniThinkerConfig

import eval as evaluation
import train
from benchmarks.toy import toy_clip, toy_scene
from data import Processor, prompt_inputs
from grpo import Systems
from model import Thinker
from run.log import Watch
from run.settings import read_settings
from segment import Tracker, answer_clips, thinker_system2, track_groups
from trust.errors import BadInput
from trust.options import TOY_POLICY, TOY_SAM2
from trust.sam2_config import find_config

ROOT = Path(__file__).parent.parent
TOY = ROOT / "toy/policy"
SMALL_FILES = shutil.ignore_patterns("*.safetensors*")

# Remembers scenes, where the toy world draws them again.
seen_scene = functools.lru_cache(toy_scene)


# ---- both systems on clips -------------------------------------------------------------------------
def segment(policy, system2, processor, tracker, clips, **options):
    """Answers to B clips with all masks at once: text, keyframes, boxes, and masks bool [T, H, W]."""
    answers = answer_clips(policy, system2, processor, clips, **options)
    tracked = track_groups(tracker, clips, [[answer.boxes] for answer in answers])
    return [SimpleNamespace(**vars(answer), masks=masks) for answer, (masks,) in zip(answers, tracked)]


# ---- toy systems -----------------------------------------------------------------------------------
def settings_of(*arguments) -> train.Settings:
    """Settings as train.py reads them from a command line."""
    return read_settings(train.Settings, "", [str(argument) for argument in arguments])


def toy_tracker() -> Tracker:
    return Tracker.from_pretrained(find_config(TOY_SAM2), TOY_SAM2)


def toy_systems() -> Systems:
    """The shipped policy as System 1, reference and System 2, and the shipped SAM2."""
    policy = Thinker.from_pretrained(TOY_POLICY)
    processor = Processor(TOY_POLICY)
    return Systems(policy, policy, thinker_system2(policy, processor), processor, toy_tracker())


def training_step(device, settings):
    """(group, log, trained policy) after one step on a toy clip of eight frames."""
    systems = train.load_systems(settings, device)
    optimizer = train.start_optimizer(systems.policy, settings)
    clip, _ = toy_clip("train", 2).sampled(8)
    inputs = prompt_inputs(systems.processor, clip, np.random.default_rng(0))
    watch = Watch()
    groups = train.collect_batch(systems, iter([(clip, inputs, 7)]), settings, watch)
    row = train.update(0, systems, optimizer, groups, settings, watch)
    return groups[0], row, systems.policy


# ---- a Thinker in miniature, and prompts for it ----------------------------------------------------
# Ids: 0 pad, 1 end, 2 sound, 3 image, 4 video, 5 and 6 vision brackets, 7 and 8 sound brackets, the rest is
# text.
EOS, SOUND, IMAGE, VIDEO, SEE, SEEN, HEAR, HEARD, VOCAB = 1, 2, 3, 4, 5, 6, 7, 8, 97
MEDIA = [SOUND, IMAGE, VIDEO, SEE, SEEN, HEAR, HEARD]
KINDS = ["text", "image", "video", "sound", "video with sound"]


def tiny_config(**changes) -> Qwen2_5OmniThinkerConfig:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, window_size=16, out_hidden_size=64, fullatt_block_indexes=[1])
    audio = dict(
        num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16,
        output_dim=64, max_source_positions=64, n_window=8)
    rope = dict(rope_theta=10000.0, rope_type="default", mrope_section=[2, 3, 3])
    text = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, rope_parameters=rope)
    settings = dict(
        vision_config=vision, audio_config=audio, text_config=text, audio_token_index=SOUND,
        image_token_index=IMAGE, video_token_index=VIDEO, pad_token_id=0, vision_start_token_id=SEE,
        vision_end_token_id=SEEN, audio_start_token_id=HEAR, audio_end_token_id=HEARD,
        tie_word_embeddings=False)
    return Qwen2_5OmniThinkerConfig(**(settings | changes))


def text_ids(count, seed=0) -> list[int]:
    return torch.randint(9, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs_of(kind, reference, seed=0):
    """One prompt as data.py would hand it over, and the same for transformers' model `reference`."""
    random = torch.Generator().manual_seed(seed)
    grids = {"image": [[1, 8, 12]], "video": [[3, 8, 4]], "video with sound": [[3, 8, 4]]}
    grid = torch.tensor(grids[kind]) if kind in grids else None
    # 93 mel frames: 47 after the convolution, then 23 tokens.
    mel = torch.randn(8, 93, generator=random) if "sound" in kind else None
    seen = []
    if grid is not None:
        seen = [IMAGE if kind == "image" else VIDEO] * int(grid.prod() // 4)
    heard = [] if mel is None else [SOUND] * 23
    ids = torch.tensor(text_ids(7, seed) + media_ids(kind, seen, heard) + text_ids(6, seed + 1))
    patches = torch.randn(int(grid.prod()), 96, generator=random) if seen else None
    theirs = dict(input_ids=ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    if kind == "image":
        theirs |= dict(pixel_values=patches, image_grid_thw=grid)
    elif seen:
        theirs |= dict(pixel_values_videos=patches, video_grid_thw=grid)
    if heard:
        theirs |= dict(input_features=mel[None], feature_attention_mask=torch.ones(1, 93, dtype=torch.long))
    if VIDEO in ids:
        theirs |= dict(video_second_per_grid=torch.tensor([1.0]))
    if kind == "video with sound":
        theirs |= dict(use_audio_in_video=True)
    positions = rope_index(reference, theirs)
    return SimpleNamespace(ids=ids, positions=positions, patches=patches, grid=grid, mel=mel), theirs


def media_ids(kind, seen, heard) -> list[int]:
    """Placeholders between their brackets."""
    if kind == "video with sound":
        # Chunks of 2 s: two of the three frame pairs (1 s each, 8 tokens) first, then all of the 0.9 s of
        # sound.
        return [SEE, HEAR, *seen[:16], *heard, *seen[16:], HEARD, SEEN]
    media = []
    if seen:
        media += [SEE, *seen, SEEN]
    if heard:
        media += [HEAR, *heard, HEARD]
    return media


def rope_index(reference, theirs):
    """transformers' own position ids (3, P)."""
    # Newer transformers keep them one level deeper.
    index = getattr(reference, "model", reference)
    index = index if hasattr(index, "get_rope_index") else reference
    lengths = torch.tensor([93]) if "input_features" in theirs else None
    if lengths is None and "image_grid_thw" not in theirs and "video_grid_thw" not in theirs:
        return torch.arange(theirs["input_ids"].shape[1]).expand(3, -1)
    positions, _ = index.get_rope_index(
        theirs["input_ids"], theirs.get("image_grid_thw"), theirs.get("video_grid_thw"),
        theirs["attention_mask"], theirs.get("use_audio_in_video", False), lengths,
        theirs.get("video_second_per_grid"))
    return positions[:, 0]


def prompts_of(thinker, reference, kinds=KINDS):
    """Prompts of the kinds, with their media seen and heard."""
    return thinker.embed([inputs_of(kind, reference, seed)[0] for seed, kind in enumerate(kinds)])


# ---- media of noise, and errors --------------------------------------------------------------------
def noise_picture(width, height, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=95)
    return file.getvalue()


def riff_chunk(tag, content):
    padding = b"\0" * (len(content) % 2)
    return tag + struct.pack("<I", len(content)) + content + padding


def write_avi(path, size, jpegs, fps):
    """A video file of encoded pictures."""
    width, height = size
    n = len(jpegs)
    file_header = struct.pack("<14I", 1_000_000 // fps, 0, 0, 16, n, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream_header = b"vidsMJPG" + struct.pack("<10I4H", 0, 0, 0, 1, fps, 0, n, 0, 0, 0, 0, 0, width, height)
    picture_form = struct.pack(
        "<IiiHH4s5I", 40, width, height, 1, 24, b"MJPG", 3 * width * height, 0, 0, 0, 0)
    stream = b"strl" + riff_chunk(b"strh", stream_header) + riff_chunk(b"strf", picture_form)
    headers = b"hdrl" + riff_chunk(b"avih", file_header) + riff_chunk(b"LIST", stream)
    pictures = b"movi"
    for content in jpegs:
        pictures += riff_chunk(b"00dc", content)
    content = b"AVI " + riff_chunk(b"LIST", headers) + riff_chunk(b"LIST", pictures)
    path.write_bytes(riff_chunk(b"RIFF", content))


def naming(path, error=BadInput):
    """An error is raised inside that names the file at `path`."""
    return pytest.raises(error, match=re.escape(str(path)))


# ---- completions -----------------------------------------------------------------------------------
def block(start, end, description="a dog on the left"):
    """One moment of an answer."""
    return json.dumps(dict(start_time=start, end_time=end, description=description))


def single(frame):
    """A moment of one frame."""
    moment = f"00:{frame / 2:05.2f}"
    return block(moment, moment)


def answered(answer):
    """A completion in the right format."""
    return f"<think>why</think>\n<answer>{answer}</answer>"


def said(*moments):
    """A completion whose answer is a list of moments."""
    return answered(f"[{', '.join(moments)}]")


# ---- programs --------------------------------------------------------------------------------------
def run_program(program, *arguments, processes=0):
    """A program as users start it, under torchrun if `processes` is given."""
    launcher = []
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(ROOT / program), "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def train_here(folder, monkeypatch, *arguments) -> list[dict]:
    """Runs train.py in a folder, small. Returns the rows of its log."""
    monkeypatch.chdir(folder)
    small = ["--name", "here", "--group", "2", "--max_new_tokens", "64", "--device", "cpu", "--threads", "1"]
    train.main([*map(str, arguments), *small])
    with open(folder / "out/here/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def evaluate_here(out, *arguments) -> dict:
    """Runs eval.py. Returns its results."""
    small = ["--max_new_tokens", "48", "--device", "cpu"]
    evaluation.main([*small, *map(str, arguments), "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def write_miniature(benchmark, root, videos=2):
    """A miniature of a benchmark, of remembered scenes."""
    import benchmarks.mini as mini
    patched = mini.toy_scene
    mini.toy_scene = seen_scene
    try:
        mini.write_mini(benchmark, str(root), videos=videos)
    finally:
        mini.toy_scene = patched

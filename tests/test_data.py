"""data.py: Processor against transformers, its directory, prompts, tasks, clips, files, and reading text."""
import argparse
import json
import re
import shutil
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

import data
from benchmarks.toy import toy_clip
from data import (
    FIRST_FRAME_TASK,
    KEYFRAME_TASK,
    KEYFRAMES,
    LONGEST_QUERY,
    PICTURE_TASK,
    QUESTION_FORMS,
    QUESTION_TASK,
    SAMPLE_RATE,
    TASKS,
    Clip,
    Frames,
    Processor,
    answer_text,
    check_text,
    first_frame_prompt,
    format_time,
    frames_to_ground,
    grounding_prompt,
    is_null,
    keyframe_prompt,
    keyframes,
    own_boxes,
    parse_boxes,
    parse_moments,
    parse_time,
    prompt,
    prompt_inputs,
    spread,
)
from rewards import format_reward
from tests.world import SMALL_FILES, TOY, answered, block, naming, noise_picture, said
from trust import options
from trust.errors import BadInput
from trust.options import JoinWords, Parser, device_name, true_or_false

# Preprocessing of Qwen2.5-Omni-7B.
REAL = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    feature_size=128,
    hop_length=160,
    n_fft=400,
    chunk_length=300,
    sampling_rate=16000,
    padding_value=0.0,
    padding_side="right",
    return_attention_mask=True,
    dither=0.0,
    image_processor_type="Qwen2VLImageProcessor",
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
)
SPECIAL_TOKENS = dict(
    image_token="<|IMAGE|>",
    video_token="<|VIDEO|>",
    audio_token="<|AUDIO|>",
    vision_bos_token="<|vision_bos|>",
    vision_eos_token="<|vision_eos|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)


# ---- media of noise --------------------------------------------------------------------------------
def noise_clip(width, height, T, seconds=None, query="the dog", **fields):
    """T pictures of noise, with a rising tone that begins loud and ends faint.

    seconds: of the tone, which need not last as long as the pictures; None for no sound.
    """
    sound = None
    if seconds is not None:
        time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        tone = np.sin(2 * np.pi * (300 + 200 * time) * time)
        sound = (0.3 * np.exp(-time) * tone).astype(np.float32)

    def read(t):
        return noise_picture(width, height, t)

    return Clip("", Frames(read, range(T)), query, sound=sound, **fields)


def keyframe_inputs(processor, clip):
    return processor.video_inputs(keyframe_prompt(clip), clip.frames, clip.fps, clip.sound)


# ---- Processor against transformers ----------------------------------------------------------------
class Reference:
    """transformers' processor and position ids for the preprocessing values of a directory."""

    def __init__(self, path, video_tokens, image_tokens):
        values = json.loads((path / "preprocessor_config.json").read_text())
        vision = {}
        for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
            vision[name] = values[name]
        # Pixels of a visual token.
        area = (vision["patch_size"] * vision["merge_size"]) ** 2
        self.frame_size = dict(shortest_edge=1, longest_edge=video_tokens * area)
        picture_size = dict(shortest_edge=1, longest_edge=image_tokens * area)
        self.processor = Qwen2_5OmniProcessor(
            Qwen2VLImageProcessor(size=picture_size, **vision),
            Qwen2VLVideoProcessor(size=self.frame_size, **vision),
            WhisperFeatureExtractor.from_pretrained(path),
            AutoTokenizer.from_pretrained(path, extra_special_tokens=SPECIAL_TOKENS))
        config = json.loads((path / "config.json").read_text())
        # get_rope_index needs no weights.
        with torch.device("meta"):
            self.thinker = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**config))

    def inputs(self, messages, sound=None, apart=False, **media):
        """What transformers makes of it, with `positions` (3, P) added.

        apart: the sound is not that of the video.
        """
        options = dict(size=self.frame_size)
        if apart or sound is not None:
            media["audio"] = [sound]
        interleaved = sound is not None and not apart
        if interleaved:
            config = self.thinker.config
            options["seconds_per_chunk"] = float(config.seconds_per_chunk)
            options["position_id_per_seconds"] = config.position_id_per_seconds
            # transformers from 5.20 on.
            if hasattr(self.processor, "load_audio_from_video"):
                media.update(load_audio_from_video=True, audio_from_video_indices=[0])
            else:
                options["use_audio_in_video"] = True
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        out = self.processor(text=[text], return_tensors="pt", videos_kwargs=options, **media)
        return {**out, "positions": self.positions(out, interleaved)}

    def positions(self, out, interleaved):
        heard = out.get("feature_attention_mask")
        if heard is not None:
            heard = heard.sum(-1)
        seconds = out.get("video_second_per_grid")
        if seconds is not None:
            seconds = torch.as_tensor(seconds)
        positions, _ = self.thinker.get_rope_index(
            out["input_ids"], out.get("image_grid_thw"), out.get("video_grid_thw"), out["attention_mask"],
            interleaved, heard, seconds)
        return positions[:, 0]


@pytest.fixture(scope="module")
def toy():
    return Processor(str(TOY))


@pytest.fixture(scope="module", params=["toy", "7B"])
def pair(request, tmp_path_factory):
    """Our processor, transformers', and the side in pixels of one visual token."""
    path = TOY
    if request.param == "7B":
        path = tmp_path_factory.mktemp("real")
        write_real(path)
    ours = Processor(str(path))
    reference = Reference(path, ours.video_tokens, ours.image_tokens)
    return SimpleNamespace(ours=ours, reference=reference, side=ours.patch * ours.merge)


def write_real(path):
    """A directory with the toy's tokenizer and all else as in Qwen2.5-Omni-7B."""
    shutil.copytree(TOY, path, ignore=SMALL_FILES, dirs_exist_ok=True)
    (path / "preprocessor_config.json").write_text(json.dumps(REAL))
    config = json.loads((TOY / "config.json").read_text())
    config.update(position_id_per_seconds=25, seconds_per_chunk=2)
    config["vision_config"].update(patch_size=14)
    config["audio_config"].update(num_mel_bins=128)
    (path / "config.json").write_text(json.dumps(config))


def assert_equal(ours, theirs, kind, pixel_tolerance=1e-5):
    suffix = "" if kind == "image" else "_videos"
    assert ours.ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(ours.positions, theirs["positions"])
    assert torch.equal(ours.grid, theirs[f"{kind}_grid_thw"])
    assert ours.patches.dtype == torch.float32
    pixels = theirs[f"pixel_values{suffix}"].float()
    torch.testing.assert_close(ours.patches, pixels, rtol=0, atol=pixel_tolerance)


def assert_same_sound(ours, theirs):
    heard = theirs["feature_attention_mask"][0].bool()
    mel = theirs["input_features"][0][:, heard].float()
    torch.testing.assert_close(ours.mel, mel, rtol=0, atol=1e-4)


def both_videos(pair, clip):
    """(our Inputs, transformers') of a clip's keyframe prompt."""
    pixels = []
    for t in range(len(clip.frames)):
        frame = torch.from_numpy(np.array(clip.frames[t]))
        pixels.append(frame.permute(2, 0, 1))
    video = torch.stack(pixels)    # [T, 3, H, W]
    theirs = pair.reference.inputs(keyframe_prompt(clip), clip.sound, videos=[video])
    return keyframe_inputs(pair.ours, clip), theirs


def both_pictures(pair, picture):
    """(our Inputs, transformers') of a grounding prompt."""
    messages = grounding_prompt("the dog")
    theirs = pair.reference.inputs(messages, images=[picture])
    return pair.ours.image_inputs(messages, picture), theirs


def test_picture_equals_transformers(pair):
    inputs, theirs = both_pictures(pair, noise_picture(6 * pair.side, 3 * pair.side))
    assert_equal(inputs, theirs, "image")
    assert inputs.scale == (1.0, 1.0)
    assert inputs.mel is None


@pytest.mark.parametrize("seconds", [0.9, 10.0])
def test_picture_and_sound_apart_equal_transformers(pair, seconds):
    clip = noise_clip(5 * pair.side, 2 * pair.side, 1, seconds)
    messages = first_frame_prompt(clip)
    picture = clip.frames[0]
    inputs = pair.ours.image_inputs(messages, picture, clip.sound)
    theirs = pair.reference.inputs(messages, clip.sound, apart=True, images=[picture])
    assert_equal(inputs, theirs, "image")
    assert_same_sound(inputs, theirs)


@pytest.mark.parametrize("T", [1, 4, 7])
def test_silent_video_equals_transformers(pair, T):
    clip = noise_clip(3 * pair.side, 2 * pair.side, T)
    inputs, theirs = both_videos(pair, clip)
    assert_equal(inputs, theirs, "video")
    assert inputs.grid[0, 0] == (T + 1) // 2


# turns: how often video and sound take turns, which they do until one of them has run out.
@pytest.mark.parametrize("T, seconds, turns", [
    (8, 4.0, 3),
    (8, 5.23, 3),
    (9, 2.6, 4),
    (12, 2.0, 2),
    (3, 7.0, 1),
    (7, 0.9, 2),
])
def test_video_with_sound_equals_transformers(pair, T, seconds, turns):
    clip = noise_clip(2 * pair.side, pair.side, T, seconds)
    inputs, theirs = both_videos(pair, clip)
    assert_equal(inputs, theirs, "video")
    assert_same_sound(inputs, theirs)
    media = (pair.ours.video, pair.ours.audio)
    kinds = [token for token in inputs.ids.tolist() if token in media]
    assert np.count_nonzero(np.diff(kinds)) == turns


def test_text_goes_on_after_the_last_chunk_even_where_an_earlier_one_is_wider(pair):
    # More columns than there are position ids in 2.6 s of sound.
    columns = {16: 9, 28: 80}[pair.side]
    clip = noise_clip(columns * pair.side, pair.side, 2, 2.6)
    inputs, theirs = both_videos(pair, clip)
    assert_equal(inputs, theirs, "video")


def test_shrunk_pictures_equal_transformers(pair):
    """Sizes for which both rules lead to the same number of tokens; resizing may differ by rounding."""
    if pair.side == 16:
        frame = (238, 128)
        width, height = (258, 160)
    else:
        frame = (556, 300)
        width, height = (1728, 800)
    tolerance = 1.01 / 255 / float(pair.ours.std.min())
    inputs, theirs = both_videos(pair, noise_clip(*frame, 2))
    assert_equal(inputs, theirs, "video", tolerance)

    inputs, theirs = both_pictures(pair, noise_picture(width, height))
    assert_equal(inputs, theirs, "image", tolerance)
    _, rows, columns = inputs.grid[0].tolist()
    across, down = inputs.scale
    assert across == pytest.approx(width / (columns * pair.ours.patch))
    assert down == pytest.approx(height / (rows * pair.ours.patch))
    assert min(inputs.scale) > 1


def picture_sizes(side):
    """500 drawn (width, height), and some at the edge of what is possible."""
    rng = np.random.default_rng(0)
    logarithms = rng.uniform(0, np.log(6000), (500, 2))
    sizes = np.exp(logarithms).astype(int).tolist()
    sizes += [(1, 1), (1, 50000), (50000, 1)]
    sizes += [(side, side), (side + 1, side - 1), (1920, 1080)]
    return sizes


def test_token_budget_is_kept(pair):
    side = pair.side
    for width, height in picture_sizes(side):
        for tokens in (1, 9, 128, 900):
            h, w = pair.ours.resized((width, height), tokens)
            rows = h // side
            columns = w // side
            assert (rows * side, columns * side) == (h, w)
            assert 1 <= rows * columns <= tokens
            # Never enlarged.
            assert rows <= max(1, round(height / side))
            assert columns <= max(1, round(width / side))
            if min(rows, columns) >= 4:
                assert 0.75 < (w / h) / (width / height) < 1.33
                # A budget that binds is used.
                if width * height >= tokens * side * side:
                    assert rows * columns >= 0.75 * tokens


def test_a_sound_too_short_for_a_token_counts_as_none(pair):
    ours = pair.ours
    hop = ours.features.hop_length
    for samples in (0, 1, hop, 2 * hop):
        clip = noise_clip(pair.side, pair.side, 2, samples / SAMPLE_RATE)
        inputs = keyframe_inputs(ours, clip)
        assert inputs.mel is None
        assert ours.audio not in inputs.ids
        assert ours.marks["audio_bos"] not in inputs.ids
    clip = noise_clip(pair.side, pair.side, 2, 3 * hop / SAMPLE_RATE)
    inputs = keyframe_inputs(ours, clip)
    assert (inputs.ids == ours.audio).sum() == 1


# One window of silence follows a sound, if the extractor's window has room for it.
@pytest.mark.parametrize("beyond", [-1000, -200, 0, 7, 16000])
def test_a_sound_longer_than_the_window_is_cut_as_in_transformers(beyond, toy):
    reference = Reference(TOY, toy.video_tokens, toy.image_tokens)
    seconds = (toy.features.n_samples + beyond) / SAMPLE_RATE
    clip = noise_clip(32, 32, 1, seconds)
    clip.sound = np.random.default_rng(0).normal(0, 0.1, len(clip.sound)).astype(np.float32)
    messages = first_frame_prompt(clip)
    inputs = toy.image_inputs(messages, clip.frames[0], clip.sound)
    theirs = reference.inputs(messages, clip.sound, apart=True, images=[clip.frames[0]])
    assert_equal(inputs, theirs, "image")
    assert_same_sound(inputs, theirs)
    assert inputs.mel.shape[1] <= toy.features.nb_max_frames


# ---- Processor's directory -------------------------------------------------------------------------
def saved_copy(processor, path):
    """The Processor of a directory that `processor` saved; the Thinker writes its config.json."""
    processor.save(str(path))
    shutil.copy(TOY / "config.json", path)
    return Processor(str(path))


def test_saved_processor_gives_the_same_inputs(tmp_path, toy):
    toy.save(str(tmp_path / "new/copy"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("config.json"))
    copy = saved_copy(toy, tmp_path / "new/copy")
    clip = toy_clip("test", 0)
    a = keyframe_inputs(toy, clip)
    b = keyframe_inputs(copy, clip)
    for name in ("ids", "positions", "patches", "grid", "mel"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert copy.eos_ids == toy.eos_ids
    assert copy.decode(a.ids) == toy.decode(a.ids)


MALFORMED = {
    "preprocessor_config.json": [b"{}"],
    "config.json": [b'{"model_type": "qwen2_5_omni_thinker", "text_config": [1]}'],
    "tokenizer.json": [
        b"{}",
        b'{"model": 5}',
        b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
    "tokenizer_config.json": [b"null"],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_incomplete_policy_directory_is_named(tmp_path, name):
    path = tmp_path / "policy"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} is no directory.*hf download"):
        Processor(str(path))
    shutil.copytree(TOY, path, ignore=SMALL_FILES)
    file = path / name
    for content in (b"", b"[1]", b'{"broken": ', b"\xff", *MALFORMED[name]):
        file.write_bytes(content)
        with naming(file) as caught:
            Processor(str(path))
        assert "\n" not in str(caught.value)
    file.unlink()
    with naming(file, (FileNotFoundError, BadInput)):
        Processor(str(path))


# ---- budgets of visual tokens ----------------------------------------------------------------------
def visual_tokens(processor):
    """(tokens of a pair of frames, of a picture) where the media are large enough for any budget."""
    clip = noise_clip(640, 640, 2)
    frames, _, _ = media_tokens(processor, clip)
    _, picture, _ = media_tokens(processor, replace(clip, task="image"))
    return frames, picture


def media_tokens(processor, clip):
    """(video, image, audio) tokens of the prompt of a clip's task."""
    ids = prompt_inputs(processor, clip).ids.tolist()
    return ids.count(processor.video), ids.count(processor.image), ids.count(processor.audio)


def test_budgets_come_from_the_directory_or_are_those_of_the_paper(tmp_path, toy):
    assert (toy.video_tokens, toy.image_tokens) == visual_tokens(toy) == (9, 64)
    write_real(tmp_path)
    real = Processor(str(tmp_path))
    assert (real.video_tokens, real.image_tokens) == (128, 900)


@pytest.mark.parametrize("given, budgets", [
    (dict(video_tokens=4), (4, 64)),
    (dict(image_tokens=25), (9, 25)),
    (dict(video_tokens=16, image_tokens=100), (16, 100)),
])
def test_budgets_that_are_given_come_with_the_policy(tmp_path, given, budgets):
    ours = Processor(str(TOY), **given)
    assert (ours.video_tokens, ours.image_tokens) == visual_tokens(ours) == budgets
    copy = saved_copy(ours, tmp_path / "copy")
    assert (copy.video_tokens, copy.image_tokens) == visual_tokens(copy) == budgets
    before = json.loads((TOY / "preprocessor_config.json").read_text())
    after = json.loads((tmp_path / "copy/preprocessor_config.json").read_text())
    assert after == before | given

    # What is given again counts more than what was saved.
    other = Processor(copy.path, video_tokens=1)
    assert (other.video_tokens, other.image_tokens) == (1, budgets[1])


def test_without_budgets_preprocessing_is_copied_as_it_is(tmp_path):
    ours = Processor(str(TOY), video_tokens=0, image_tokens=0)
    ours.save(str(tmp_path))
    name = "preprocessor_config.json"
    assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()


# ---- the tokenizer and the prompt ------------------------------------------------------------------
def test_the_toys_tokenizer_knows_the_prompt(capsys):
    Processor(str(TOY))
    assert capsys.readouterr() == ("", "")


def test_a_tokenizer_that_does_not_know_the_prompt_is_told(capsys, monkeypatch):
    sentences = [sentence.replace("Then choose", "Now choose") for sentence in KEYFRAME_TASK]
    monkeypatch.setattr(data, "KEYFRAME_TASK", tuple(sentences))
    ours = Processor(str(TOY))
    out, err = capsys.readouterr()
    text = "".join(sentences)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"warning: the tokenizer of {TOY} cuts the prompt's {len(text)} letters into ")
    assert f" {len(ours.encode_text(text))} tokens" in err


def test_one_constant_is_behind_prompt_and_keyframes(capsys):
    """Another KEYFRAMES changes what is asked for and what is read; the toy says that it was made for 4."""
    with open(data.__file__) as file:
        source = file.read()
    assert source.count("\nKEYFRAMES = 4 ") == 1
    other = ModuleType("data_with_six_keyframes")
    exec(source.replace("\nKEYFRAMES = 4 ", "\nKEYFRAMES = 6 "), other.__dict__)
    clip = noise_clip(16, 16, 16)
    ours = keyframe_prompt(clip)[1]["content"][0]["text"]
    theirs = other.keyframe_prompt(clip)[1]["content"][0]["text"]
    assert "Then choose 1 to 4 short moments" in ours
    assert theirs == ours.replace("1 to 4", "1 to 6")
    moments = parse_moments(said(block("00:00.00", "00:08.00")), 16, 2.0)
    assert list(keyframes(moments)) == list(range(KEYFRAMES))
    assert list(other.keyframes(moments)) == list(range(6))
    capsys.readouterr()
    other.Processor(str(TOY))
    assert capsys.readouterr().err.startswith("warning: the tokenizer of ")


# ---- prompts ---------------------------------------------------------------------------------------
def clips_of_all_tasks(query):
    """A clip of each task, and two of "qa": a question about a picture, and one about a video."""
    choice = dict(type="multiple choice", options=[f"A. {query}", "B. no"], solution="A")
    return [
        noise_clip(32, 32, 2, query=query),
        noise_clip(32, 32, 2, 0.9, query=query, task="avs"),
        noise_clip(32, 32, 1, query=query, task="image"),
        noise_clip(32, 32, 1, query=query, task="qa", truth=choice),
        noise_clip(32, 32, 2, query=query, task="qa", truth=choice),
    ]


def prompts_with(processor, query):
    """Inputs of a query in every prompt of System 1, and in that of System 2."""
    prompts = []
    for clip in clips_of_all_tasks(query):
        prompts.append(prompt_inputs(processor, clip))
    prompts.append(processor.image_inputs(grounding_prompt(query), noise_picture(32, 32)))
    return prompts


@pytest.mark.parametrize("words", [
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "<<||AUDIO|>",
    "<|<|IMAGE|>",
    "{query} {0}",
    "<|vision_bos|><|IMAGE|><|vision_eos|>",
])
def test_queries_smuggle_no_special_tokens(words, toy):
    special = set(toy.tokenizer.get_added_vocab().values())
    assert len(special) == 10

    def specials(query):
        tokens = []
        for inputs in prompts_with(toy, query):
            ids = inputs.ids.tolist()
            tokens.append([token for token in ids if token in special])
        return tokens

    assert specials("the " + words) == specials("the dog")


def test_texts_that_are_none_are_refused():
    for text in ("the dog", "狗", "?", "🐶", "x" * LONGEST_QUERY):
        assert check_text(text, "--query") == text
    for text in ("", " \n\t", "\u200b", "x" * (LONGEST_QUERY + 1), None, 3):
        with pytest.raises(BadInput, match="^--query "):
            check_text(text, "--query")


def test_a_description_that_never_ends_is_cut(toy):
    """A completion may be one long description; System 2 reads the beginning."""
    usual = "the dog on the left " * 50
    assert usual in grounding_prompt(usual)[1]["content"][0]["text"]
    text = grounding_prompt("dog " * 10 ** 6)[1]["content"][0]["text"]
    assert len(text) < LONGEST_QUERY + 500
    clip = noise_clip(16, 16, 8, task="avs")
    (description,) = frames_to_ground(clip, answered("x" * 10 ** 6)).values()
    assert len(grounding_prompt(description)[1]["content"][0]["text"]) < LONGEST_QUERY + 500


def test_undecodable_queries_are_read(toy):
    for inputs in prompts_with(toy, "the \udcff\udce4 dog"):
        assert "the ?? dog" in toy.decode(inputs.ids)


def example_times(messages):
    return re.findall(r'_time": "([0-9:.]+)"', messages[1]["content"][0]["text"])


def test_example_times_are_drawn_only_with_a_generator():
    clip = noise_clip(16, 16, 16)
    assert example_times(keyframe_prompt(clip)) == ["00:00.00", "00:00.00"]
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(50):
        first, second = example_times(keyframe_prompt(clip, rng))
        assert 0 <= parse_time(first) <= parse_time(second) < 8
        drawn.add((first, second))
    assert len(drawn) > 25
    a = keyframe_prompt(clip, np.random.default_rng(1))
    b = keyframe_prompt(clip, np.random.default_rng(1))
    assert a == b


@pytest.mark.parametrize("seconds, text", [
    (0, "00:00.00"),
    (0.5, "00:00.50"),
    (11.5, "00:11.50"),
    (59.996, "01:00.00"),
    (62.5, "01:02.50"),
    (3600, "60:00.00"),
])
def test_written_times(seconds, text):
    assert format_time(seconds) == text


def test_times_survive_writing_and_reading():
    steps = np.arange(0, 200, 0.37)
    film = np.arange(300) / 23.976
    for seconds in [*steps, *film]:
        text = format_time(seconds)
        assert re.fullmatch(r"\d\d:[0-5]\d\.\d\d", text)
        assert parse_time(text) == pytest.approx(seconds, abs=0.0051)


# ---- tasks -----------------------------------------------------------------------------------------
def prompt_parts(clip, rng=None):
    """(text, kinds of media) of the user's message."""
    system, user = prompt(clip, rng)
    assert (system["role"], user["role"]) == ("system", "user")
    text, *media = user["content"]
    return text["text"], [part["type"] for part in media]


def test_tasks_say_what_is_tracked():
    tracked = {name: task.tracked for name, task in TASKS.items()}
    assert tracked == {"vos": True, "avs": False, "image": False, "qa": False, "grounding": False}


def test_task_vos_shows_the_video_with_its_sound(toy):
    clip = noise_clip(128, 128, 8, 4.0)
    text, media = prompt_parts(clip)
    times = dict(first="00:00.00", second="00:00.00", end="00:04.00")
    assert text == "".join(KEYFRAME_TASK).format(query="the dog", **times)
    assert media == ["video"]
    drawn = keyframe_prompt(clip, np.random.default_rng(3))
    assert prompt(clip, np.random.default_rng(3)) == drawn != prompt(clip)

    # 4 pairs of frames of 3 x 3 tokens.
    video, image, audio = media_tokens(toy, clip)
    assert (video, image) == (36, 0)
    assert audio > 0


def test_task_vos_grounds_its_keyframes():
    clip = noise_clip(16, 16, 8)
    late = block("00:03.00", "00:03.00", "late")
    early = block("00:00.00", "00:00.50", "early")
    assert frames_to_ground(clip, said(late, early)) == {0: "early", 1: "early", 6: "late"}
    whole = said(block("00:00.00", "00:04.00"))
    assert len(frames_to_ground(clip, whole)) == KEYFRAMES
    for nothing in (answered("null"), answered("the dog"), said(), ""):
        assert frames_to_ground(clip, nothing) == {}
    assert own_boxes(clip, answered('{"bbox_2d": [1, 2, 3, 4]}')) == []


def test_task_avs_shows_the_first_frame_and_the_sound(toy):
    clip = noise_clip(160, 160, 8, 4.0, task="avs")
    text, media = prompt_parts(clip)
    assert text == "".join(FIRST_FRAME_TASK).format(query="the dog")
    assert media == ["image", "audio"]
    video, image, audio = media_tokens(toy, clip)
    assert (video, image) == (0, 64)
    assert audio > 0
    silent = replace(clip, sound=None)
    assert prompt_parts(silent) == (text, ["image"])
    assert media_tokens(toy, silent) == (0, 64, 0)


def test_task_avs_grounds_its_description_on_the_first_frame():
    clip = noise_clip(16, 16, 8, task="avs")
    assert frames_to_ground(clip, answered(" the dog on the left\n")) == {0: "the dog on the left"}
    for nothing in ("null", " null ", ""):
        assert frames_to_ground(clip, answered(nothing)) == {}
    for unclosed in ("<answer>the dog", ""):
        assert frames_to_ground(clip, unclosed) == {}
    assert own_boxes(clip, answered('{"bbox_2d": [1, 2, 3, 4]}')) == []


def test_task_image_shows_the_picture(toy):
    clip = noise_clip(160, 160, 1, 4.0, task="image")
    text, media = prompt_parts(clip)
    assert text == "".join(PICTURE_TASK).format(query="the dog")
    assert media == ["image"]
    assert media_tokens(toy, clip) == (0, 64, 0)


def test_task_image_draws_its_own_box():
    clip = noise_clip(16, 16, 1, task="image")
    box = '{"bbox_2d": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4]}'
    second = '{"bbox_2d": [5, 6, 7, 8]}'
    assert own_boxes(clip, answered(box)) == [(1, 2, 3, 4)]
    assert own_boxes(clip, answered(second + box)) == [(5, 6, 7, 8)]
    assert own_boxes(clip, f"<think>{second}</think><answer>{box}</answer>{second}") == [(1, 2, 3, 4)]
    for nothing in (answered("null"), answered("[1, 2, 3, 4]"), box, f"<answer>{box}", ""):
        assert own_boxes(clip, nothing) == []
    assert frames_to_ground(clip, answered(box)) == {}
    assert frames_to_ground(clip, said(block("00:00.00", "00:00.00"))) == {}


@pytest.mark.parametrize("kind", QUESTION_FORMS)
def test_task_qa_asks_its_question(kind):
    truth = dict(type=kind, options=["A. a <|cat|>", "B. a dog"], solution="B")
    clip = noise_clip(64, 64, 4, 4.0, query="What barks?", task="qa", truth=truth)
    text, media = prompt_parts(clip)
    options = "A. a < |cat|>\nB. a dog\n"
    expected = "".join(QUESTION_TASK)
    expected = expected.format(query="What barks?", options=options, form=QUESTION_FORMS[kind])
    assert text == expected
    assert media == ["video"]
    for answer in ("a dog", '{"bbox_2d": [1, 2, 3, 4]}', block("00:00.00", "00:00.00")):
        assert frames_to_ground(clip, answered(answer)) == {}
        assert own_boxes(clip, answered(answer)) == []


def test_task_qa_shows_a_video_with_its_sound_or_one_picture(toy):
    truth = dict(type="free-form", options=[], solution="a dog")
    clip = noise_clip(160, 160, 4, 2.0, task="qa", truth=truth)
    video, image, audio = media_tokens(toy, clip)
    assert (video, image) == (18, 0)
    assert audio > 0
    picture = noise_clip(160, 160, 1, task="qa", truth=truth)
    assert prompt_parts(picture)[1] == ["image"]
    assert media_tokens(toy, picture) == (0, 64, 0)


# ---- clips -----------------------------------------------------------------------------------------
LENGTHS = [
    (1, 24),
    (24, 24),
    (25, 24),
    (47, 24),
    (100, 24),
    (1000, 8),
]


@pytest.mark.parametrize("T, most", LENGTHS)
def test_sampled_frames_are_evenly_spaced_and_read_late(T, most):
    reads = []

    def read(t):
        reads.append(t)
        return Image.new("RGB", (T, 1), (t % 256, t // 256, 0))

    sound = np.zeros(16, np.float32)
    # Frame t's mask is at x = t.
    masks = np.eye(T, dtype=bool)[None, :, None]
    clip = Clip("", Frames(read, range(T)), "", 24.0, sound, masks)
    sampled, indices = clip.sampled(most)
    assert reads == []
    assert indices == spread(T, most)
    assert len(indices) == len(sampled.frames)
    assert sampled.masks[0, :, 0].argmax(1).tolist() == indices
    assert sampled.fps == 2.0
    assert sampled.sound is sound
    assert sampled.size == (1, T)

    middle = len(indices) // 2
    red, green, _ = sampled.frames[middle].getpixel((0, 0))
    assert red + 256 * green == indices[middle]
    assert reads == [indices[middle]]


@pytest.mark.parametrize("T, most", LENGTHS)
def test_spread_is_even(T, most):
    indices = spread(T, most)
    assert indices[0] == 0
    assert indices[-1] == T - 1
    assert len(indices) == min(T, most)
    if T > 1:
        steps = np.diff(indices)
        assert steps.min() >= 1
        assert np.ptp(steps) <= 1


def test_spread_by_hand():
    assert spread(5, 3) == [0, 2, 4]
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(11, 2) == [0, 10]
    assert spread(11, 1) == [0]
    assert spread(3, 8) == [0, 1, 2]
    for index in spread(100, 7):
        assert type(index) is int


def test_clip_without_masks_takes_its_size_from_the_first_frame():
    clip = noise_clip(40, 24, 30)
    assert clip.size == (24, 40)
    assert clip.sampled()[0].masks is None


# ---- reading text ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text, reward", [
    ("<think>a</think><answer>b</answer>", 1),
    ("<think>a\nb</think> \n\t<answer>\n</answer>", 1),
    ("", 0),
    ("<think>a</think><answer>b</answer> and more", 0),
    ("well: <think>a</think><answer>b</answer>", 0),
    ("<think>a</think>then<answer>b</answer>", 0),
    ("<think>a</think><answer>b", 0),
    ("<answer>b</answer>", 0),
    ("<answer>b</answer><think>a</think>", 0),
    ("<think>a<answer>b</answer></think>", 0),
    ("<think><think>a</think></think><answer>b</answer>", 0),
    ("<think>a</think><answer><answer>b</answer></answer>", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ("<think>a</think><answer><think>b</answer>", 0),
])
def test_format_reward(text, reward):
    assert format_reward(text) == reward


def test_answer_text_and_null():
    assert answer_text("<answer> b </answer><answer>c</answer>") == "b"
    assert answer_text("</answer><answer>b</answer>") == "b"
    for text in ("<answer>b", "b</answer>", ""):
        assert answer_text(text) == ""
    assert is_null(" null\n")
    for answer in ("", "nullify", '"null"'):
        assert not is_null(answer)


@pytest.mark.parametrize("value, seconds", [
    ("01:02.50", 62.5),
    ("0:00.5", 0.5),
    ("00:07.25 or so", 7.25),
    ("00:07", None),
    ("7.25", None),
    (" 00:01.00", None),
    ("-0:01.00", None),
    ("", None),
    (None, None),
    (3.5, None),
    (["00:01.00"], None),
    ("9" * 10 ** 6 + ":00.00", None),
    ("00:00." + "9" * 10 ** 6, 0.999999),
    ("inf:00.00", None),
    ("00:nan", None),
])
def test_parse_time(value, seconds):
    assert parse_time(value) == seconds


# 8 frames at 2 per second: 4 s.
@pytest.mark.parametrize("text, parsed, frames", [
    # floor(2.0) to floor(3.98)
    (block("00:01.00", "00:01.99"), True, [2, 3]),
    # floor(7.2) to floor(8.0), clipped to 7
    (block("00:03.60", "00:04.00"), True, [7]),
    # It ends after the clip.
    (block("00:03.60", "00:04.01"), True, []),
    # Swapped.
    (block("00:02.00", "00:01.00"), True, []),
    # Swapped within one frame.
    (block("00:01.40", "00:01.00"), True, []),
    (block("00:01", "00:02.00"), False, []),
    (block(1.0, 2.0), False, []),
    (block("00:01.00", "00:02.00", " "), False, []),
    (block("00:01.00", "00:02.00", 3), False, []),
    (block("00:01.00", "00:02.00", "..."), False, []),
    (block("00:01.00", "00:02.00", "\u200b"), False, []),
    (block("00:01.00", "00:01.00", "狗"), True, [2]),
    ('{"start_time": "00:01.00", "end_time": "00:02.00"}', False, []),
    # One block from the first brace: not JSON.
    ('{ ' + block("00:01.00", "00:02.00"), False, []),
])
def test_one_moment(text, parsed, frames):
    (moment,) = parse_moments(said(text), 8, 2.0)
    assert (moment.parsed, moment.frames) == (parsed, frames)


def test_moments_outside_the_answer_do_not_count():
    one = block("00:01.00", "00:01.00")
    assert parse_moments(f"<think>{one}</think><answer></answer>{one}", 8, 2.0) == []
    assert parse_moments(f"<answer>{one}", 8, 2.0) == []
    # The lone brace swallows its follower.
    assert len(parse_moments(said(one, "{}", "{", one), 8, 2.0)) == 3


def test_half_a_surrogate_pair_becomes_a_question_mark():
    (moment,) = parse_moments(said(block("00:01.00", "00:01.00", "dog \ud83d")), 8, 2.0)
    assert moment.description == "dog ?"


def test_keyframes_in_time_order_first_block_wins():
    late = block("00:02.00", "00:03.00", "late")
    early = block("00:01.00", "00:02.00", "early")
    moments = parse_moments(said(late, early), 8, 2.0)
    # Frame 6 is the fifth.
    chosen = keyframes(moments)
    assert chosen == {2: "early", 3: "early", 4: "late", 5: "late"}
    assert list(chosen) == [2, 3, 4, 5]
    assert keyframes(moments, most=1) == {2: "early"}


@pytest.mark.parametrize("text, boxes", [
    ('{"bbox_2d": [1, 2, 3, 4]}', [(1, 2, 3, 4)]),
    ("null", []),
    ("", []),
    (
        '<answer>```json\n[{"label": "a}", "bbox_2d" : [1,2,3,4]}, {"bbox_2d":[0, 0.5, 0, 9]}]```',
        [(1, 2, 3, 4), (0, 0.5, 0, 9)],
    ),
    ('{"all": [{"bbox_2d": [1, 2, 3, 4]}]}', [(1, 2, 3, 4)]),
    ('{"bbox_2d": [3, 2, 1, 4]}{"bbox_2d": [1, 4, 3, 2]}', []),
    ('{"bbox_2d": [1, 2, 3]}{"bbox_2d": []}', []),
    ('{"bbox_2d": [true, 2, 3, 4]}{"bbox_2d": ["1", 2, 3, 4]}{"bbox_2d": [1, 2, null, 4]}', []),
    ('{"bbox_2d": [NaN, 2, 3, 4]}{"bbox_2d": [1, 2, Infinity, 4]}{"bbox_2d": [1, 2, 1e7, 4]}', []),
    ('{"bbox_2d": [1, 2, ' + "9" * 5000 + ', 4]}', []),
    ('{"bbox_2d": [[1, 2, 3, 4]', []),
    ('{"bbox_2d": [1, 2, 3, 4]}' * 50, [(1, 2, 3, 4)] * 16),
])
def test_parse_boxes(text, boxes):
    assert parse_boxes(text) == boxes


# ---- arguments of programs -------------------------------------------------------------------------
def test_words_of_an_argument_become_one():
    parser = Parser()
    parser.add_argument("--system2", nargs="+", action=JoinWords, default="policy")
    parser.add_argument("--limit", type=int)
    assert parser.parse_args([]).system2 == "policy"
    assert parser.parse_args(["--system2", "file.py"]).system2 == "file.py"
    options = parser.parse_args(["--system2", "reference", "DIR", "--limit", "3"])
    assert (options.system2, options.limit) == ("reference DIR", 3)


def test_true_or_false():
    for text in ("true", "True", "TRUE"):
        assert true_or_false(text) is True
    for text in ("false", "False"):
        assert true_or_false(text) is False
    for text in ("", "yes", "1", "no", " true"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^true or false expected, not {text}$"):
            true_or_false(text)


@pytest.mark.parametrize("there", [True, False])
def test_device_name(monkeypatch, there):
    monkeypatch.setattr(options, "has_gpu", lambda: there)
    assert device_name("cpu") == "cpu"
    assert device_name("auto") == "auto"
    refused = ["mps", "CPU", "", "cuda:1"]
    if there:
        assert device_name("cuda") == "cuda"
    else:
        refused.append("cuda")
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"where there is such a GPU, not {text}$"):
            device_name(text)


def test_errors_of_arguments_are_one_line(capsys):
    parser = Parser()
    parser.add_argument("--overwrite", type=true_or_false)
    parser.add_argument("--device", type=device_name)
    for arguments in (["--overwrite", "yes"], ["--device", "mps"], ["--unknown"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(arguments)
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert arguments[-1] in err

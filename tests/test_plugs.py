"""Plugs: files that ground. Masks in place of boxes, from the function to the files that are written."""
import copy
import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import segment as segment_program
from benchmarks.toy import COLOURS, toy_clip, toy_scene
from data import Clip, Frames
from rewards import TERMS, mask_box, region_similarity, vos_rewards
from segment import Answer, Tracker, follow_answers, group_requests, track_similarity
from tests.world import ROOT, evaluate_here, noise_picture, said, single, train_here
from trust.errors import BadInput
from trust.masks import Mask, square_masks
from trust.plugged import MOST_BOXES, NoBoxes, load_file, plugged

EXAMPLE = str(ROOT / "plugs/colours.py")
SA2VA = str(ROOT / "plugs/sa2va.py")


def speckled(height=30, width=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((height, width)) > 0.5


def plug(tmp_path, body, name="mine.py"):
    """System 2 of a file whose function masks has this body."""
    path = tmp_path / name
    path.write_text(f"import numpy, torch\n\ndef masks(image, description):\n    {body}\n")
    return str(path)


# ---- a mask in place of a box ----------------------------------------------------------------------
def test_a_mask_is_its_box_to_all_who_want_one():
    pixels = np.zeros((30, 40), bool)
    pixels[4:9, 7:31] = True
    mask = Mask.of(pixels)
    assert tuple(mask) == mask_box(pixels) == (7, 4, 30, 8)
    assert json.dumps({3: [mask]}) == '{"3": [[7, 4, 30, 8]]}'
    assert str([mask]) == "[(7, 4, 30, 8)]"
    assert np.array([mask]).tolist() == [[7, 4, 30, 8]]
    # An empty one has none.
    assert len(Mask.of(np.zeros((30, 40), bool))) == 0


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (30, 40), (17, 1001)])
def test_a_mask_keeps_every_pixel(height, width):
    pixels = speckled(height, width)
    mask = Mask.of(pixels)
    for same in (mask, copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert same.pixels.dtype == bool
        assert np.array_equal(same.pixels, pixels)
        assert same == mask and hash(same) == hash(mask)


def test_masks_are_equal_by_their_pixels_and_never_equal_a_box():
    whole = np.ones((30, 40), bool)
    hole = whole.copy()
    hole[5, 5] = False
    mask = Mask.of(whole)
    box = mask_box(whole)
    assert mask == Mask.of(whole.copy())
    assert not mask != Mask.of(whole.copy())
    for other in (Mask.of(hole), Mask.of(whole.reshape(40, 30)), box, None):
        assert mask != other and other != mask
        assert not mask == other
    assert len({mask, Mask.of(whole), Mask.of(hole), box}) == 3


def test_equal_masks_are_tracked_once_and_apart_from_their_box():
    mask = Mask.of(speckled())
    again = Mask.of(speckled())
    other = Mask.of(speckled(seed=1))
    box = tuple(mask)
    clip = Clip("c", Frames(lambda t: noise_picture(40, 30, t), range(4)), "it")
    boxes = [{0: [mask]}, {0: [again, box]}, {1: [mask, other]}, {}]
    (_, objects, unions), = group_requests([clip], [boxes])
    assert objects == [{0: mask}, {0: box}, {1: mask}, {1: other}]
    assert unions == [[0], [0, 1], [2, 3], []]


def test_masks_take_little_memory():
    """A whole 4K frame of it is 8 MB. What detectors give compresses well, and noise to an eighth."""
    rows = np.arange(2160)[:, None]
    columns = np.arange(3840)
    round_one = (rows - 1000) ** 2 + (columns - 1500) ** 2 < 600 ** 2
    assert len(Mask.of(round_one).bits) < 20_000
    assert len(Mask.of(speckled(2160, 3840)).bits) < 1_100_000


def test_rewards_take_boxes_from_masks():
    clip = toy_clip("test", 2)
    seen = [t for t in range(len(clip.frames)) if clip.masks[0, t].any()]
    text = said(single(seen[0]), single(seen[1]))
    masks = {}
    boxes = {}
    for t in seen[:2]:
        half = clip.masks[0, t].copy()
        half[:, :mask_box(half)[0] + 5] = False
        masks[t] = [Mask.of(half), Mask.of(clip.masks[0, t])]
        boxes[t] = [mask_box(half), mask_box(clip.masks[0, t])]
    similarity = np.full(len(clip.frames), 0.5)
    earned = vos_rewards(text, clip.masks, masks, similarity, clip.fps)
    assert earned == vos_rewards(text, clip.masks, boxes, similarity, clip.fps)
    assert earned.keys() == set(TERMS)
    assert earned["alignment"] == 1 and earned["mismatch"] < 0


@pytest.mark.parametrize("height, width", [(128, 128), (720, 1280), (300, 300), (60, 90), (7, 20)])
def test_masks_are_resized_bit_for_bit_as_the_predictor_does_it(tracker, tmp_path, height, width):
    """Of noise each pixel counts, also those that only an antialiased resize sees."""
    noise_picture(128, 128).save(tmp_path / "00000.jpg", format="png")
    pixels = torch.from_numpy(speckled(height, width))
    state = tracker.model.init_state(str(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        tracker.model.add_new_mask(state, frame_idx=0, obj_id=0, mask=pixels)
    theirs = state["mask_inputs_per_obj"][0][0]
    assert torch.equal(square_masks([pixels], 128), theirs)
    assert 0 < theirs.mean() < 1


class Still:
    """Another tracker than SAM2, with no more than the README asks for: objects stay where they are."""

    def follow(self, clips):
        for t in range(max(len(frames) for frames, _, _ in clips)):
            for c, (frames, objects, unions) in enumerate(clips):
                if t < len(frames):
                    yield c, t, self.union(frames[t].size, objects, unions)

    def union(self, size, objects, unions):
        masks = torch.zeros(len(unions), size[1], size[0], dtype=torch.bool)
        for mask, union in zip(masks, unions):
            for n in union:
                prompt, = objects[n].values()
                if isinstance(prompt, Mask):
                    mask |= torch.from_numpy(prompt.pixels)
                else:
                    x1, y1, x2, y2 = map(int, prompt)
                    mask[y1:y2 + 1, x1:x2 + 1] = True
        return masks


def test_another_tracker_needs_no_more_than_follow():
    clips = [toy_clip("test", 2), toy_clip("test", 3)]
    drawn = Mask.of(clips[0].masks[0].any(0))
    box = (10, 20, 29, 39)
    first, second = track_similarity(Still(), clips, [[{0: [drawn]}, {}], [{1: [box, drawn]}]])
    assert first.shape == (2, len(clips[0].frames)) and second.shape == (1, len(clips[1].frames))
    whole = np.broadcast_to(drawn.pixels, clips[0].masks[0].shape)
    assert np.array_equal(first[0], region_similarity(whole, clips[0].masks[0]))
    answers = [Answer("", {0: "it"}, {0: [box]}), Answer("", {}, {})]
    areas = [[], []]
    for c, _, mask in follow_answers(Still(), clips, answers):
        areas[c].append(mask.sum())
    assert areas == [[400] * len(clips[0].frames), [0] * len(clips[1].frames)]


# ---- what a file returns ---------------------------------------------------------------------------
GOOD = [
    "[numpy.eye(30, 40) > 0]",
    "(numpy.eye(30, 40) > 0,)",
    "numpy.stack([numpy.eye(30, 40) > 0])",
    "[torch.eye(30, 40) > 0]",
    "torch.eye(30, 40)[None] > 0",
    "iter([numpy.eye(30, 40) > 0])",
    "(numpy.eye(30, 40) > 0).tolist(),",
    "[numpy.zeros((30, 40), bool), numpy.eye(30, 40) > 0]",
]


@pytest.mark.parametrize("result", GOOD)
def test_a_file_may_draw_masks(tmp_path, result):
    system2 = plugged(plug(tmp_path, f"return {result}"))
    (found,), = system2([Image.new("RGB", (40, 30))], ["dog"])
    assert found == Mask.of(np.eye(30, 40, dtype=bool))
    assert tuple(found) == (0, 0, 29, 29)


def test_nothing_is_found_by_no_mask_or_by_an_empty_one(tmp_path):
    for result in ("[]", "numpy.zeros((0, 30, 40), bool)", "[numpy.zeros((30, 40), bool)] * 3"):
        system2 = plugged(plug(tmp_path, f"return {result}"))
        assert system2([Image.new("RGB", (40, 30))] * 2, ["dog", "cat"]) == [[], []]


BAD = {
    "None": "None",
    "3": "3",
    "'ab'": "'a'",
    "[None]": "None",
    "[(1, 2, 3, 4)]": r"\(1, 2, 3, 4\)",
    "[numpy.zeros((30, 40))]": r"an array of float64 \[30, 40\]",
    "[numpy.zeros((30, 40), numpy.uint8)]": r"an array of uint8 \[30, 40\]",
    "[numpy.zeros((40, 30), bool)]": r"an array of bool \[40, 30\]",
    "[numpy.zeros((1, 30, 40), bool)]": r"an array of bool \[1, 30, 40\]",
    "numpy.zeros((30, 40), bool)": r"an array of bool \[40\]",
    "[numpy.broadcast_to(True, (10 ** 9, 10 ** 9))]": r"an array of bool \[1000000000, 1000000000\]",
    "[torch.zeros(30, 40)]": r"an array of torch.float32 \[30, 40\]",
    "[torch.zeros(30, 40, device='meta') > 0]": r"an array of torch.bool \[30, 40\]",
    "[torch.zeros(30, 40, requires_grad=True)]": r"an array of torch.float32 \[30, 40\]",
    "[[[True], [True, False]]]": r"\[\[True\], \[True, False\]\]",
    "[image]": "an array|<PIL",
    "[object()]": "<object",
    "['a\\nb']": "'a",
    "[numpy.ones((30, 40), bool)] * 257": "",
    "__import__('itertools').repeat(numpy.zeros((30, 40), bool))": "repeat",
}


@pytest.mark.parametrize("result", BAD)
def test_what_a_file_draws_is_checked(tmp_path, result):
    path = plug(tmp_path, f"return {result}")
    with pytest.raises(NoBoxes) as caught:
        plugged(path)([Image.new("RGB", (40, 30))], ["dog"])
    line = str(caught.value)
    assert "\n" not in line and len(line) < 300 + len(path)
    wanted = rf"not a list of at most {MOST_BOXES} bool arrays \[30, 40\]"
    assert re.fullmatch(rf"masks\(\) of {re.escape(path)} returned ({BAD[result]}).*, {wanted}", line)


def test_masks_come_before_boxes_and_become_boxes_on_request(tmp_path):
    path = plug(tmp_path, "return [numpy.eye(30, 40) > 0, numpy.tri(30, 40) > 0]")
    with open(path, "a") as file:
        file.write("\ndef boxes(image, description):\n    raise AssertionError\n")
    pictures = [Image.new("RGB", (40, 30))]
    (one, other), = plugged(path)(pictures, ["dog"])
    assert isinstance(one, Mask) and one != other
    (one, other), = plugged(path, mask_prompt=False)(pictures, ["dog"])
    assert type(one) is tuple
    assert one == other == (0, 0, 29, 29)


def test_what_is_no_function_is_not_called(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("masks = 3\n\ndef boxes(image, description):\n    return [(1, 2, 3, 4)]\n")
    assert plugged(str(path))([Image.new("RGB", (40, 30))], ["dog"]) == [[(1, 2, 3, 4)]]
    path.write_text("masks = 3\n")
    with pytest.raises(BadInput, match=r"no function boxes\(.*\) or masks\(.*\) in: .*mine.py"):
        plugged(str(path))


# ---- the worked example ----------------------------------------------------------------------------
def test_the_example_finds_the_things_of_the_toy_world():
    system2 = plugged(EXAMPLE)
    shares = []
    for index in range(12):
        scene = toy_scene("test", index)
        for t in range(0, len(scene.pictures), 4):
            picture = Image.fromarray(scene.pictures[t])
            for thing, mask in zip(scene.things, scene.masks[:, t]):
                if mask.sum() < 30:
                    continue
                found, = system2([picture], [f"the {thing.name} on the left"])
                covered = np.any([np.zeros_like(mask), *(one.pixels for one in found)], axis=0)
                shares.append((covered & mask).sum() / (covered | mask).sum())
    assert len(shares) > 50
    assert np.mean(shares) > 0.9
    assert system2([picture], ["a dog"]) == [[]]


def test_the_examples_colours_are_the_toys():
    assert load_file(EXAMPLE).COLOURS == COLOURS


def watch_prompts(monkeypatch):
    """A list of the kinds of prompts that SAM2 gets: Mask or not."""
    kinds = []
    prompt = Tracker.prompt

    def watched(self, features, prompts):
        kinds.extend(isinstance(one, Mask) for one in prompts)
        return prompt(self, features, prompts)

    monkeypatch.setattr(Tracker, "prompt", watched)
    return kinds


@pytest.mark.parametrize("words, masked", [([], True), (["--mask_prompt", "false"], False)])
def test_masks_prompt_sam2_in_all_three_programs(tmp_path, monkeypatch, words, masked):
    kinds = watch_prompts(monkeypatch)
    words = ["--system2", EXAMPLE, *words]
    out = tmp_path / "clip"
    segment_program.main(["--device", "cpu", "--index", "10", *words, "--out", str(out)])
    assert set(kinds) == {masked}
    keyframes = json.loads((out / "answer.json").read_text())["keyframes"]
    for keyframe in keyframes:
        for x1, y1, x2, y2 in keyframe["boxes"]:
            assert 0 <= x1 <= x2 < 128 and 0 <= y1 <= y2 < 128
    assert any(keyframe["boxes"] for keyframe in keyframes)

    kinds.clear()
    results = evaluate_here(tmp_path / "eval", "--limit", 15, *words)
    assert set(kinds) == {masked}
    assert len(results["expressions"]) == 15
    claim = json.loads((tmp_path / "eval/run.json").read_text())
    assert claim["mask_prompt"] is masked

    kinds.clear()
    small = ["--batch", 2, "--steps", 1, "--workers", 0, "--validate", 0]
    row, = train_here(tmp_path, monkeypatch, *small, *words)
    assert set(kinds) <= {masked}
    written = json.loads((tmp_path / "out/here/settings.json").read_text())
    assert written["settings"]["mask_prompt"] is masked


def test_predictions_by_masks_are_not_continued_by_boxes(tmp_path, capsys):
    evaluate_here(tmp_path / "out", "--limit", 1, "--system2", EXAMPLE)
    with pytest.raises(SystemExit):
        evaluate_here(tmp_path / "out", "--limit", 2, "--system2", EXAMPLE, "--mask_prompt", "false")
    assert "holds predictions with mask_prompt True, not False" in capsys.readouterr().err


def test_a_file_that_draws_something_else_ends_the_evaluation_with_one_line(tmp_path, capsys):
    path = plug(tmp_path, "return [numpy.zeros((3, 4))]")
    with pytest.raises(SystemExit):
        evaluate_here(tmp_path / "out", "--limit", 3, "--system2", path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "returned an array of float64 [3, 4], not a list of at most 256 bool arrays [128, 128]" in last


def test_the_files_of_the_readme_ground(tmp_path):
    text = (ROOT / "plugs/README.md").read_text()
    sources = re.findall(r"```python\n# (\w+\.py)(.*?)```", text, re.DOTALL)
    assert [name for name, _ in sources] == ["brightest.py", "middle.py"]
    picture = Image.new("RGB", (40, 30))
    picture.paste((255, 255, 255), (10, 5, 20, 9))
    found = []
    for name, source in sources:
        path = tmp_path / name
        path.write_text("#" + source)
        (one,), = plugged(str(path))([picture], ["it"])
        found.append(one)
    assert [tuple(one) for one in found] == [(10, 5, 19, 8), (10, 7, 30, 22)]
    assert isinstance(found[0], Mask)


# ---- Sa2VA -----------------------------------------------------------------------------------------
# Stands for the code beside the weights: the published names, arguments and results, and no network behind.
STAND_IN = '''
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "sa2va_chat"

class NAME(PreTrainedModel):
    config_class = Config

    def __init__(self, config, use_flash_attn=True):
        super().__init__(config)
        self.flash = use_flash_attn
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def predict_forward(self, image=None, video=None, text=None, past_text='', mask_prompts=None,
                        tokenizer=None, processor=None):
        assert ("Qwen" in type(self).__name__) == (processor is not None)
        assert (processor is None) != (tokenizer is None)
        assert video is None and not torch.is_grad_enabled() and not self.training
        assert self.weight.dtype == torch.bfloat16
        assert text.startswith("<image>")
        masks = []
        for n in range(text.count("dog")):
            mask = np.zeros((1, image.height, image.width), bool)
            mask[0, n:n + 3, :5] = True
            masks.append(mask)
        return {"prediction": "Sure, " + "[SEG] " * len(masks) + "<|im_end|>", "prediction_masks": masks}
'''


@pytest.fixture
def sa2va(tmp_path, monkeypatch):
    """(name of its class) -> the folder of a stand-in. Code is copied below tmp_path."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = []

    def reader(kind):
        def from_pretrained(name, revision, code_revision, trust_remote_code):
            assert revision == code_revision
            asked.append((kind, name, revision, trust_remote_code))
            return kind
        return types.SimpleNamespace(from_pretrained=from_pretrained)

    def make(name):
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / "standin.py").write_text(STAND_IN.replace("NAME", name))
        auto = dict(AutoConfig="standin.Config", AutoModel=f"standin.{name}")
        config = dict(model_type="sa2va_chat", architectures=[name], auto_map=auto)
        (folder / "config.json").write_text(json.dumps(config))
        weights = dict(weight=torch.zeros(1, dtype=torch.bfloat16))
        save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
        monkeypatch.setenv("SA2VA", str(folder))
        return folder

    monkeypatch.setattr(transformers, "AutoProcessor", reader("processor"))
    monkeypatch.setattr(transformers, "AutoTokenizer", reader("tokenizer"))
    make.asked = asked
    return make


@pytest.mark.parametrize("name, kind", [
    ("Sa2VAChatModel", "tokenizer"),
    ("Sa2VAChatModelQwen", "processor"),
])
def test_sa2va_gives_the_masks_of_its_answer(sa2va, capsys, monkeypatch, name, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = sa2va(name)
    system2 = plugged(SA2VA)
    assert sa2va.asked == [(kind, str(folder), None, True)]
    assert f"runs the code of {folder}" in capsys.readouterr().err
    pictures = [Image.new("RGB", (40, 30)), Image.new("RGB", (20, 10)), Image.new("RGB", (20, 10))]
    found = system2(pictures, ["two dogs, a dog", "the dog", "nothing"])
    assert [list(map(tuple, masks)) for masks in found] == [[(0, 0, 4, 2), (0, 1, 4, 3)], [(0, 0, 4, 2)], []]
    assert found[0][0].pixels.shape == (30, 40)


@pytest.mark.parametrize("revision", [None, "", "main", "f9a506a", "g" * 40])
def test_sa2va_wants_a_commit(monkeypatch, revision):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", never)
    monkeypatch.setenv("SA2VA", "somebody/Sa2VA-4B")
    monkeypatch.delenv("SA2VA_REVISION", raising=False)
    if revision is not None:
        monkeypatch.setenv("SA2VA_REVISION", revision)
    with pytest.raises(BadInput, match="SA2VA_REVISION=.*40 digits of a commit, whose code runs"):
        plugged(SA2VA)


def test_sa2va_is_loaded_at_the_commit(monkeypatch, sa2va):
    model = types.SimpleNamespace(eval=lambda: model, to=lambda device: model)
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options, name=name)
        return model

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    monkeypatch.setenv("SA2VA", "somebody/Sa2VA-4B")
    monkeypatch.setenv("SA2VA_REVISION", "0123456789" * 4)
    plugged(SA2VA)
    assert asked["name"] == "somebody/Sa2VA-4B"
    assert asked["revision"] == asked["code_revision"] == "0123456789" * 4
    assert asked["trust_remote_code"] is True
    assert sa2va.asked == [("tokenizer", "somebody/Sa2VA-4B", "0123456789" * 4, True)]


def test_a_missing_commit_is_one_line_of_the_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SA2VA", "a/b")
    monkeypatch.delenv("SA2VA_REVISION", raising=False)
    with pytest.raises(SystemExit) as stop:
        segment_program.main(["--system2", SA2VA, "--device", "cpu", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "a/b needs the 40 digits of a commit" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("function", ["boxes", "masks"])
def test_an_error_inside_a_generator_is_the_files_own(tmp_path, function):
    """Hidden behind a line on what was returned, its author would look for it in vain."""
    path = tmp_path / "generator.py"
    path.write_text(f"def {function}(image, description):\n    yield from ()\n    int('seven')\n")
    with pytest.raises(ValueError, match="invalid literal.*'seven'") as caught:
        plugged(str(path))([Image.new("RGB", (40, 30))], ["dog"])
    assert not isinstance(caught.value, NoBoxes)


@pytest.mark.parametrize("box", ["(0, 0, float('nan'), 1)", "(2, 0, 1, 1)", "(0, 0, 10 ** 400, 1)", "'abcd'"])
def test_a_generator_is_checked_as_a_list_is(tmp_path, box):
    path = tmp_path / "{generator}.py"
    path.write_text(f"def boxes(image, description):\n    yield {box}\n")
    with pytest.raises(NoBoxes, match="returned <generator"):
        plugged(str(path))([Image.new("RGB", (40, 30))], ["dog"])

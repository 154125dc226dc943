"""The pages: what is kept of rollouts, what a page holds, and how a browser shows it.

Tests with a browser need chromium and chromedriver (Debian: chromium, chromium-driver).
"""
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
import zipfile
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from benchmarks import results
from benchmarks.predictions import write_prediction
from benchmarks.toy import TOY, toy_clip
from data import Clip, Frames
from report import causes, draw, page, training
from report.causes import cause_of
from report.draw import Shown, draw_case
from report.evaluation import ends_of, galleries, questions
from run import rollouts
from run.boards import start_boards
from run.log import Watch
from run.rollouts import Album, look_steps, read_looks, write_look
from trust.errors import BadInput

EVIL = "</pre></script><script>document.title='it ran'</script><img src='http://127.0.0.1:9/x' onerror=" \
       "\"document.title='it ran'\"><style>@import 'http://127.0.0.1:9/y'</style>"
TERMS = dict(base=1.6, number=0.4, mismatch=-0.5, format=1.0, malformed=0.0)
IDENTITY = dict(settings=dict(name="a run", steps=30, batch=8, group=2, data="toy"), processes=1)


# ---- what tests build ------------------------------------------------------------------------------
def completion(text="the red one", frame=2):
    return (f'<think>It is {text}.</think><answer>[{{"start_time": "00:0{frame // 2}.00", '
            f'"end_time": "00:0{frame // 2}.00", "description": {json.dumps(text)}}}]</answer>')


def answers_of(clip, texts, **facts):
    """An answer for each text: the true masks, moved a little further each time."""
    answers = []
    for i, text in enumerate(texts):
        masks = {t: np.roll(clip.masks[:, t].any(0), 6 * i, 1) for t in range(len(clip.frames))}
        known = dict(terms=TERMS, reward=3.0 - i, advantage=1.0 - i, tokens=20) | facts
        answers.append(Shown(text, {2: "the red one"}, {2: [(10.0, 20.0, 40.0, 60.0)]}, masks, known))
    return answers


def cases(count=2, texts=(completion(), completion(EVIL))):
    made = []
    for i in range(count):
        clip = toy_clip("test", i)
        made.append((clip, answers_of(clip, texts), dict(fixed=False, seed=i, fault="")))
    clip = toy_clip("test", 50)
    made.append((clip, answers_of(clip, texts[:1]), dict(fixed=True, seed=0, fault="")))
    return made


def log_rows(count=30):
    rows = []
    for step in range(count):
        seconds = dict(rollout=1.0, masks=2.0, step=3.0)
        rows.append(dict(step=step, reward=3 + step / 30, consistency=0.5, kl=0.01 * step, tokens=20.0,
                         format=1.0, lr=1e-6, seconds=seconds, speed=dict(decode_tokens_per_s=100.0)))
    return rows


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """report.html of a run with two looks."""
    out = tmp_path_factory.mktemp("run")
    for step in (1, 30):
        write_look(str(out), step, cases())
    lines = [json.dumps(row) + "\n" for row in log_rows()]
    (out / "metrics.jsonl").write_text("".join(lines))
    rollouts.write_report(str(out), IDENTITY)
    return out / "report.html"


class Reader(HTMLParser):
    """What a page says: its text, its tags, and what is wrong with their nesting."""
    EMPTY = {"meta", "br", "img", "input", "rect", "path", "polyline", "link"}

    def __init__(self, content):
        super().__init__()
        self.words = []
        self.tags = []
        self.open = []
        self.wrong = []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# ---- a case ----------------------------------------------------------------------------------------
def test_a_record_holds_what_a_rollout_is():
    clip = toy_clip("test", 3)
    record, files = draw_case(clip, answers_of(clip, [completion()]))
    answer, = record["answers"]
    keyframe, = answer["keyframes"]
    assert record["query"] == clip.query and clip.query in record["prompt"]
    assert keyframe["frame"] == 2 and keyframe["description"] == "the red one"
    assert keyframe["boxes"] == [[10.0, 20.0, 40.0, 60.0]]
    assert answer["terms"] == TERMS and answer["reward"] == 3.0 and answer["advantage"] == 1.0
    # The masks are the true ones.
    assert answer["J"] == [1.0] * len(record["times"])
    assert {record["strip"], record["truth"], record["sound"], answer["masks"]} == files.keys()
    assert json.loads(json.dumps(record)) == record


def test_a_strip_is_the_frames_from_top_to_bottom():
    clip = toy_clip("test", 3)
    record, files = draw_case(clip, answers_of(clip, [completion()]))
    strip = Image.open(io.BytesIO(files[record["strip"]])).convert("RGB")
    masks = Image.open(io.BytesIO(files[record["answers"][0]["masks"]])).convert("RGBA")
    assert strip.size == masks.size == (128, 128 * len(clip.frames))
    t = len(clip.frames) - 1
    shown = np.asarray(strip, int)[128 * t:]
    assert np.abs(shown - np.asarray(clip.frames[t], int)).mean() < 8
    assert ((np.asarray(masks)[128 * t:, :, 3] > 0) == clip.masks[:, t].any(0)).all()


def test_long_videos_are_shown_in_part_but_with_all_keyframes():
    answer = Shown("", {501: "it"}, {733: [(0, 0, 1, 1)]})
    times = draw.shown_times(1000, [answer])
    assert {0, 501, 733, 999} <= set(times) and len(times) <= draw.MOST_FRAMES + 2
    # A keyframe of others may not be there.
    assert draw.shown_times(10, [Shown("", {77: "it"}, {})]) == list(range(10))
    everything = Shown("", dict.fromkeys(range(1000), "it"), {})
    assert len(draw.shown_times(1000, [everything])) <= draw.MOST_FRAMES + draw.MOST_KEYFRAMES


@pytest.mark.parametrize("size, frames", [((640, 360), 24), ((90, 1600), 30), ((1, 1), 1), ((16, 16), 1100)])
def test_pictures_of_any_clip_fit(size, frames):
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)) for _ in range(2)]
    strip, (w, h) = draw.draw_strip([noise[t % 2] for t in range(frames)])
    assert len(strip) <= draw.LARGEST_STRIP
    assert Image.open(io.BytesIO(strip)).size == (w, h * frames)


def test_a_long_sound_is_said_to_be_cut():
    clip = toy_clip("test", 3)
    clip.fps = len(clip.frames) / 30
    record, files = draw_case(clip, [])
    body = training.show_case(record, files, [])
    assert "30.0 s" in body and body.count("the first 10 s of the sound") == 2
    clip.fps = len(clip.frames) / 5
    record, files = draw_case(clip, [])
    assert 'aria-label="sound of the clip"' in training.show_case(record, files, [])


def test_a_picture_and_a_question_are_drawn():
    pictures = [Image.new("RGB", (40, 30))]
    truth = dict(box=(1, 2, 3, 4), points=[[1, 2], [2, 3]], type="multiple choice", options=["A. x", EVIL],
                 solution="A")
    for task in ("image", "qa"):
        clip = Clip("one", Frames(pictures.__getitem__, [0]), "which?", task=task, truth=truth)
        text = f"<think>so</think><answer>{EVIL}</answer>"
        boxes = {0: [(1, 1, 2, 2)]} if task == "image" else {}
        record, files = draw_case(clip, [Shown(text, {}, boxes)])
        body = training.show_case(record, files, [("One", "1", {})])
        assert "<img" not in body and "which?" in body


# ---- a page ----------------------------------------------------------------------------------------
def test_a_page_says_what_the_run_is_and_did(run_page):
    said = Reader(run_page.read_text())
    assert said.wrong == [] and said.open == []
    for words in ("a run", "Curves", "Step 30", "Step 1", "Validation clips", "Completion 1",
                  "It is the red one", "advantage", "+1.00", "0.00", "mismatch",
                  "\N{MINUS SIGN}0.50", "seconds of a phase", "decode_tokens_per_s",
                  toy_clip("test", 0).query):
        assert words in said.text, words


def test_prompts_of_all_parts_of_a_step_are_counted():
    settings = IDENTITY["settings"] | dict(accumulate=4)
    record, files = draw_case(toy_clip("test", 1), answers_of(toy_clip("test", 1), [completion()]))
    look = [record | dict(step=1, fixed=False, seed=0, fault="")], files
    said = Reader(training.training_page(dict(settings=settings), [], [look])).text
    assert "32 prompts x 2 completions a step" in said and "1 of the 32 prompts" in said


def test_everything_is_named_for_a_screen_reader(run_page):
    said = Reader(run_page.read_text())
    for tag, attributes in said.tags:
        if attributes.get("role") in ("img", "region") or tag == "input":
            assert attributes.get("aria-label"), tag
        if tag == "svg":
            assert attributes.get("aria-label") or "aria-hidden" in attributes
    levels = [int(tag[1]) for tag, _ in said.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert said.all("html")[0]["lang"] == "en"


def test_text_of_models_stays_text(run_page):
    content = run_page.read_text()
    said = Reader(content)
    assert content.count("<script") == 1 and said.all("img") == [] and len(said.all("style")) == 2
    assert "it ran" in said.text
    # Nothing but pictures and sounds inside the page.
    for attributes in [attributes for _, attributes in said.tags]:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_twenty_groups_fit_into_ten_megabytes():
    """Each group's pictures are bounded; here they are as large as they get."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (120, 213, 3), np.uint8)) for _ in range(24)]
    masks = rng.random((1, 24, 120, 213)) < 0.5
    # Masks of noise have no structure to compress; real ones are smooth.
    masks = np.repeat(np.repeat(masks[:, :, ::12, ::12], 12, 2), 12, 3)[:, :, :120, :213]
    clip = Clip("noise", Frames(pictures.__getitem__, range(24)), "what?", masks=masks,
                sound=rng.standard_normal(20 * 16000).astype(np.float32))
    record, files = draw_case(clip, answers_of(clip, [completion()] * 8))
    record |= dict(step=1, fixed=False, seed=0, fault="")
    single = len(training.training_page(IDENTITY, [], [([record], files)]))
    empty = len(training.training_page(IDENTITY, [], []))
    assert training.MOST_CASES * (single - empty) + empty < 10e6


def test_only_pictures_that_are_shown_are_in_a_page():
    looks = []
    clip = toy_clip("test", 1)
    for step in range(1, 21):
        answer, = answers_of(clip, [completion()])
        answer.masks = {t: np.roll(mask, step, 0) for t, mask in answer.masks.items()}
        record, files = draw_case(clip, [answer])
        looks.append(([dict(step=step, fixed=True, seed=0, fault="") | record], files))
    content = training.training_page(IDENTITY, [], looks)
    assert "Step 20" in content and "Step 12<" not in content
    masks = {record["answers"][0]["masks"] for records, _ in looks for record in records}
    assert sum(f".{page.image_class(name)}{{" in content for name in masks) == training.NEWEST


def test_a_page_that_grows_too_large_shows_fewer_looks(monkeypatch):
    record, files = draw_case(toy_clip("test", 1), answers_of(toy_clip("test", 1), [completion()]))
    looks = [([dict(step=step, fixed=False, seed=0, fault="") | record], files) for step in (1, 2, 3)]
    whole = training.training_page(IDENTITY, [], looks)
    monkeypatch.setattr(training, "LARGEST_PAGE", len(whole) - 1)
    fewer = training.training_page(IDENTITY, [], looks)
    assert whole.count("<article") == 3 and fewer.count("<article") == 2 and "Step 3" in fewer
    # One look is shown in any case.
    monkeypatch.setattr(training, "LARGEST_PAGE", 1)
    assert training.training_page(IDENTITY, [], looks).count("<article") == 1


@pytest.mark.parametrize("looks, each, most, steps", [
    (3, 3, 20, [3, 2, 1]),
    (50, 3, 20, [50, 42, 34, 25, 17, 9, 1][:6]),
    (50, 30, 20, [50]),
    (0, 3, 20, []),
])
def test_a_page_shows_the_newest_look_and_earlier_ones_evenly(looks, each, most, steps):
    kept = [[dict(step=step, fixed=False)] * each for step in range(1, looks + 1)]
    chosen = training.chosen_looks(kept, most)
    assert sum(map(len, chosen)) <= max(most, each)
    shown = [records[0]["step"] for records in chosen]
    assert shown[:1] == steps[:1] and len(shown) == len(steps)
    assert shown == sorted(shown, reverse=True)


def test_numbers_are_aligned_and_have_true_signs():
    assert page.number(-0.5) == "\N{MINUS SIGN}0.50" and page.number(0.5, signed=True) == "+0.50"
    assert page.number(-0.001) == "0.00" and page.number(None) == page.number(float("nan")) == page.NONE
    assert page.short(123456.0) == "123456" and page.short(1e-6) == "1.0e\N{MINUS SIGN}06"


def test_a_bar_of_what_is_no_number_is_not_drawn():
    drawn = page.bars("terms", dict(a=float("nan"), b=1.0, c=float("-inf")))
    assert drawn.count("<i") == 1 and "nan" not in drawn and "--w:100.0%" in drawn
    assert drawn.count(f"<td>{page.NONE}</td>") == 2
    # The other answers' bars keep their scale.
    answers = [dict(terms=dict(a=float("nan"), b=-2.0)), dict(terms=dict(a=4.0))]
    assert [answer["ends"] for answer in training.with_ends(answers)] == [(-2.0, 4.0)] * 2


def test_a_curve_leaves_out_what_is_no_number():
    assert page.curve("kl", [1, 2], [None, float("nan")], 2) == ""
    assert "between 1.00 and 3.00" in page.curve("kl", [1, 2, 3], [1.0, None, 3.0], 3)
    assert "<polyline" in page.curve("kl", [7], [1.0], 9)


def test_the_log_has_the_same_grouped_names_everywhere():
    row = dict(step=3, reward=1.0, base=0.5, kl=0.1, tokens=9.0, gradient_norm=None, new_term=0.2,
               seconds=dict(masks=2.0), speed=dict(update_mfu=0.3))
    assert training.grouped(row) == {
        "reward/total": 1.0, "reward/base": 0.5, "loss/kl": 0.1, "perf/tokens": 9.0, "reward/new_term": 0.2,
        "time/masks": 2.0, "perf/update_mfu": 0.3}


# ---- looks -----------------------------------------------------------------------------------------
class Tracker:
    """Gives every completion the same square."""
    def track_clips(self, requests):
        masks = []
        for frames, _, unions in requests:
            width, height = frames[0].size
            found = np.zeros((len(unions), len(frames), height, width), bool)
            found[..., :9, :9] = True
            masks.append(found)
        return masks


def group_of(clip):
    return SimpleNamespace(
        clip=clip, boxes=[{2: [(0.0, 0.0, 8.0, 8.0)]}, {}], texts=[completion(), "no answer"],
        terms=[TERMS, TERMS], rewards=np.array([1.0, 2.0]), advantages=torch.tensor([-1.0, 1.0]),
        mask=torch.ones(2, 5), seed=7, fault="")


def album_of(out, start=0, rank=0, **settings):
    known = dict(look_every=5, steps=10, tensorboard=False, wandb="", name="a run")
    return Album(str(out), SimpleNamespace(**known | settings), IDENTITY, start, rank)


SYSTEMS = SimpleNamespace(tracker=Tracker(), processor=None)


def test_what_comes_after_a_step_is_in_the_next_line(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Watch()
    for phase in ("update", "validation", "look"):
        watch.begin(phase)
    watch.new_step(1)
    watch.begin("update")
    watch.end()
    assert watch.after == dict(validation=1, look=1)
    assert watch.seconds == dict(update=1)


def test_an_album_looks_at_the_first_step_every_few_and_the_last(tmp_path):
    album = album_of(tmp_path, steps=13)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(log_rows(1)[0]))
    clips = [toy_clip("test", i) for i in range(5)]
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    watch = Watch()
    for step in range(13):
        if step == 6:
            # A checkpoint, whose validation clips are kept.
            album.keep(toy_clip("test", 9), completion(), {2: []}, TERMS, 2.0, 5)
        groups = [group_of(clip) for clip in clips]
        album.look(step, groups, SYSTEMS, watch)
        assert not any(group.clip for group in groups)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert list(look_steps(tmp_path)) == [1, 5, 7, 10, 13]
    looks = dict(zip(look_steps(tmp_path), read_looks(str(tmp_path))))
    assert [record["fixed"] for record in looks[5][0]] == [False] * rollouts.PROMPTS
    assert [record["fixed"] for record in looks[7][0]] == [True]
    best, worst = looks[5][0][0]["answers"]
    assert best["advantage"] == 1.0 and best["reward"] == 2.0 and worst["text"] == completion()
    assert worst["J"] is not None and worst["keyframes"][0]["boxes"] == [[0.0, 0.0, 8.0, 8.0]]
    assert (tmp_path / "report.html").exists() and watch.seconds["look"] > 0


def test_a_run_that_goes_on_drops_later_looks(tmp_path):
    for step in (5, 10, 15):
        write_look(str(tmp_path), step, cases(1))
    (tmp_path / "rollouts/mine.txt").write_text("stays")
    album_of(tmp_path, start=10, rank=1)
    assert list(look_steps(tmp_path)) == [5, 10, 15]
    album_of(tmp_path, start=10)
    assert list(look_steps(tmp_path)) == [5, 10]
    album_of(tmp_path)
    assert list(look_steps(tmp_path)) == [] and (tmp_path / "rollouts/mine.txt").exists()


def test_only_the_first_process_looks(tmp_path):
    album = album_of(tmp_path, rank=1)
    album.keep(toy_clip("test", 9), completion(), {}, TERMS, 2.0, 5)
    album.look(0, [group_of(toy_clip("test", 1))], None, Watch())
    album.write(dict(step=0))
    assert list(tmp_path.iterdir()) == [] and album.fixed == []


def test_a_failing_look_is_a_warning(tmp_path, capsys):
    album = album_of(tmp_path)
    album.look(0, [group_of(toy_clip("test", 1))], SimpleNamespace(tracker=None), Watch())
    assert "warning: looking at the rollouts failed, and the run goes on" in capsys.readouterr().err
    # A look that was damaged is left out.
    write_look(str(tmp_path), 5, cases(1))
    write_look(str(tmp_path), 10, cases(1))
    (tmp_path / "rollouts/step-000005.zip").write_bytes(b"no zip")
    looks = read_looks(str(tmp_path))
    assert len(looks) == 1 and "step-000005" in capsys.readouterr().err


def test_pictures_of_a_look_are_read_when_they_are_shown(tmp_path, monkeypatch, capsys):
    write_look(str(tmp_path), 1, cases(1))
    (_, files), = read_looks(str(tmp_path))
    names = list(files)
    assert len(files) == len(names) > 3 and len(files[names[0]]) > 100 and "other" not in files
    read = []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda archive, name: read.append(name) or b"")
    look, = read_looks(str(tmp_path))
    assert read == []
    training.training_page(IDENTITY, [], [look])
    assert set(read) == set(names)
    # One that is damaged is empty, and the page is written.
    monkeypatch.undo()
    path = tmp_path / "rollouts/step-000001.zip"
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"damaged" + content[207:])
    (tmp_path / "metrics.jsonl").write_text("")
    rollouts.write_report(str(tmp_path), IDENTITY)
    assert "Bad CRC" in capsys.readouterr().err and (tmp_path / "report.html").exists()


def test_an_interrupted_look_is_no_look(tmp_path, capsys):
    for step in (5, 10):
        write_look(str(tmp_path), step, cases(1))
    folder = tmp_path / "rollouts"
    (folder / "step-000010.jsonl").unlink()
    (folder / "step-000005.zip.partial").write_bytes(b"half")
    assert len(read_looks(str(tmp_path))) == 1 and capsys.readouterr().err == ""
    album_of(tmp_path, start=10)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005.jsonl", "step-000005.zip"]


def test_a_full_disk_keeps_no_half_of_a_look(tmp_path, monkeypatch, capsys):
    """What is left of the disk is for checkpoints."""
    def full(archive, name, content):
        archive.fp.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    album = album_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    album.look(0, [group_of(toy_clip("test", 1))], SYSTEMS, Watch())
    assert "step-000001.zip (No space left" in capsys.readouterr().err
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_boards_get_the_grouped_names(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def add_image(self, name, picture, step, dataformats):
            written.append((name, picture.shape[2], step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    album = album_of(tmp_path, start=3, tensorboard=True)
    album.write(dict(step=4, reward=1.5))
    album.look(4, [group_of(toy_clip("test", 1))], SYSTEMS, Watch())
    assert written == [(f"{tmp_path}/tensorboard", 3), ("reward/total", 1.5, 4), ("rollouts/0", 3, 4)]


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    begun = []
    board = SimpleNamespace(id="abc", log=lambda values, step: begun.append((values, step)))

    def init(**options):
        begun.append(options["id"])
        return board

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    album_of(tmp_path, wandb="project")
    album_of(tmp_path, start=3, wandb="project").write(dict(step=4, kl=0.5))
    assert begun == [None, "abc", ({"loss/kl": 0.5}, 4)]


def test_wandb_that_cannot_begin_is_told_in_a_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("not logged in\nlong advice")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(BadInput, match="^--wandb project: RuntimeError: not logged in"):
        album_of(tmp_path, wandb="project")


@pytest.mark.parametrize("options, package", [
    (dict(tensorboard=True, wandb=""), "torch.utils.tensorboard"),
    (dict(tensorboard=False, wandb="project"), "wandb"),
])
def test_a_board_that_is_not_installed_is_told(options, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match="is not installed here"):
        start_boards(SimpleNamespace(**options), str(tmp_path), {}, 0, first=False)


# ---- why a sample failed ---------------------------------------------------------------------------
def square(x, y, T=4):
    masks = np.zeros((T, 40, 40), bool)
    masks[:, y:y + 10, x:x + 10] = True
    return masks


def line_of(text="<answer>[]</answer>", keyframes=(1,), boxes=None):
    return dict(text=text, keyframes=list(keyframes), boxes=boxes or {})


HERE = square(0, 0)[None]
LATE = HERE & (np.arange(4) > 1)[:, None, None]
NOWHERE = np.zeros_like(HERE)


@pytest.mark.parametrize("cause, value, true, pred, answer", [
    ("", 60, HERE, HERE[0], None),
    ("unreadable", 0, HERE, None, None),
    ("unreadable", 0, None, None, None),
    ("null missed", 0, NOWHERE, HERE[0], line_of()),
    ("", 0, NOWHERE, NOWHERE[0], None),
    ("null invented", 0, HERE, NOWHERE[0], line_of("<answer>null</answer>", ())),
    ("null invented", 0, HERE, NOWHERE[0], None),
    ("malformed", 0, HERE, NOWHERE[0], line_of("what?", ())),
    ("not visible", 0, LATE, HERE[0], line_of(boxes={"1": [[0, 0, 9, 9]]})),
    ("no box", 0, HERE, NOWHERE[0], line_of(boxes={"1": []})),
    ("wrong object", 0, HERE, square(20, 20), line_of(boxes={"1": [[20, 20, 29, 29]]})),
    ("wrong object", 0, HERE, square(20, 20), None),
    ("box off", 20, HERE, square(5, 0), line_of(boxes={"1": [[5, 0, 14, 9]]})),
    ("box off", 20, HERE, square(5, 0), None),
    ("lost in tracking", 20, HERE, square(20, 20), line_of(boxes={"1": [[0, 0, 9, 9]]})),
    # Boxes of others may be anything.
    ("no box", 0, HERE, square(20, 20), line_of(boxes={"1": ["a", [1, 2], [9, 9, 0, 0]], "x": 3})),
    # No keyframe is scored: the masks decide.
    ("wrong object", 0, HERE, square(20, 20), line_of(keyframes=(30,), boxes={"30": [[0, 0, 9, 9]]})),
])
def test_the_cause_of_a_failure_follows_from_the_truth(cause, value, true, pred, answer, monkeypatch):
    monkeypatch.setattr(causes, "scored_frames", lambda _: [0, 1, 2, 3])
    assert cause_of(value, None, true, pred, answer) == cause
    assert cause == "" or cause in causes.CAUSES


# ---- an evaluation's page --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two evaluations of ten toy clips: of the true masks, and of moved ones. -> folder of the second."""
    root = tmp_path_factory.mktemp("evaluations")
    samples = TOY.read("", "test")[:10]
    for name, moved in (("right", 0), ("moved", 40)):
        predictions = str(root / name)
        for i, sample in enumerate(samples):
            masks = np.roll(sample.read_masks().any(0), moved if i % 2 else 0, 2)
            write_prediction(predictions, sample, masks)
        line = dict(name=samples[1].name, query="", text=completion(EVIL), keyframes={"2": EVIL},
                    boxes={"2": [[1, 2, 30, 40]]})
        (root / name / "answers-0.jsonl").write_text(json.dumps(line) + "\n")
        options = ["--predictions", predictions, "--limit", "10", "--out", predictions + "-out"]
        if moved:
            options += ["--against", f"{root}/right-out/results.json"]
        evaluation.main(options)
    return root / "moved-out"


def test_an_evaluation_is_a_page(evaluated):
    content = (evaluated / "report.html").read_text()
    said = Reader(content)
    assert said.wrong == [] and said.open == []
    for words in ("toy", "Results", "How J&F is spread", "Failures", "wrong object", "Change", "Lost most",
                  "before", "now", "it ran"):
        assert words in said.text, words
    assert "Gained most" not in said.text
    assert content.count("<script") == 1 and said.all("img") == []
    results = json.loads((evaluated / "results.json").read_text())
    written = {row["cause"] for row in results["expressions"]}
    assert "wrong object" in written and "" in written


def test_a_failing_page_is_a_warning(evaluated, monkeypatch, capsys):
    monkeypatch.setattr("report.evaluation.heading", None)
    predictions = str(evaluated).removesuffix("-out")
    evaluation.main(["--predictions", predictions, "--limit", "2", "--out", str(evaluated.parent / "again")])
    out, err = capsys.readouterr()
    assert "report.html failed" in err and "results.json" in out


@pytest.mark.parametrize("lost", ["fields", "place", "predictions"])
def test_an_evaluation_of_other_code_is_compared_too(lost, evaluated, tmp_path, capsys):
    results = json.loads((evaluated.parent / "right-out/results.json").read_text())
    if lost == "fields":
        del results["predictions"], results["policy"]
        for row in results["expressions"]:
            del row["cause"], row["problem"]
    if lost == "place":
        results["predictions"] = 5
    if lost == "predictions":
        results["predictions"] = str(tmp_path / "damaged.json")
        (tmp_path / "damaged.json").write_text("[")
    other = tmp_path / "results.json"
    other.write_text(json.dumps(results))
    predictions = str(evaluated).removesuffix("-out")
    evaluation.main(["--predictions", predictions, "--limit", "10", "--out", str(tmp_path / "out"),
                     "--against", str(other)])
    assert "report.html failed" not in capsys.readouterr().err
    content = (tmp_path / "out/report.html").read_text()
    assert "Lost most" in content and content.count('class="card"') > 2


def test_no_sample_is_shown_twice_and_ends_of_long_tables_are_shown():
    rows = [dict(name=str(i), J=i) for i in range(30)]
    shown = [row["name"] for _, _, part in galleries(rows, {}, "J") for row in part]
    assert len(set(shown)) == len(shown) == 18 and shown[0] == "0" and "29" in shown
    assert len(ends_of(list(range(1000)))) == 300 and ends_of([1, 2]) == [1, 2]


def test_a_question_shows_what_was_read():
    row = dict(query="which?", solution="B", text="<answer>b</answer>", said="", ours=0.0, official=100.0)
    missing = dict(query="why?", solution="A", text=None, said="", ours=0.0, official=None)
    said = Reader(questions([row, missing], ("ours", "official", "precision"))).text
    for part in ("which?", "b", "nothing", "wrong", "right", "why?", "none"):
        assert part in said.split()
    assert "precision" not in said


# ---- a folder of videos ----------------------------------------------------------------------------
def test_a_picture_beside_videos_does_not_hide_them(tmp_path):
    for name in ("a.mp4", "b.MOV", "cover.jpg"):
        (tmp_path / name).write_bytes(b"")
    listed = [(str(tmp_path / name), f"out/{name}") for name in ("a.mp4", "b.MOV")]
    assert results.listed_videos(str(tmp_path), "out") == listed
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert results.listed_videos(str(tmp_path), "out") == [(str(tmp_path), "out")]


def test_a_link_that_leads_nowhere_does_not_end_the_others(capsys):
    failed = []
    with results.told_alone(True, failed):
        raise FileNotFoundError("no such video: a.mp4")
    assert len(failed) == 1
    assert "no masks: no such video: a.mp4" in capsys.readouterr().err
    for several, error in ((False, FileNotFoundError("a")), (True, OSError(28, "No space left on device"))):
        with pytest.raises(OSError), results.told_alone(several, failed):
            raise error


# ---- in a browser ----------------------------------------------------------------------------------
class Browser:
    """A headless chromium, driven by the WebDriver protocol."""

    def __init__(self, width, height=900):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={self.port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        metrics = {"width": width, "height": height}
        options = {"args": arguments, "mobileEmulation": {"deviceMetrics": metrics}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.session = ""
        self.session = "/session/" + self.begin({"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def begin(self, wanted):
        for _ in range(100):
            try:
                return self.ask("/session", wanted)
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("chromedriver does not answer")

    def ask(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{self.session}{path}",
                                         json.dumps(body).encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.ask("/url", {"url": path.as_uri()})

    def run(self, script):
        return self.ask("/execute/sync", {"script": script, "args": []})

    def press(self, key):
        presses = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": presses}]})

    def requested(self):
        """Addresses that the page asked for."""
        addresses = []
        for entry in self.ask("/se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
        return addresses

    def close(self):
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            address = f"http://127.0.0.1:{self.port}{self.session}"
            opener.open(urllib.request.Request(address, method="DELETE"), timeout=10)
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture(scope="module", params=[390, 1440])
def browser(request):
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver here")
    browser = Browser(request.param)
    yield browser
    browser.close()


# What is wider than the window, but for what scrolls by itself.
OVERFLOW = """return [...document.querySelectorAll('main, main *')].filter(e =>
    !e.parentElement.closest('.timeline, .scroll, pre, svg') &&
    e.getBoundingClientRect().right > screen.width + 1).map(e => e.outerHTML.slice(0, 200))"""
RIGHT, LEFT = "\ue014", "\ue012"
STATE = """return [...document.querySelectorAll('.case')].slice(0, 2).map(box =>
    [box.querySelector('input').value, ...[...box.querySelectorAll('.now span')].map(e => e.textContent)])"""


def test_a_browser_shows_the_page_of_a_run(browser, run_page):
    browser.open(run_page)
    assert browser.run("return document.title") == "a run: training"
    assert browser.run("return screen.width") in (390, 1440)
    assert browser.run(OVERFLOW) == []
    # The pictures are decoded and shown.
    shown = "return getComputedStyle(document.querySelector('.stage .pic')).backgroundImage.slice(0, 20)"
    assert browser.run(shown).startswith('url("data:image/webp')


def test_arrow_keys_step_through_all_cards_of_a_clip(browser, run_page):
    browser.open(run_page)
    browser.run("document.querySelector('.case').scrollIntoView({behavior: 'instant', block: 'start'})")
    first, second = browser.run(STATE)
    browser.press(RIGHT)
    browser.press(RIGHT)
    browser.press(LEFT)
    after, other = browser.run(STATE)
    assert int(after[0]) == int(first[0]) + 1 and other == second
    # All cards show the same time, each with its own J.
    times = after[1::2]
    assert len(set(times)) == 1 and len(times) == 2 and after[2] == "J 1.00"
    # With the slider in focus, its own keys do the same.
    browser.run("document.querySelector('.case input').focus()")
    browser.press(RIGHT)
    assert int(browser.run(STATE)[0][0]) == int(first[0]) + 2
    # A keyframe is a button.
    browser.run("document.querySelector('.case .still').click()")
    assert browser.run(STATE)[0][0] == "2"
    assert browser.run("return document.querySelectorAll('.case .stage .boxes:not(.off)').length") >= 2


def test_no_script_of_a_model_runs_and_no_request_leaves(browser, run_page, evaluated):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for path in (run_page, evaluated / "report.html"):
            browser.open(path)
            assert "it ran" not in browser.run("return document.title")
            assert browser.run(OVERFLOW) == []
            addresses = browser.requested()
            assert path.as_uri() in addresses
            assert [where for where in addresses if not where.startswith(("file:", "data:"))] == []
            # Even text that were not escaped could do nothing.
            browser.run(f"""const e = document.createElement('div'); document.body.append(e);
                e.innerHTML = '<img src="{address}" onerror="document.title=1">';""")
            with pytest.raises(TimeoutError):
                server.accept()
            assert browser.run("return document.title") != "1"
            # The refused request is in the log, too.
            browser.requested()


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3)])
def test_no_clip_makes_a_picture_taller_than_a_window(browser, size, tmp_path):
    picture = Image.new("RGB", size)
    masks = np.ones((1, 30, size[1], size[0]), bool)
    clip = Clip("thin", Frames(lambda t: picture, range(30)), "it", masks=masks)
    record, files = draw_case(clip, answers_of(clip, [completion()]))
    look = [record | dict(step=1, fixed=False, seed=0, fault="")], files
    page.write_page(str(tmp_path / "report.html"), training.training_page(IDENTITY, [], [look]))
    browser.open(tmp_path / "report.html")
    browser.run("document.querySelector('.case').style.contentVisibility = 'visible'")
    for width, height in browser.run("return [...document.querySelectorAll('.stage, .still')].map("
                                     "e => [e.clientWidth, e.clientHeight])"):
        assert width >= 8 and 8 <= height <= 640
    assert browser.run(OVERFLOW) == []
    # The frame that is shown stays in view in the time line.
    browser.run("document.querySelector('.case .timeline').focus()")
    for _ in range(20):
        browser.press(RIGHT)
    assert browser.run("""const line = document.querySelector('.timeline').getBoundingClientRect();
        const mark = document.querySelector('.at i').getBoundingClientRect();
        return mark.left >= line.left && mark.right <= line.right""")

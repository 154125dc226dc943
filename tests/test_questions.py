"""Questions: readers of replies, metrics, media, asking, and the five benchmarks that ask.

The table of replies says what the published parsers say: their functions were run on these texts.
Letters: T frames.
"""
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import avhbench, check, find_benchmark, open_split, questions
from benchmarks.daily_omni import daily_omni_letter
from benchmarks.mvbench import FOLDERS, mvbench_accepts
from benchmarks.omnibench import omnibench_letter
from benchmarks.questions import (
    Prepared,
    Question,
    batches,
    frame_window,
    group_questions,
    lines_at,
    new_question,
    prepare,
    read_clip,
    read_subtitles,
    set_choice,
    set_free,
    without_letters,
)
from benchmarks.quiz import by_groups, mean_part, reply_table, score_replies, score_reply
from benchmarks.replies import (
    last_answer,
    lmms_accepts,
    lmms_letter,
    official_text,
    read_letter,
    read_yes_no,
    vlmeval_letter,
)
from benchmarks.videomme import videomme_letter
from benchmarks.video_r1 import video_file
from data import FPS, SAMPLE_RATE, Processor, prompt, prompt_inputs
from tests.test_benchmarks import assert_fault, assert_malformed, drop, edit, put_at
from tests.world import evaluate_here, naming, noise_picture, run_program
from trust.errors import BadInput
from trust.options import TOY_POLICY

BENCHES = ("avhbench", "omnibench", "videomme", "mvbench", "daily_omni")
each_bench = pytest.mark.parametrize("bench", BENCHES)
OPTIONS = ["Black", "Gray", "Green", "Brown"]


# ---- what published parsers say --------------------------------------------------------------------
# Whether MVBench's match and lmms-eval's take the reply for B ("?": not asked), and the letters that are read
# by Video-MME, lmms-eval, OmniBench without texts, VLMEvalKit and Daily-Omni; "-": none.
GOLDEN = [
    # reply                                  MVB  LM   VMME X    OB   VK   DO
    ("B",                                    "yes yes  B    B    B    B    B"),
    ("B.",                                   "yes yes  B    B    B    B    B"),
    ("b",                                    "yes yes  -    -    -    -    B"),
    ("(B)",                                  "yes yes  B    B    B    B    -"),
    ("B) Gray",                              "yes yes  B    B    -    B    B"),
    ("Gray.",                                "no  no   -    -    -    B    -"),
    ("**B**",                                "no  yes  B    B    -    B    -"),
    ("The answer is B.",                     "no  yes  B    B    B    B    -"),
    ("The answer is B. A is wrong and C too.", "no yes B    C    C    B    -"),
    ("Answer: B",                            "no  yes  B    B    B    B    A"),
    ("Best answer: C",                       "?   ?    B    C    C    C    B"),
    ("Best option: C",                       "?   ?    B    C    C    C    B"),
    ("Based on the video, D",                "?   ?    B    D    D    D    B"),
    ("Correct: D",                           "?   ?    C    D    D    D    C"),
    ("Certainly, A",                         "?   ?    C    A    A    A    C"),
    ("<answer>B</answer>",                   "no  yes  B    B    -    -    -"),
    ("<think>A is tempting.</think><answer>B</answer>", "no no A A A - -"),
    ("B or C",                               "yes yes  B    B    C    -    B"),
    ("A man wears gray, so B",               "no  no   A    A    B    -    A"),
    ("",                                     "yes no   -    -    -    -    -"),
    ("(",                                    "yes no   -    -    -    -    -"),
]


@pytest.mark.parametrize("reply, expected", GOLDEN)
def test_the_table_of_published_parsers(reply, expected):
    accepted = [mvbench_accepts(reply, "B"), lmms_accepts(reply, "B")]
    said = ["yes" if value else "no" for value in accepted]
    letters = (
        videomme_letter(reply),
        lmms_letter(reply),
        omnibench_letter(reply, OPTIONS, texts=False),
        vlmeval_letter(reply, OPTIONS),
        daily_omni_letter(reply),
    )
    said += [letter or "-" for letter in letters]
    for ours, true in zip(said, expected.split(), strict=True):
        assert true in (ours, "?"), said


def test_omnibench_looks_for_an_options_text_in_long_replies_only():
    assert omnibench_letter("it looks gray to me", OPTIONS) == ""
    assert omnibench_letter("it looks gray to me now", OPTIONS) == "B"
    assert omnibench_letter("first it is gray and then brown", OPTIONS) == "D"
    assert omnibench_letter("it looks gray to me now", OPTIONS, texts=False) == ""


def test_omnibenchs_truth_goes_through_its_own_rule():
    """ "A man answers." as the true option B is the letter A."""
    sample = question(["It rains.", "A man answers.", "Both.", "None."], "B")
    official = find_benchmark("omnibench").quiz.parsers["official"]
    by_letter = find_benchmark("omnibench").quiz.parsers["by letter"]
    assert official("A", sample) and not official("B", sample)
    assert by_letter("B", sample) and not by_letter("A", sample)


# ---- ours ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer, letter", [
    ("B", "B"), ("b", "B"), ("(b)", "B"), ("[B].", "B"), ("**B**", "B"), ("B:", "B"), ("B. Gray", "B"),
    ("b) gray", "B"), ("The answer is B.", "B"), ("Option: (C)", "C"), ("gray", "B"), (" Gray. ", "B"),
    ("the answer is B. A is wrong and C too.", "B"),
    ("Answer: B) Gray", "B"), ("The answer is (b) gray", "B"), ("answer: B\nIt is gray.", "B"),
    ("answer: B\nanswer: C", ""),
    ("", ""), ("(", ""), ("null", ""), ("E", ""), ("E. Pink", ""), ("B or C", ""), ("B C", ""),
    ("A man wears gray, so B", ""), ("Based on the video, D", ""), ("Correct: D", ""), ("gray or black", ""),
    ("The answer is a dog", ""), ("answer: B. No, answer: C.", ""), ("DNA", ""), ("A dog", ""),
])
def test_our_reader_takes_a_letter_that_is_plainly_given(answer, letter):
    assert read_letter(answer, OPTIONS) == letter


def test_options_that_are_alike_name_no_letter():
    assert read_letter("gray", ["Gray", "gray.", "Green"]) == ""
    assert read_letter("...", ["!", "?"]) == ""


@pytest.mark.parametrize("answer, said", [
    ("Yes", "Yes"), ("no.", "No"), ("YES, it is", "Yes"), ("I think no, not yes", "No"),
    ("", ""), ("null", ""), ("yesterday", ""), ("nobody knows", ""),
])
def test_yes_and_no_are_whole_words(answer, said):
    assert read_yes_no(answer) == said


@pytest.mark.parametrize("text, answer, given", [
    ("<think>A</think><answer> B </answer>", "B", "B"),
    ("<answer>A</answer> no: <answer>B</answer>", "B", "B"),
    ("<answer>A</answer><answer>B", "A", "A"),
    ("<think>A</think> B", "", "B"),
    ("B", "", "B"),
    ("<answer></answer>", "", ""),
    ("</answer>B<answer>", "", ""),
    ("", "", ""),
])
def test_what_stands_in_the_last_answer(text, answer, given):
    assert last_answer(text) == answer
    assert official_text(text) == given


# ---- rows and means, against brute force -----------------------------------------------------------
def question(choices, letter, number=0) -> Question:
    sample = new_question("own", "video", number)
    sample.query = "Which?"
    sample.pictures = ["."]
    set_choice(sample, choices, letter, "here")
    return sample


def yes_no_question(task, label, number) -> Question:
    sample = new_question("avhbench", "video", number)
    sample.pictures = ["."]
    sample.kind = task
    sample.groups = dict(task=task)
    set_free(sample, label, avhbench.YES_NO)
    return sample


def random_replies(random, truths, others):
    """A reply for each truth: right, wrong, unreadable, empty, or none at all."""
    replies = []
    for truth in truths:
        wrong = random.choice([other for other in others if other != truth])
        replies.append([f"<answer>{truth}</answer>", f"<answer>{wrong}</answer>", "<answer>hm</answer>", "",
                        None][random.choice(5, p=[0.5, 0.2, 0.1, 0.1, 0.1])])
    return replies


def rows_of(bench, samples, replies):
    quiz = find_benchmark(bench).quiz
    rows = []
    for sample, text in zip(samples, replies):
        rows.append(score_reply(quiz, sample, None if text is None else dict(text=text)))
    return rows


def test_avhbench_against_counts_by_hand():
    random = np.random.default_rng(0)
    samples = []
    for i in range(300):
        task = str(random.choice(avhbench.TASKS))
        samples.append(yes_no_question(task, random.choice(["Yes", "No"]), i))
    truths = [sample.solution for sample in samples]
    replies = random_replies(random, truths, ["Yes", "No"])
    parts = avhbench.avhbench_parts(rows_of("avhbench", samples, replies), ())
    assert set(parts) == {"overall", *avhbench.TASKS}
    for name, part in parts.items():
        hits = positives = said = right = rows = loose = missing = unreadable = 0
        for sample, text in zip(samples, replies):
            if name not in ("overall", sample.kind):
                continue
            rows += 1
            positives += sample.solution == "Yes"
            is_yes = text == "<answer>Yes</answer>"
            said += is_yes
            hits += is_yes and sample.solution == "Yes"
            right += text == f"<answer>{sample.solution}</answer>"
            loose += text is not None and is_yes == (sample.solution == "Yes")
            missing += text is None
            unreadable += text in ("", "<answer>hm</answer>")
        precision = hits / said
        recall = hits / positives
        assert part["ours"] == pytest.approx(100 * right / rows)
        assert part["precision"] == pytest.approx(100 * precision)
        assert part["recall"] == pytest.approx(100 * recall)
        assert part["F1"] == pytest.approx(200 * precision * recall / (precision + recall))
        assert part["Yes"] == pytest.approx(100 * said / rows)
        assert part["loose"] == pytest.approx(100 * loose / rows)
        assert (part["rows"], part["missing"], part["unreadable"]) == (rows, missing, unreadable)
        assert part["skipped"] == 0


def test_a_constant_yes_is_seen():
    samples = [yes_no_question(avhbench.TASKS[0], label, i) for i, label in enumerate(("Yes", "No"))]
    rows = rows_of("avhbench", samples, ["<answer>Yes</answer>"] * 2)
    part = avhbench.avhbench_parts(rows, ())["overall"]
    assert (part["ours"], part["recall"], part["Yes"]) == (50, 100, 100)


@pytest.mark.parametrize("bench", ["omnibench", "videomme", "mvbench", "daily_omni"])
def test_means_and_denominators_against_counts_by_hand(bench):
    random = np.random.default_rng(1)
    samples = []
    tasks = list(FOLDERS)
    for i in range(400):
        sample = question(OPTIONS, str(random.choice(list("ABCD"))), i)
        sample.kind = tasks[i % 20]
        sample.groups = dict(task=sample.kind, size=str(i % 3))
        samples.append(sample)
    truths = [sample.solution for sample in samples]
    replies = random_replies(random, truths, list("ABCD"))
    quiz = find_benchmark(bench).quiz
    rows = rows_of(bench, samples, replies)
    columns = ("ours", *quiz.parsers)
    parts = (quiz.parts or by_groups)(rows, columns)
    names = {"task: " + task for task in tasks} | {f"size: {k}" for k in range(3)}
    assert names < set(parts)
    for name, part in parts.items():
        group, _, value = name.partition(": ")
        right = official = counted = total = 0
        for sample, text in zip(samples, replies):
            if value and sample.groups[group] != value:
                continue
            if name == "19 tasks" and sample.kind == "fine_grained_pose":
                continue
            total += 1
            hit = text == f"<answer>{sample.solution}</answer>"
            readable = text in [f"<answer>{letter}</answer>" for letter in "ABCD"]
            right += hit
            # Who leaves the denominator, and what an empty reply is for MVBench.
            if bench == "videomme":
                counted += readable
            elif bench == "daily_omni":
                counted += text is not None
            else:
                counted += 1
            official += hit or bench == "mvbench" and text == ""
        assert part["ours"] == pytest.approx(100 * right / total)
        assert part["official"] == pytest.approx(100 * official / counted)
        assert (part["rows"], part["counted"]) == (total, counted)


def test_a_column_without_rows_has_no_mean():
    part = mean_part([dict(ours=0.0, official=None, problem="missing")], ("ours", "official"))
    assert part["official"] is None
    assert part["counted"] == 0


# ---- each miniature --------------------------------------------------------------------------------
def samples_of(bench, root, splits=None):
    benchmark = find_benchmark(bench)
    samples = []
    for split in (splits or benchmark.tested).split(","):
        samples += open_split(benchmark, split, str(root))
    return samples


def other_than(sample) -> str:
    if sample.choices:
        return "B" if sample.solution == "A" else "A"
    return "No" if sample.solution == "Yes" else "Yes"


def scored(bench, root, tmp_path, replies, *options) -> dict:
    """Results of eval.py for {name: reply} of any model."""
    path = tmp_path / "replies.json"
    path.write_text(json.dumps(replies))
    common = ["--bench", bench, f"--{bench}_root", root, "--predictions", path]
    return evaluate_here(tmp_path / "out", *common, *options)


@each_bench
def test_its_own_truth_is_perfect_and_its_opposite_is_not(bench, minis, tmp_path):
    root = minis(bench)
    samples = samples_of(bench, root)
    quiz = find_benchmark(bench).quiz
    truth = {sample.name: f"<think>A B C D</think><answer>{sample.solution}</answer>" for sample in samples}
    best = scored(bench, root, tmp_path, truth)
    assert (best["unreadable"], best["missing"], best["skipped"]) == (0, 0, 0)
    for name, part in best["subsets"].items():
        for column in ("ours", *quiz.parsers, "precision", "recall", "F1"):
            # A part may have no label Yes.
            if part.get(column) and column != "Yes":
                assert part[column] == 100, (name, column)
        assert part["ours"] == 100
    opposite = {sample.name: f"<answer>{other_than(sample)}</answer>" for sample in samples}
    worst = scored(bench, root, tmp_path, opposite)
    for part in worst["subsets"].values():
        for column in ("ours", *quiz.parsers):
            assert part[column] == 0


@each_bench
def test_empty_and_missing_replies_are_counted_and_wrong(bench, minis, tmp_path, capsys):
    root = minis(bench)
    samples = samples_of(bench, root)
    empty = scored(bench, root, tmp_path, {sample.name: "" for sample in samples})
    whole = next(iter(empty["subsets"].values()))
    assert empty["unreadable"] == whole["unreadable"] == len(samples)
    assert whole["ours"] == 0
    # The quirk of MVBench's match.
    if bench == "mvbench":
        assert whole["official"] == 100
        assert whole["lmms-eval"] is None
    nothing = scored(bench, root, tmp_path, {})
    assert nothing["missing"] == len(samples)
    assert next(iter(nothing["subsets"].values()))["ours"] == 0
    assert nothing["summary"].get("20 tasks official", 0) == 0
    printed = capsys.readouterr().out
    assert "unreadable" in printed
    assert "toy policy" not in printed


@each_bench
def test_the_toy_policy_is_asked_and_its_table_says_what_it_is(bench, minis, tmp_path, capsys):
    root = minis(bench)
    out = tmp_path / "out"
    options = ["--bench", bench, f"--{bench}_root", root, "--limit", 3, "--max_new_tokens", 4, "--workers", 0]
    results = evaluate_here(out, *options)
    assert results["missing"] == results["skipped"] == 0
    assert len(results["expressions"]) == 3
    printed = capsys.readouterr().out
    assert "The toy policy was never taught to answer questions" in printed
    again = evaluate_here(out, *options)
    assert "3 of 3 questions were already there" in capsys.readouterr().out
    assert again["summary"] == results["summary"]
    claim = json.loads((out / "run.json").read_text())
    assert (claim["think"], claim["sound"], claim["subtitles"]) == (True, True, False)


SHOWN = [("avhbench", "Audio-driven"), ("omnibench", "speech"), ("videomme", "short"),
         ("mvbench", "action_sequence"), ("daily_omni", "Event Sequence")]


@pytest.mark.parametrize("bench, kind", SHOWN)
def test_show_writes_the_question_and_its_options(bench, kind, minis, tmp_path):
    root = minis(bench)
    sample = samples_of(bench, root)[0]
    assert kind in sample.kind
    check.main(["show", "--bench", bench, f"--{bench}_root", str(root), "--out", str(tmp_path)])
    text = (tmp_path / "prompt.txt").read_text()
    assert sample.query in text
    for option in sample.truth["options"]:
        assert option in text
    if bench == "avhbench":
        assert "nothing but yes or no" in text
    assert (tmp_path / "sample.png").exists()


def test_captions_are_written_out(minis, tmp_path, monkeypatch, capsys):
    root = minis("avhbench")
    samples = samples_of("avhbench", root, "test,captions")
    captions = [sample for sample in samples if sample.kind == avhbench.CAPTIONING]
    assert len(captions) == 2
    replies = {sample.name: f"<answer>{sample.solution}</answer>" for sample in samples}
    replies[captions[1].name] = "no tags"
    monkeypatch.setattr(avhbench, "find_meteor", lambda: None)
    results = scored("avhbench", root, tmp_path, replies, "--split", "test,captions")
    assert "no METEOR" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/captions.json").read_text())
    assert [item["caption"] for item in written] == [captions[0].solution, ""]
    assert written[0]["label"] == captions[0].solution
    assert written[0]["video_id"] == captions[0].video
    # They are no part of the accuracy.
    assert results["subsets"]["overall"]["rows"] == len(samples) - 2
    assert results["subsets"]["overall"]["ours"] == 100
    assert results["subsets"][avhbench.CAPTIONING]["unreadable"] == 1
    assert "METEOR" not in results["subsets"][avhbench.CAPTIONING]

    monkeypatch.setattr(avhbench, "find_meteor", lambda: lambda true, caption: float(true == caption))
    results = scored("avhbench", root, tmp_path, replies, "--split", "test,captions")
    assert results["subsets"][avhbench.CAPTIONING]["METEOR"] == 50
    # Who compares, compares what is graded.
    other = shutil.copy(tmp_path / "out/results.json", tmp_path / "other.json")
    again = scored("avhbench", root, tmp_path, replies, "--split", "test,captions", "--against", other)
    assert again["against"]["difference"] == 0


def test_videommes_result_file_is_what_its_scorer_takes(minis, tmp_path, capsys):
    root = minis("videomme")
    samples = samples_of("videomme", root)
    replies = {}
    for sample in samples:
        if sample.video == samples[0].video:
            replies[sample.name] = f"<think>A</think><answer>{sample.solution}</answer>"
    scored("videomme", root, tmp_path, replies)
    assert "1 of 900 videos have a reply" in capsys.readouterr().out
    videos = json.loads((tmp_path / "out/videomme.json").read_text())
    assert [video["missing"] for video in videos] == [False, True]
    for video in videos:
        assert set(video) == {"video_id", "duration", "domain", "sub_category", "missing", "questions"}
        for item in video["questions"]:
            keys = {"question_id", "task_type", "question", "options", "answer", "response"}
            assert set(item) == keys
            assert item["options"][0].startswith("A. ")
            # As the scorer reads it.
            letter = videomme_letter(item["response"])
            assert letter == ("" if video["missing"] else item["answer"])


def test_withheld_clips_are_counted_and_not_guessed(copy, tmp_path, capsys):
    root = copy("mvbench")
    shutil.rmtree(root / "video/nturgbd")
    samples = samples_of("mvbench", root)
    replies = {}
    for sample in samples:
        if sample.kind != "fine_grained_pose":
            replies[sample.name] = f"<answer>{sample.solution}</answer>"
    results = scored("mvbench", root, tmp_path, replies)
    part = results["subsets"]["20 tasks"]
    assert (part["skipped"], part["missing"], part["rows"]) == (2, 0, 40)
    assert part["ours"] == part["official"] == 95
    part = results["subsets"]["19 tasks"]
    assert (part["ours"], part["skipped"], part["rows"]) == (100, 0, 38)
    printed = capsys.readouterr().out
    assert "not asked: 2 of 40 questions" in printed
    assert "nturgbd/toy0.avi" in printed
    # The same when they are asked: a line each, and they are asked again when they are there.
    options = ["--bench", "mvbench", "--mvbench_root", root, "--max_new_tokens", 2, "--workers", 0]
    only = [sample for sample in samples if sample.kind == "fine_grained_pose"]
    asked = evaluate_here(tmp_path / "asked", *options)
    assert asked["skipped"] == len(only)
    assert capsys.readouterr().err.count("not asked: mvbench/fine_grained_pose") == 2


# ---- media -----------------------------------------------------------------------------------------
def write_video(path, T=20, seconds=None, size=(32, 24)):
    """A video of noise at 2 frames a second, whose sound rises from second to second."""
    pictures = np.stack([np.asarray(noise_picture(*size, seed)) for seed in range(T)])
    samples = int((T / FPS if seconds is None else seconds) * SAMPLE_RATE)
    sound = np.arange(samples) / samples * 0.9
    path.write_bytes(video_file(pictures, sound))
    return str(path)


def media_question(path, **fields) -> Question:
    sample = question(OPTIONS, "B")
    sample.pictures = [str(path)]
    sample.sound = str(path)
    return replace(sample, **fields)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi"])
def test_videos_are_shown_in_real_time(name, tmp_path):
    sample = media_question(write_video(tmp_path / name))
    whole = read_clip(sample)
    assert (len(whole.frames), whole.fps) == (20, FPS)
    few = read_clip(sample, most_frames=5)
    # 10 seconds stay 10 seconds.
    assert (len(few.frames), few.fps) == (5, 0.5)
    assert len(few.sound) == pytest.approx(10 * SAMPLE_RATE, abs=SAMPLE_RATE / 100)
    assert read_clip(sample, hear=False).sound is None


def test_bounds_cut_frames_and_sound(tmp_path):
    sample = media_question(write_video(tmp_path / "a.mp4"), start=2.0, end=4.0)
    clip = read_clip(sample)
    whole = read_clip(replace(sample, start=None, end=None))
    assert len(clip.frames) == 5
    assert np.array_equal(clip.frames[0], whole.frames[4])
    assert np.array_equal(clip.frames[-1], whole.frames[8])
    heard = whole.sound[2 * SAMPLE_RATE:5 * SAMPLE_RATE]
    assert np.array_equal(clip.sound, heard)
    late = replace(sample, start=30.0, end=31.0)
    with pytest.raises(BadInput, match="no frame from 30 to 31 s of 10.0 s: .*a.mp4"):
        read_clip(late)
    # An end after the video's is the video's.
    assert len(read_clip(replace(sample, end=99.0)).frames) == 16


def slow_window(start, end, fps, count, first):
    """MVBench's rule: numbers of pictures from `first` on, as places from 0 on."""
    low = max(first, round(start * fps))
    high = min(round(end * fps), count - 1 + first)
    return [number - first for number in range(low, high + 1)]


@pytest.mark.parametrize("start, end", [(0, 1), (0.1, 0.2), (1, 3), (2.5, 99)])
def test_folders_of_pictures_begin_with_number_1(start, end, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for t in range(12):
        noise_picture(32, 24, t).save(folder / f"{t + 1:05d}.jpg")
    sample = media_question(folder, start=float(start), end=float(end), fps=3.0, sound=None)
    expected = slow_window(start, end, 3, 12, 1)
    assert list(frame_window(sample, 12, 3.0)) == expected
    clip = read_clip(sample)
    assert clip.sound is None
    first = Image.open(folder / f"{expected[0] + 1:05d}.jpg")
    assert np.array_equal(clip.frames[0], first)
    assert len(clip.frames) == min(len(expected), max(2, int(np.ceil(len(expected) / 3 * FPS))))
    video = media_question(write_video(tmp_path / "a.mp4", 12))
    video = replace(video, start=float(start), end=float(end))
    assert list(frame_window(video, 12, 2.0)) == slow_window(start, end, 2, 12, 0)


def test_files_are_found_where_their_authors_put_them(copy):
    root = copy("videomme")
    path = root / "data/-toy0_x.mp4"
    for ending in (".MP4", ".mkv"):
        path = path.rename(path.with_suffix(ending))
        sample = samples_of("videomme", root)[0]
        assert sample.pictures == [str(path)]
        assert len(read_clip(sample, 4).frames) == 4
    root = copy("avhbench")
    for path in (root / "videos").iterdir():
        path.rename(root / path.name)
    (root / "videos").rmdir()
    assert len(read_clip(samples_of("avhbench", root)[0], 4).frames) == 4


def test_a_gif_is_a_video(tmp_path):
    path = tmp_path / "a.gif"
    pictures = [Image.new("RGB", (32, 24), (10 * t, 0, 0)) for t in range(10)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200)
    clip = read_clip(media_question(path, sound=None))
    # Two seconds.
    assert (len(clip.frames), clip.fps) == (4, 2.0)
    assert [clip.frames[k].getpixel((3, 3))[0] for k in range(4)] == [0, 30, 60, 90]
    path.write_bytes(path.read_bytes()[:40])
    with naming(path):
        read_clip(media_question(path, sound=None))


def test_a_picture_has_its_whole_sound(minis):
    sample = samples_of("omnibench", minis("omnibench"))[0]
    clip = read_clip(sample)
    assert len(clip.frames) == 1
    assert len(clip.sound) > 3 * SAMPLE_RATE
    kinds = [part["type"] for message in prompt(clip) for part in message["content"]]
    assert kinds[-2:] == ["image", "audio"]
    silent = read_clip(sample, hear=False)
    kinds = [part["type"] for message in prompt(silent) for part in message["content"]]
    assert kinds[-1] == "image"


SUBTITLES = """1
00:00:00,000 --> 00:00:02,000
<font color="white">first</font>
line

2
00:00:01,500 --> 00:00:04,000
second

3
00:01:00,250 --> 01:00:01,000
last
"""


def test_subtitles_of_the_frames_that_are_shown(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(b"\xef\xbb\xbf" + SUBTITLES.replace("\n", "\r\n").encode())
    spans = read_subtitles(str(path))
    assert spans == [(0, 2, "first line"), (1.5, 4, "second"), (60.25, 3601, "last")]
    assert lines_at(spans, [0, 1.6, 3, 3.5, 10]) == ["first line", "second"]
    sample = media_question(write_video(tmp_path / "a.mp4"), subtitles=str(path))
    assert read_clip(sample, subtitles=True).query == "Which?\nSubtitles:\nfirst line\nsecond"
    assert read_clip(sample).query == "Which?"
    path.write_text("no subtitles at all")
    with naming(path):
        read_clip(sample, subtitles=True)


def test_a_subtitle_without_words_does_not_take_the_next_one(tmp_path):
    path = tmp_path / "a.srt"
    stamps = [f"00:00:0{t},000 --> 00:00:0{t + 1},000" for t in range(3)]
    path.write_text(f"1\n{stamps[0]}\n\n2\n{stamps[1]}\nword\n \n3\n{stamps[2]}")
    # The last line has no end.
    assert read_subtitles(str(path)) == [(0, 1, ""), (1, 2, "word")]
    path.write_text(path.read_text() + "\nend")
    assert read_subtitles(str(path))[2] == (2, 3, "end")


# ---- controls --------------------------------------------------------------------------------------
def first_logits(policy, inputs):
    prompts = policy.embed([inputs])
    logp, _ = policy.logprobs(prompts[0], torch.arange(20, 40)[:, None])
    return logp


@pytest.mark.parametrize("bench", ["avhbench", "omnibench", "daily_omni"])
def test_removing_the_sound_changes_the_logits(bench, minis, systems):
    """So does another sound in its place. What --sound false gives has none."""
    sample = samples_of(bench, minis(bench))[0]
    heard = prompt_inputs(systems.processor, read_clip(sample, 6))
    removed = prompt_inputs(systems.processor, read_clip(sample, 6, hear=False))
    assert heard.mel is not None
    assert removed.mel is None
    assert not (removed.ids == systems.processor.audio).any()
    silent = replace(heard, mel=torch.zeros_like(heard.mel))
    logits = [first_logits(systems.policy, inputs) for inputs in (heard, removed, silent)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def asked_prompts(bench, root, tmp_path, monkeypatch, *options):
    """[(prompt's text, Inputs)] of what eval.py asks."""
    seen = []

    def spy(processor, clip):
        inputs = prompt_inputs(processor, clip)
        seen.append((prompt(clip)[1]["content"][0]["text"], clip, inputs))
        return inputs

    monkeypatch.setattr(questions, "prompt_inputs", spy)
    common = ["--bench", bench, f"--{bench}_root", root, "--workers", 0, "--max_new_tokens", 1]
    evaluate_here(tmp_path / "out", *common, *options)
    return seen


def test_controls_reach_the_prompt(minis, tmp_path, monkeypatch):
    root = minis("videomme")
    options = ["--think", "false", "--sound", "false", "--subtitles", "true", "--frames", 4,
               "--video_tokens", 4, "--limit", 3]
    for text, clip, inputs in asked_prompts("videomme", root, tmp_path, monkeypatch, *options):
        assert "<think>" not in text
        assert "<answer>" in text
        assert "Subtitles:\nIt is second 0." in text
        assert inputs.mel is None
        assert len(clip.frames) == 4
        assert inputs.grid[0].prod() // 4 <= 2 * 4
    seen = asked_prompts("videomme", root, tmp_path / "usual", monkeypatch, "--limit", 3)
    for text, clip, inputs in seen:
        assert "<think>" in text
        assert "Subtitles" not in text
        assert inputs.mel is not None
        assert len(clip.frames) > 4
        assert inputs.grid[0, 0] > 2


def refusal(capsys, out, *arguments):
    with pytest.raises(SystemExit) as stop:
        evaluate_here(out, *arguments)
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_options_that_mean_nothing_are_refused(minis, tmp_path, capsys):
    for option, value in (("think", "false"), ("sound", "false"), ("subtitles", "true")):
        line = refusal(capsys, tmp_path, "--limit", 1, f"--{option}", value)
        assert f"--{option} means nothing to --bench toy" in line
    root = minis("avhbench")
    common = ["--bench", "avhbench", "--avhbench_root", root]
    assert "no masks to pack" in refusal(capsys, tmp_path, *common, "--zip")
    path = tmp_path / "replies.json"
    path.write_text('{"a": 3}')
    assert str(path) in refusal(capsys, tmp_path, *common, "--predictions", path)
    evaluate_here(tmp_path / "own", *common, "--limit", 1, "--max_new_tokens", 1, "--workers", 0)
    capsys.readouterr()
    line = refusal(capsys, tmp_path / "own", *common, "--limit", 1, "--max_new_tokens", 1, "--think", "false")
    assert "think True, not False" in line


# ---- asking ----------------------------------------------------------------------------------------
def numbers_of(found):
    numbers = []
    for batch in found:
        numbers += [number for number, _ in batch]
    return numbers


def test_prompts_of_similar_length_are_together():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 1000, 50)
    items = [(i, SimpleNamespace(ids=range(length))) for i, length in enumerate(lengths)]
    found = list(batches(iter(items), 4, pool=20))
    assert sorted(numbers_of(found)) == list(range(50))
    assert all(len(batch) == 4 for batch in found[:-1])
    # The whole list fits into the pool, so no batch overlaps another.
    shortest = 1000
    for batch in found:
        own = [lengths[i] for i, _ in batch]
        assert max(own) <= shortest
        shortest = min(own)
    # A small pool gives every item, too.
    found = list(batches(iter(items), 4, pool=1))
    assert sorted(numbers_of(found)) == list(range(50))


def test_questions_about_the_same_media_are_read_once(minis):
    samples = samples_of("videomme", minis("videomme"))
    assert group_questions(samples) == [[0, 1, 2], [3, 4, 5]]
    assert group_questions(samples, most=2) == [[0, 1], [2], [3, 4], [5]]
    bounded = [replace(sample, start=float(i), end=9.0) for i, sample in enumerate(samples)]
    assert len(group_questions(bounded)) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_prepare_what_this_process_would(workers, minis):
    samples = samples_of("videomme", minis("videomme"))
    samples[4].broken = "a fault"
    processor = Processor(TOY_POLICY)
    options = SimpleNamespace(frames=6, sound=True, think=True, subtitles=False, workers=workers)
    items = list(prepare(processor, samples, options))
    assert all(isinstance(item, Prepared) for item in items)
    assert [item.numbers for item in items] == [[0, 1, 2], [3, 5], [4]]
    assert "a fault" in items[-1].problem
    for item in items[:-1]:
        for number, inputs in zip(item.numbers, item.inputs):
            # The vision tower knows pictures by their tensor.
            assert inputs.patches is item.inputs[0].patches
            expected = prompt_inputs(processor, read_clip(samples[number], 6))
            for name in ("ids", "positions", "patches", "grid"):
                assert torch.equal(getattr(inputs, name), getattr(expected, name))
            # A worker has one thread, and sums of several threads have another order.
            torch.testing.assert_close(inputs.mel, expected.mel, rtol=0, atol=1e-6)


def test_full_shared_memory_ends_in_one_line(minis, monkeypatch):
    def share_memory(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory)
    samples = samples_of("videomme", minis("videomme"))
    options = SimpleNamespace(frames=6, sound=True, think=True, subtitles=False, workers=1)
    with pytest.raises(BadInput, match="no room in shared memory, /dev/shm .*unable to allocate"):
        list(prepare(Processor(TOY_POLICY), samples, options))


def test_a_worker_that_dies_is_told_in_one_line(minis, monkeypatch, child_handler):
    samples = samples_of("videomme", minis("videomme"))
    options = SimpleNamespace(frames=6, sound=True, think=True, subtitles=False, workers=1)
    monkeypatch.setattr(questions, "read_clip", lambda *_: os._exit(3))
    with pytest.raises(BadInput, match="a worker that reads media has died .*goes on"):
        list(prepare(None, samples, options))


def test_replies_do_not_depend_on_the_batch(minis, tmp_path):
    root = minis("daily_omni")
    common = ["--bench", "daily_omni", "--daily_omni_root", root, "--max_new_tokens", 12]
    texts = []
    for batch in (1, 4):
        results = evaluate_here(tmp_path / str(batch), *common, "--batch", batch, "--workers", 0)
        texts.append({row["name"]: row["text"] for row in results["expressions"]})
    assert texts[0] == texts[1]


def test_an_evaluation_goes_on_where_it_was_cut_off(minis, tmp_path, capsys):
    root = minis("daily_omni")
    options = ["--bench", "daily_omni", "--daily_omni_root", root, "--max_new_tokens", 4, "--workers", 0]
    out = tmp_path / "out"
    whole = evaluate_here(out, *options)
    path = out / "answers-0.jsonl"
    lines = path.read_text().splitlines()
    # Half a line is none.
    path.write_text("\n".join([lines[0], lines[1], lines[2][:30]]))
    capsys.readouterr()
    again = evaluate_here(out, *options)
    assert "2 of 4 questions were already there" in capsys.readouterr().out
    assert again["expressions"] == whole["expressions"]
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.slow
def test_processes_share_the_questions(minis, tmp_path):
    root = minis("avhbench")
    options = ["--bench", "avhbench", "--avhbench_root", root, "--max_new_tokens", 4, "--workers", 1]
    out = tmp_path / "two"
    done = run_program("eval.py", *options, "--out", out, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((out / "results.json").read_text())
    one = evaluate_here(tmp_path / "one", *options, "--max_new_tokens", 4)
    assert two["expressions"] == one["expressions"]
    counts = [len((out / f"answers-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [5, 5]


# ---- what is broken is named -----------------------------------------------------------------------
QA = "QA.json"
LINES = "videomme/test.jsonl"
FAULTS = [
    ("avhbench", QA, put_at(0, "task", value="Other"), "task 'Other' is unknown"),
    ("avhbench", QA, put_at(0, "label", value="yes"), "neither Yes nor No"),
    ("avhbench", QA, put_at(0, "video_id", value="../x"), "leads out of its folder"),
    ("avhbench", QA, drop(0, "text"), "no 'text'"),
    ("avhbench", QA, put_at(0, value=3), "no 'task'"),
    ("mvbench", "json/action_count.json", put_at(0, "answer", value="Nobody"), "none of the options"),
    ("mvbench", "json/action_count.json", put_at(0, "candidates", value=["x"]), "list of 2 to 8"),
    ("mvbench", "json/action_count.json", put_at(0, "candidates", value=[3, 4]), "an option .* is a int"),
    ("mvbench", "json/action_sequence.json", put_at(0, "start", value="1"), "no seconds"),
    ("mvbench", "json/action_sequence.json", put_at(0, "start", value=5), "before it starts"),
    ("mvbench", "json/action_sequence.json", drop(0, "end"), "no 'end'"),
    ("mvbench", "json/action_sequence.json", put_at(0, "video", value="/etc/x"), "leads out of its folder"),
    ("daily_omni", "qa.json", put_at(0, "Answer", value="E"), "none of the options"),
    ("daily_omni", "qa.json", put_at(0, "Choice", value=["A. x", "C. y"]), "does not begin with B."),
    ("daily_omni", "qa.json", put_at(0, "Type", value="a\nb"), "no short text"),
    ("daily_omni", "qa.json", put_at(0, "video_id", value="none"), "no such video"),
    ("daily_omni", "qa.json", put_at(0, "Question", value="x" * 9000), "9000 characters|more than 8000"),
]


@pytest.mark.parametrize("bench, file, damage, message", FAULTS)
def test_check_names_a_fault(bench, file, damage, message, copy, capsys):
    root = copy(bench)
    damage(root / file)
    assert_fault(bench, find_benchmark(bench).splits[0], root, message, capsys)


def change_line(path, change):
    """Changes the JSON value in a file's first line."""
    first, *rest = path.read_text().splitlines()
    value = json.loads(first)
    change(value)
    path.write_text("\n".join([json.dumps(value), *rest]))


@pytest.mark.parametrize("bench, key, value, message", [
    ("omnibench", "answer", "Nothing", "none of the options"),
    ("omnibench", "audio_path", "../x", "leads out of its folder"),
    ("omnibench", "image_path", "none.png", "no such video file"),
    ("omnibench", "options", "A", "'options' is a str"),
    ("videomme", "duration", "", "no short text"),
    ("videomme", "videoID", "a/b", "leads out of its folder"),
    ("videomme", "answer", "E", "none of the options"),
    ("videomme", "options", ["A. x", "y"], "does not begin with B."),
])
def test_check_names_a_fault_of_a_line(bench, key, value, message, copy, capsys):
    root = copy(bench)
    file = root / (LINES if bench == "videomme" else "dataset/batch-5_1142_20240817.jsonl")
    if not file.exists():
        pytest.skip("the miniature is parquet where there is pyarrow")

    def change(record):
        record[key] = value

    change_line(file, change)
    assert_fault(bench, "test", root, message, capsys)
    # Half a line breaks one row.
    file.write_text("{\n" + "\n".join(file.read_text().splitlines()[1:]))
    assert_fault(bench, "test", root, "no '.*' in .*", capsys)


@pytest.mark.parametrize("bench, file", [
    ("avhbench", QA), ("omnibench", "dataset/batch-5_1142_20240817.jsonl"), 
    ("mvbench", "json/egocentric_navigation.json"), ("daily_omni", "qa.json"),
])
def test_a_small_file_that_is_missing_or_torn_is_named(bench, file, copy, capsys):
    root = copy(bench)
    path = root / file
    path.write_text("{ torn")
    split = find_benchmark(bench).splits[0]
    assert_malformed(bench, split, root, file, "cannot use", capsys)
    path.unlink()
    assert_malformed(bench, split, root, file, "no such file", capsys)


def test_a_question_that_cannot_be_asked_costs_itself_alone(copy, tmp_path, capsys):
    root = copy("daily_omni")
    edit(root / "qa.json", lambda items: items[0].pop("Answer"))
    video = next((root / "Videos").glob("-toy1/*.mp4"))
    video.write_bytes(b"no video")
    out = tmp_path / "out"
    options = ["--bench", "daily_omni", "--daily_omni_root", root, "--max_new_tokens", 2, "--workers", 1]
    results = evaluate_here(out, *options)
    problems = [row["problem"] for row in results["expressions"]]
    assert "no 'Answer'" in problems[0]
    assert problems[1] in (None, "unreadable")
    assert all(str(video) in problem for problem in problems[2:])
    part = results["subsets"]["overall"]
    assert (part["skipped"], part["rows"], part["ours"]) == (3, 4, 0)
    assert "not asked: 3 of 4 questions" in capsys.readouterr().out


def test_the_page_says_how_questions_were_asked_and_what_was_not(copy, tmp_path):
    root = copy("daily_omni")
    edit(root / "qa.json", lambda items: items[0].pop("Answer"))
    options = ["--bench", "daily_omni", "--daily_omni_root", root, "--max_new_tokens", 2, "--workers", 0]
    first = tmp_path / "first"
    evaluate_here(first, *options)
    evaluate_here(
        tmp_path / "out", *options, "--sound", "false", "--limit", 3, "--against", against_of(first, 3))
    page = (tmp_path / "out/report.html").read_text()
    for words in ("1 skipped", "no &#x27;Answer&#x27; in", "sound false", "think true", "ours, difference",
                  "never taught to answer", "partial: --limit 3, of 4 questions", "against ",
                  "rows that were not asked leave"):
        assert words in page, words


def against_of(out, limit):
    """results.json of an evaluation, of its first questions alone."""
    report = json.loads((out / "results.json").read_text())
    report["expressions"] = report["expressions"][:limit]
    path = out / "some.json"
    path.write_text(json.dumps(report))
    return path


def test_replies_to_other_questions_are_no_evaluation(minis, tmp_path, capsys):
    path = tmp_path / "replies.json"
    path.write_text(json.dumps({"mvbench/x/0": "B"}))
    root = minis("daily_omni")
    options = ["--bench", "daily_omni", "--daily_omni_root", root, "--predictions", path]
    with pytest.raises(SystemExit):
        evaluate_here(tmp_path / "out", *options)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"error: no reply to a question of daily_omni in {path}; its first is to mvbench/x/0"


@pytest.mark.parametrize("bench, file", [("daily_omni", "qa.json"), ("videomme", "videomme/test.jsonl")])
def test_what_was_not_asked_leaves_the_official_denominator(bench, file, copy, tmp_path):
    """The tables say so. It makes no difference whether its media or its record cannot be used."""
    root = copy(bench)
    path = root / file
    if not path.exists():
        pytest.skip("the rows are a parquet file here")
    text = path.read_text()
    answer = "Answer" if bench == "daily_omni" else "answer"
    path.write_text(text.replace(f'"{answer}"', '"none"', 1))
    samples = samples_of(bench, root)
    assert samples[0].broken
    replies = {sample.name: f"<answer>{sample.solution}</answer>" for sample in samples[1:]}
    part = scored(bench, root, tmp_path, replies)["subsets"]["overall"]
    assert (part["official"], part["counted"], part["skipped"]) == (100, len(samples) - 1, 1)
    assert part["ours"] == pytest.approx(100 * (len(samples) - 1) / len(samples))


def test_a_broken_row_of_avhbench_counts_in_its_task(copy, tmp_path):
    root = copy("avhbench")

    def damage(items):
        for item in items:
            item.pop("text")
        items[0].pop("task")
        items[1].pop("video_id")

    edit(root / "QA.json", damage)
    parts = scored("avhbench", root, tmp_path, {}, "--split", "test,captions")["subsets"]
    # A caption is no wrong yes or no, and the row without a task is in no part without a name.
    assert set(parts) == {"overall", *avhbench.TASKS, avhbench.CAPTIONING}
    assert (parts["overall"]["rows"], parts[avhbench.TASKS[0]]["rows"]) == (10, 3)
    assert parts[avhbench.CAPTIONING]["skipped"] == 2


def test_options_lose_their_letters():
    assert without_letters(["A. x", "B) y", " C: z. "], "here") == ["x", "y", "z."]
    with pytest.raises(BadInput, match="option 1 does not begin with B. in here"):
        without_letters(["A. x", "By"], "here")


def test_the_table_has_a_line_for_each_part(minis, tmp_path):
    benchmark = find_benchmark("mvbench")
    samples = samples_of("mvbench", minis("mvbench"))
    (tmp_path / "replies.json").write_text("{}")
    results = score_replies(benchmark, samples, str(tmp_path / "replies.json"))
    lines = reply_table(benchmark.quiz, results).splitlines()
    assert re.split("  +", lines[0].strip())[:2] == ["ours", "official"]
    assert len(lines) == 1 + 2 + 20 + 1

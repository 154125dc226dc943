"""toy/study.py: the plan, the runner, tables on made-up results; what the studies measure and train on."""
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from benchmarks.metrics import score_video
from benchmarks.toy import HELD_OUT, RELATIONS, draw_query, toy_queries, toy_scene
from data import FPS, Processor, answer_text, keyframes, parse_moments
from run.draw import TrainingItems, training_sources
from run.plan import check_shares
from run.settings import read_settings
from tests.world import ROOT, TOY
from toy import grounding, study, supervised, tables
from toy.lessons import narrated, right_answer, scene_accounts, unreasoned_answer
from toy.study import EVALUATIONS, RECIPES, STUDIES, Column, Run, Runner, Study
from train import Settings
from trust.errors import BadInput


def options_of(*words, out):
    return study.read_options([*words, "--out", str(out)])


# ---- the plan --------------------------------------------------------------------------------------
def test_every_study_is_planned_and_every_run_once(tmp_path):
    options = options_of("all", out=tmp_path)
    chains = study.plan(STUDIES, options)
    names = [(run.name, run.program) for chain in chains for run in chain]
    assert len(names) == len(set(names))
    planned = {name for name, _ in names}
    for one in STUDIES.values():
        for recipe in one.recipes:
            for seed in study.seeds_of(recipe, options.seeds):
                name = study.policy_name(recipe, seed)
                assert {f"{name}/{column.evaluation}" for column in one.columns} <= planned
    # A policy is trained before it is evaluated; the cold start is there already.
    for chain in chains:
        first, *rest = [run.name for run in chain]
        assert first.startswith("cold/") or all(name.startswith(f"{first}/") for name in rest)
    used = {recipe for one in STUDIES.values() for recipe in one.recipes}
    assert used == set(RECIPES)
    assert {column.evaluation for one in STUDIES.values() for column in one.columns} == set(EVALUATIONS)


def test_recipes_are_settings_of_the_programs():
    """A recipe with a wrong name or value would end a night's run after hours."""
    for recipe in RECIPES.values():
        words = recipe.options.split()
        if recipe.program == "toy/supervised.py":
            supervised.read_options(words)
        elif recipe.program:
            read_settings(Settings, "", words)


@pytest.mark.parametrize("words,problem", [
    (["nothing"], "nothing"),
    (["all", "--seeds", "0,0"], "--seeds 0,0"),
    (["all", "--seeds", "x"], "--seeds x"),
    (["all", "--seeds", "00,0"], "--seeds 00,0"),
    (["all", "--seeds", "10000000000"], "--seeds 10000000000"),
    (["all", "--seeds", "9" * 5000], "--seeds 999"),
    (["all", "--clips", "1001"], "--clips 1001"),
    (["all", "--clips", "0"], "--clips"),
    (["all", "--step", "1"], "--step"),
    (["all", "--out", "/dev/null/x"], "/dev/null/x"),
])
def test_wrong_options_are_told_in_a_line(words, problem, capsys):
    with pytest.raises(SystemExit) as ending:
        study.read_options(words)
    assert ending.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and problem in line


@pytest.mark.parametrize("main,words", [
    (supervised.main, ["--data", "revos"]),
    (supervised.main, ["--policy", "nowhere"]),
    (supervised.main, ["--lr", "nan"]),
    (supervised.main, ["--steps", "100000"]),
    (supervised.main, ["--out", str(ROOT)]),
    (supervised.main, ["--out", "new/.."]),
    (supervised.main, ["--seed", "1000000001"]),
    (grounding.main, ["boxes"]),
    (grounding.main, ["frames", "--policy", "nowhere"]),
])
def test_wrong_options_of_its_programs_too(main, words, capsys):
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("advice", [{"steps": 0}, {"batch": "8"}, {"updates": 1.5}, {"steps": True}])
def test_supervision_takes_no_wrong_advice(advice, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training.json").write_text(json.dumps(advice))
    with pytest.raises(SystemExit) as ending:
        supervised.read_options(["--policy", str(tmp_path), "--out", str(tmp_path / "new")])
    assert ending.value.code == 2
    name, = advice
    assert f"training.json: {name} must be a whole number from 1" in capsys.readouterr().err


def test_runs_of_other_lengths_are_not_mixed(tmp_path, capsys):
    options = options_of("all", out=tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(study.facts_of_place(options)))
    options_of("kinds", out=tmp_path)
    for words in (["--clips", "7"], ["--steps", "7"], ["--quick"]):
        with pytest.raises(SystemExit) as ending:
            options_of("all", *words, out=tmp_path)
        assert ending.value.code == 2
        assert "give another --out" in capsys.readouterr().err


def test_time_is_estimated_by_what_was_measured(tmp_path, capsys):
    options = options_of("adapters", "--jobs", "2", out=tmp_path)
    chains = study.plan({"adapters": STUDIES["adapters"]}, options)
    # 2 evaluations of the cold start, and 6 trainings with 2 each.
    assert study.estimate(chains, options) == (
        "20 runs, 20 of them missing; no time measured here yet of eval.py, train.py")
    rows = [dict(name="a", program="train.py", seconds=s) for s in (200, 400)]
    rows.append(dict(name="b", program="eval.py", seconds=3600))
    (tmp_path / "times.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    write_results(study.results_file("cold", 0, "test", options), [])
    # (13 x 3600 + 6 x 300) / 2 seconds
    assert "20 runs, 19 of them missing: about 6.8 hours, 2 at a time" in study.estimate(chains, options)
    study.print_plan(chains, options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    [finished] = [line for line in lines if not line.startswith("missing")][:-1]
    assert finished.startswith("finished cold/test: eval.py --split test")


def test_a_line_of_times_that_was_cut_is_left_out(tmp_path):
    lines = ['{"program": "a", "seconds": 2}', '{"program": "a", "sec', "[]", '{"program": "a"}',
             '{"program": "a", "seconds": "x"}', '{"program": "a", "seconds": -5}']
    (tmp_path / "times.jsonl").write_text("\n".join(lines))
    assert study.measured(tmp_path) == {"a": 2}


# ---- the runner ------------------------------------------------------------------------------------
def made_up_run(folder, name, code=""):
    """A run that notes its name and leaves its result, unless `code` ends it before."""
    program = folder / f"{name}.py"
    result = folder / f"{name}.result"
    program.write_text(f"{code}\nopen('order', 'a').write('{name} ')\nopen({str(result)!r}, 'w')\n")
    return Run(name, str(program), [], result, folder / f"{name}.json")


def test_a_chain_runs_what_is_missing_and_stops_at_a_failure(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    first = made_up_run(tmp_path, "first")
    first.result.write_text("")
    second = made_up_run(tmp_path, "second")
    broken = made_up_run(tmp_path, "broken", "import sys; sys.exit('error: no such thing')")
    after = made_up_run(tmp_path, "after")
    other = made_up_run(tmp_path, "other")
    runner = Runner(tmp_path)
    assert not runner.run_all([[first, second, broken, after], [other]], 1)
    assert (tmp_path / "order").read_text().split() == ["second", "other"]
    said = capsys.readouterr().out
    assert "broken: failed with code 1: error: no such thing" in said
    assert not after.finished
    assert list(study.measured(tmp_path)) == [second.program, other.program]
    # Only what is missing is made again.
    made_up_run(tmp_path, "broken")
    assert runner.run_all([[first, second, broken, after], [other]], 2)
    assert (tmp_path / "order").read_text().split() == ["second", "other", "broken", "after"]


def test_a_result_of_another_command_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    run = made_up_run(tmp_path, "first")
    assert Runner(tmp_path).run_all([[run]], 1)
    assert run.finished
    with pytest.raises(BadInput, match="was made by another command"):
        replace(run, arguments=["--lr", "99"]).finished


def test_a_training_that_was_told_to_end_is_not_finished(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    program = tmp_path / "train.py"
    program.write_text("")
    run = Run("one", str(program), [], tmp_path / "nothing", tmp_path / "one.json")
    assert not Runner(tmp_path).run_all([[run]], 1)
    assert "ended before it was finished" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_parts_share_the_prompts_of_every_training(words, tmp_path, monkeypatch):
    chains = study.plan(STUDIES, options_of("all", *words, out=tmp_path))
    trainings = [run for chain in chains for run in chain if run.program == "train.py"]
    assert len(trainings) > 10
    for run in trainings:
        check_shares(read_settings(Settings, "", run.arguments), 1)


def test_what_runs_is_ended_when_the_study_is(tmp_path):
    (tmp_path / "logs").mkdir()
    sleeper = made_up_run(tmp_path, "sleeper", "import time; time.sleep(60)")
    after = made_up_run(tmp_path, "after")
    runner = Runner(tmp_path)
    start = time.time()
    threading.Timer(0.5, runner.stop).start()
    assert not runner.run_all([[sleeper], [after]], 1)
    assert time.time() - start < 30
    assert not after.finished
    assert not (tmp_path / "times.jsonl").exists()


def test_an_error_of_one_chain_is_told_and_others_go_on(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    broken = made_up_run(tmp_path, "broken")
    # In place of its log there is a folder.
    (tmp_path / "logs/broken.log").mkdir()
    other = made_up_run(tmp_path, "other")
    assert not Runner(tmp_path).run_all([[broken], [other]], 1)
    assert "broken.log" in capsys.readouterr().out
    assert other.finished


def test_a_reader_that_has_gone_ends_no_study(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    (tmp_path / "logs").mkdir()
    chain = [made_up_run(tmp_path, "first"), made_up_run(tmp_path, "second")]
    monkeypatch.setattr(sys, "stdout", Gone())
    assert Runner(tmp_path).run_all([chain], 1)


def test_what_a_failure_said_is_of_its_own_run(tmp_path):
    log = tmp_path / "log"
    log.write_text("of a run before\n")
    assert study.last_line(log, 16) == "it printed nothing"
    with open(log, "a") as file:
        file.write("10%\r50%\rerror: no such thing\n")
    assert study.last_line(log, 16) == "error: no such thing"
    log.write_bytes(b"10%\r50%\r")
    assert study.last_line(log) == "50%"


def test_times_do_not_follow_the_clock_of_the_day(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    hours = iter(range(100, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600 * next(hours))
    run = made_up_run(tmp_path, "one")
    assert Runner(tmp_path).run_all([[run]], 1)
    row = json.loads((tmp_path / "times.jsonl").read_text())
    assert 0 <= row["seconds"] < 60


def test_small_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "study.json"
    study.write_whole(path, dict(clips=1))

    def full_disk(self, text):
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match=f"cannot write {path} .No space left"):
        study.write_whole(path, dict(clips=2))
    assert json.loads(path.read_text()) == dict(clips=1)


def test_one_study_at_a_time_writes_to_a_folder(tmp_path):
    options = options_of("all", out=tmp_path)
    assert study.run_studies({}, options)
    with open(tmp_path / "lock", "w") as file:
        study.lock_folder(file, tmp_path)
        with pytest.raises(BadInput, match="another study.* is writing to"):
            study.run_studies({}, options)
    assert study.run_studies({}, options)


def test_a_foreign_lock_is_named(tmp_path):
    options = options_of("all", out=tmp_path)
    # To open it would wait for ever.
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(BadInput, match="lock is no ordinary file"):
        study.run_studies({}, options)


def test_programs_that_outlive_a_killed_study_keep_its_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    sleeper = made_up_run(tmp_path, "sleeper", "import time; time.sleep(60)")
    file = open(tmp_path / "lock", "w")
    study.lock_folder(file, tmp_path)
    runner = Runner(tmp_path, (file.fileno(),))
    thread = threading.Thread(target=runner.run_chain, args=([sleeper],))
    thread.start()
    while not runner.processes:
        time.sleep(0.01)
    # As where the study dies.
    file.close()
    with open(tmp_path / "lock", "w") as other:
        with pytest.raises(BadInput, match="a program that one has started"):
            study.lock_folder(other, tmp_path)
        runner.stop()
        thread.join()
        study.lock_folder(other, tmp_path)


def test_a_run_takes_one_core(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert study.environment()["OMP_NUM_THREADS"] == "1"
    assert "MALLOC_TRIM_THRESHOLD_" in study.environment()


# ---- values and intervals --------------------------------------------------------------------------
def test_intervals_over_seeds_are_students():
    mean, half = tables.over_seeds([60.0, 63.0, 66.0])
    assert mean == 63
    assert half == pytest.approx(4.303 * 3 / 3 ** 0.5, abs=1e-3)
    assert tables.over_seeds([60.0]) == (60.0, None)


def test_differences_are_paired_over_clips():
    ours = [dict(a=60, b=80, c=5), dict(a=80, b=80)]
    mean, half = tables.over_clips(ours, [dict(a=50, b=90)])
    # a: 70 - 50, b: 80 - 90. c has no partner.
    assert mean == 5
    assert half == pytest.approx(1.96 * np.std([20, -10], ddof=1) / 2 ** 0.5)


def answer(*names, thought=""):
    moments = [dict(start_time="00:00.00", end_time="00:00.00", description=name) for name in names]
    return f"<think>{thought}</think><answer>{json.dumps(moments)}</answer>"


NULL = "<think>There is no such object.</think><answer>null</answer>"


@pytest.mark.parametrize("text,name,right", [
    (answer("red circle"), "red circle", True),
    (answer("red circle", "red circle"), "red circle", True),
    (answer("red circle", "blue square"), "red circle", False),
    (answer("blue square"), "red circle", False),
    (answer(), "red circle", False),
    (answer("the red circle"), "red circle", False),
    (NULL, "red circle", False),
    (NULL, None, True),
    (answer("red circle"), None, False),
    ("", "red circle", False),
    ("", None, False),
])
def test_who_names_the_target_and_nothing_else_is_right(text, name, right):
    assert tables.named_right(text, name) == right


def test_chance_is_that_of_any_visible_thing():
    for index in range(3):
        scene = toy_scene("heard", index)
        target = scene.masks[[scene.sounding]]
        seen = [mask for mask in scene.masks if mask.any()]
        scores = [np.mean(list(score_video(None, target, mask).values())) for mask in seen]
        assert max(scores) == 100
        # The one who takes the target segments half as well.
        expected = (sum(scores) - 50) / len(seen), 100 / len(seen)
        assert tables.chance({f"toy/heard/{index}/0": 50.0}) == pytest.approx(expected)


# ---- tables on made-up results ---------------------------------------------------------------------
def write_results(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(expressions=rows)))


def rows_of_clips(score, text, split="reasoning", clips=3):
    rows = []
    for index in range(clips):
        kind, query, _ = draw_query(toy_scene(split, index), split, index)
        row = {"name": f"toy/{split}/{index}/0", "kind": kind, "query": query, "J&F": score + index}
        rows.append(row | dict(text=text(index)))
    return rows


def right_text(index):
    return answer(tables.truth("reasoning", index)[0])


MADE_UP = Study("Made up", ("cold", "grpo"), (
    Column("J&F", "reasoning"),
    Column("named", "reasoning", "named"),
    Column("sound", "reasoning", kind="sound"),
    Column("missing", "long"),
))


def test_tables_are_made_of_what_is_on_disk(tmp_path):
    options = options_of("all", out=tmp_path)
    write_results(study.results_file("cold", 0, "reasoning", options), rows_of_clips(20, lambda _: NULL))
    for seed in (0, 1):
        path = study.results_file("grpo", seed, "reasoning", options)
        write_results(path, rows_of_clips(30 + 10 * seed, right_text))
    files = study.files_of(MADE_UP, options)
    head, line, cold, grpo = tables.value_table(MADE_UP, files).splitlines()
    assert head == "|  | J&F | named | sound | missing |"
    assert line == "|---|---|---|---|---|"
    assert cold == "| cold start | 21.0 | 0.0 |  |  |"
    # 31 and 41: a t interval of two seeds is 12.7 standard errors wide.
    left = "(1 of the seeds missing)"
    assert grpo == f"| GRPO | 36.0 +- 63.5 {left} | 100.0 +- 0.0 {left} |  |  |"
    *_, difference = tables.difference_table(MADE_UP, files).splitlines()
    assert difference == "| GRPO | +15.0 +- 0.0 | +100.0 +- 0.0 |  |  |"
    tables.draw_figure({"made up": MADE_UP}, {"made up": files}, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 500


def test_narration_is_scored_by_relation(tmp_path):
    def narrating(index):
        scene = toy_scene("reasoning", index)
        kind, _, target = draw_query(scene, "reasoning", index)
        return right_answer(kind, scene_accounts(scene), scene.things[target].name)

    rows = rows_of_clips(0, narrating, clips=12)
    for relation in RELATIONS:
        assert tables.narrated_right(rows, relation) == (100, 100, 100)
    # Somebody who says everything of the first thing.
    for row in rows:
        name = toy_scene("reasoning", int(row["name"].split("/")[2])).things[0].name
        thought = f"{name}. The {name} {', '.join(RELATIONS)}. The target is the {name}"
        row["text"] = answer(name, thought=thought)
    for relation in RELATIONS:
        precision, recall, score = tables.narrated_right(rows, relation)
        assert score == pytest.approx(2 * precision * recall / max(precision + recall, 1))
        assert precision < 100 and recall < 100


def test_an_answer_follows_its_reasoning_or_not():
    """Whether the narration is right does not matter."""
    thought = "In view: red circle. The red circle grows. The blue square enters last, shrinks."
    query = "the object that enters last"
    for name, follows in (("blue square", 100), ("red circle", 0), ("green square", 0)):
        row = {"name": "toy/test/0/0", "query": query, "text": answer(name, thought=thought)}
        assert tables.value_of(row, "follows") == follows
    for text in (NULL, "", answer("blue square")):
        assert tables.value_of({"name": "toy/test/0/0", "query": query, "text": text}, "follows") == 0


def test_values_are_in_per_cent():
    row = {"name": "toy/test/0/0", "visible": 0.5, "J&F": 61.5, "text": NULL}
    assert tables.value_of(row, "visible") == 50
    assert tables.value_of(row | dict(visible=None), "visible") is None
    assert tables.value_of(row, "J&F") == 61.5
    assert tables.value_of(row, "null") == 100
    assert tables.value_of(row, "IoU") is None


def test_held_out_kinds_are_those_of_toy_four():
    held = dict(kind="reasoning", query=HELD_OUT[0])
    kept = dict(kind="reasoning", query="the object that grows")
    assert tables.counts(held, "held out") and not tables.counts(held, "kept")
    assert tables.counts(kept, "kept") and not tables.counts(kept, "held out")
    assert not tables.counts(dict(kind="referring", query="the red circle"), "kept")
    assert all(tables.counts(row, kind) for row in (held, kept) for kind in ("", "reasoning"))


def test_the_whole_report_needs_no_results(tmp_path, capsys):
    study.main(["table", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for one in STUDIES.values():
        assert f"### {one.title}" in said
    assert "any visible thing" not in said
    options = options_of("table", out=tmp_path)
    rows = rows_of_clips(50, lambda _: NULL, "heard")
    write_results(study.results_file("cold", 0, "heard", options), rows)
    study.main(["table", "--clips", "3", "--out", str(tmp_path)])
    assert "cold start, any visible thing, segmented perfectly" in capsys.readouterr().out


GOOD = {"name": "toy/test/0/0", "kind": "referring", "query": "the red circle", "J&F": 50.0, "text": ""}


@pytest.mark.parametrize("report", [
    "",
    "[]",
    '{"expressions": [{"name": "toy/te',
    "{}",
    '{"expressions": [1]}',
    '{"expressions": [{}]}',
    '{"expressions": [{"name": 3}]}',
    '{"expressions": [{"name": "toy/test/x/0"}]}',
    json.dumps(dict(expressions=[GOOD, GOOD])),
    json.dumps(dict(expressions=[GOOD | {"J&F": "50"}])),
    json.dumps(dict(expressions=[GOOD | {"J&F": 500}])),
    json.dumps(dict(expressions=[GOOD | {"J&F": 50}])).replace("50", "1e999"),
    json.dumps(dict(expressions=[{key: value for key, value in GOOD.items() if key != "kind"}])),
    json.dumps(dict(expressions=[GOOD | dict(problem="missing")])),
    # Those of another number of clips, and of another split.
    json.dumps(dict(expressions=[GOOD, GOOD | dict(name="toy/test/1/0")])),
    json.dumps(dict(expressions=[GOOD | dict(name="toy/long/0/0")])),
])
def test_a_foreign_results_json_is_named(report, tmp_path, capsys):
    path = study.results_file("cold", 0, "test", options_of("table", out=tmp_path))
    path.parent.mkdir(parents=True)
    path.write_text(report)
    with pytest.raises(SystemExit) as ending:
        study.main(["table", "--clips", "1", "--out", str(tmp_path)])
    assert ending.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line


def test_a_damaged_narration_is_named(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, [GOOD | dict(kind="reasoning", text=None)])
    with pytest.raises(BadInput, match=str(path)):
        tables.narration_table({"cold start": dict(reasoning=[path])})


def test_pictures_are_of_the_clips_that_have_a_target():
    expected = tables.expected_clips("pictures", "test", 12)
    assert expected == {("test", index) for index in range(12) if grounding.two_pictures(index)}


def test_the_figure_of_a_named_folder_is_written_there(tmp_path, capsys):
    words = ["--clips", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        study.main(["figure", *words])
    assert "holds no results" in capsys.readouterr().err
    write_results(study.results_file("cold", 0, "test", options_of("figure", out=tmp_path)), [GOOD])
    study.main(["figure", *words])
    assert Image.open(tmp_path / "study.png").size[0] > 500
    assert study.read_options(["figure"]).figure == ROOT / "toy/study.png"


# ---- supervised fine-tuning ------------------------------------------------------------------------
def test_a_full_disk_leaves_no_half_policy(tmp_path):
    class Policy:
        def save_pretrained(self, path):
            path.mkdir()
            raise SafetensorError("I/O error: No space left on device")

    with pytest.raises(OSError, match=f"cannot write {tmp_path}/new.partial .I/O error"):
        supervised.write_policy(Policy(), None, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_supervision_has_the_clips_and_prompts_of_grpo():
    settings = read_settings(Settings, "", ["--seed", "3"])
    processor = Processor(TOY)
    order = supervised.training_order(3)
    sources, _ = training_sources("toy_four", "", {}, 3, (24, 24))
    items = TrainingItems(sources, processor, settings)
    for i in (0, 1, 9):
        clip, inputs, _ = items[i]
        ours, text = supervised.example(processor, order[i], 3, i, HELD_OUT)
        assert clip.name == f"train/{order[i]}"
        assert ours.ids.equal(inputs.ids)
        assert ours.patches.equal(inputs.patches)
        scene = toy_scene("train", order[i])
        targets = {query: target for _, query, target in toy_queries(scene)}
        target = targets[clip.query]
        assert tables.named_right(text, None if target is None else scene.things[target].name)


def test_right_answers_are_right():
    """The narration is true, the one keyframe is the clearest frame, and only reasoning queries narrate."""
    seen = set()
    for index in range(8):
        scene = toy_scene("test", index)
        for kind, query, target in toy_queries(scene):
            name = None if target is None else scene.things[target].name
            text = right_answer(kind, scene_accounts(scene), name)
            assert tables.named_right(text, name)
            spans = {}
            if kind == "reasoning":
                views, _, _ = text.partition(". The ")
                spans = dict(re.findall(r"(\w+ \w+) from (\S+ to [0-9:.]+\d)", views))
                visible = {thing.name for thing, mask in zip(scene.things, scene.masks) if mask.any()}
                assert spans.keys() == visible
                assert narrated(text) == tables.truth("test", index)[1]
            if target is not None:
                areas = scene.masks[target].sum((1, 2))
                chosen = keyframes(parse_moments(text, len(areas), FPS))
                assert chosen == {int(areas.argmax()): name}
                span = spans.get(name) or re.search(r"in view from (.*), clearest", text)[1]
                times = [float(time.removeprefix("00:")) * FPS for time in span.split(" to ")]
                frames = np.flatnonzero(areas)
                assert times == [frames[0], frames[-1]]
            bare = unreasoned_answer(kind, scene_accounts(scene), name)
            assert tables.named_right(bare, name) and not narrated(bare)
            assert answer_text(bare) == answer_text(text)
            seen.add(kind)
    assert len(seen) == 4


def test_supervision_without_reasoning_is_asked_the_same():
    processor = Processor(TOY)
    for i in range(4):
        inputs, text = supervised.example(processor, i, 3, i, ())
        same, bare = supervised.example(processor, i, 3, i, (), unreasoned_answer)
        assert same.ids.equal(inputs.ids)
        assert answer_text(bare) == answer_text(text)
        assert len(bare) < len(text) or "null" in text


def test_the_learning_rate_rises_and_falls():
    rates = [supervised.learning_rate(n, 100) for n in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    assert supervised.learning_rate(0, 1) == 1


# ---- the grounding turn ----------------------------------------------------------------------------
def test_two_pictures_show_and_do_not_show_the_target():
    kinds = set()
    for index in range(12):
        scene = toy_scene("test", index)
        _, _, target = draw_query(scene, "test", index)
        found = grounding.two_pictures(index)
        assert bool(found) == (target is not None)
        for kind, name, picture, box in found:
            t = next(t for t, pixels in enumerate(scene.pictures) if np.array_equal(pixels, picture))
            mask = scene.masks[target, t]
            assert name == scene.things[target].name
            assert mask.any() == (kind == "shown") == (box is not None)
            kinds.add(kind)
    assert kinds == {"shown", "hidden"}


def test_boxes_at_low_resolution_are_in_its_pixels():
    usual = Processor(TOY)
    low = Processor(TOY, image_tokens=usual.video_tokens)
    boxes = 0
    for place, index in enumerate(supervised.training_order(0)[:12]):
        inputs, text = supervised.grounding_example(low, index, 0, place, ())
        assert inputs.scale[0] > 2
        if text != "null":
            numbers = json.loads(text)[0]["bbox_2d"]
            assert max(numbers) <= 128 / inputs.scale[0]
            boxes += 1
    assert 0 < boxes < 12


# ---- end to end ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_quick_study_runs_and_is_not_run_again(tmp_path):
    words = [sys.executable, str(Path(ROOT, "toy/study.py")), "adapters", "--quick", "--out", str(tmp_path)]
    first = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "8 runs, 8 of them missing" in first.stdout
    assert (tmp_path / "out/lora-seed0/policy/config.json").exists()
    *_, row = [line for line in first.stdout.splitlines() if line.startswith("| adapters")]
    assert re.fullmatch(r"\| adapters of rank 16 \| [+-]\d+\.\d \+- \d+\.\d \|.*", row)
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "8 runs, 0 of them missing: about 0.0 hours" in again.stdout
    assert "train.py," not in again.stdout

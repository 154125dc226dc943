"""speed/step.py and speed/parts.py compare what gives the same; speed/gpu.py runs whatever happens."""
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from speed import gpu, parts
from speed.gpu import Failed, Stage, put_section, run_stage
from speed.parts import PARTS, Different, Setup
from speed.step import in_single_precision
from tests.world import ROOT

PLENTY = dict(device=1e12, host=1e12)


def test_the_benchmark_compares_what_gives_the_same(tmp_path):
    options = "--shape tiny --prompt 40 --completion 4 --group 2 --repeats 1 --threads 1 --device cpu"
    command = [sys.executable, ROOT / "speed/step.py", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    proof = result["proof"]
    assert proof["equal"]
    assert proof["iou"] >= 0.99
    assert proof["errors"]["gradients"] < 1e-4
    assert set(result["parts"]) == {"rollout", "policy", "reference", "masks", "whole"}
    for part in result["parts"].values():
        assert part["ratio"] > 0
        assert part["memory_ratio"]


def test_masks_are_compared_in_float32_on_a_gpu():
    assert torch.backends.cudnn.allow_tf32
    with in_single_precision("cuda"):
        assert not torch.backends.cudnn.allow_tf32
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32


# ---- parts -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def setup():
    return Setup("tiny", torch.device("cpu"))


@pytest.mark.parametrize("name", [name for name in PARTS if name != "rows"])
def test_a_part_shows_equal_outputs_and_then_measures(setup, name, capsys):
    PARTS[name](setup)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    compared = [row for row in found if "limit" in row]
    assert compared
    for row in compared:
        assert row["difference"] <= row["limit"]
    assert len(found) > len(compared)


def test_nothing_is_measured_where_outputs_differ(setup, capsys, monkeypatch):
    monkeypatch.setattr(parts, "attend_by_flash", lambda cache, P, q, k, v: 1.1 * cache.attend(0, q, k, v))
    with pytest.raises(Different, match="attention of a step"):
        parts.attention_step(setup)
    assert "_ms" not in capsys.readouterr().out


@pytest.mark.slow
def test_rollouts_over_the_number_of_rows(setup, capsys):
    parts.rows(setup)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum("rows" in row["what"] for row in found) >= 7


# ---- all of them -----------------------------------------------------------------------------------
def python(code):
    return [sys.executable, "-c", code]


def run(tmp_path, *commands, read=str.splitlines, seconds=20, memory=PLENTY, **needs):
    stage = Stage("mine", list(commands), read, folder=tmp_path, **needs)
    return run_stage(stage, time.monotonic() + seconds, memory, tmp_path)


def test_a_stage_gives_what_is_read_from_its_output(tmp_path):
    result = run(tmp_path, python("print(1)"), python("print(2)"))
    assert (result.status, result.findings) == ("passed", ["1", "2"])


def refuse(output):
    raise Failed("the reward is nan")


@pytest.mark.parametrize("code, read, why", [
    ("import sys; sys.exit('torn apart')", str.splitlines, "exit code 1; torn apart"),
    ("import os; os.abort()", str.splitlines, "exit code -6"),
    ("print('fine')", refuse, "the reward is nan; fine"),
    ("print('no JSON')", gpu.read_step, "Expecting value"),
    ("print('{}')", gpu.read_tests, None),
    ("", gpu.read_step, "list index out of range"),
])
def test_a_stage_that_fails_is_told_and_ends_nothing_else(tmp_path, code, read, why):
    result = run(tmp_path, python(code), read=read)
    assert result.status == ("failed" if why else "passed")
    assert (why or "") in result.why


@pytest.mark.parametrize("options, why", [
    (dict(seconds=5), "no time is left"),
    (dict(device_bytes=2e9, memory=dict(device=1e9, host=9e9)), "needs 2 GB of the device, where 1 are free"),
    (dict(host_bytes=10e9, memory=dict(device=1e9, host=9e9)), "needs 10 GB of the host, where 9 are free"),
])
def test_what_does_not_fit_is_not_begun(tmp_path, options, why):
    result = run(tmp_path, python("open('begun', 'w')"), **options)
    assert result.status == "skipped"
    assert why in result.why
    assert not (tmp_path / "begun").exists()


def test_a_stage_without_memory_is_skipped(tmp_path):
    command = python("raise MemoryError('CUDA out of memory')")
    assert run(tmp_path, command).status == "failed"
    result = run(tmp_path, command, device_bytes=1.0)
    assert (result.status, result.why) == ("skipped", "does not fit the device: out of memory")


def test_a_stage_is_cut_off_when_time_is_up_with_all_that_it_started(tmp_path):
    child = "import time; time.sleep(3); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    result = run(tmp_path, python(code), seconds=1, shortest=0.5)
    assert (result.status, result.why) == ("skipped", "cut off, time is up")
    assert time.monotonic() - start < 2.5
    time.sleep(3 - (time.monotonic() - start) + 0.5)
    assert not (tmp_path / "late").exists()


def test_a_stage_that_hangs_leaves_time_for_the_others(tmp_path):
    result = run(tmp_path, python("import time; time.sleep(9)"), longest=1)
    assert (result.status, result.why) == ("failed", "hangs: not done after 1 s")


def test_what_is_done_is_written_when_the_rest_is_not(tmp_path, monkeypatch, capsys):
    def run_stage(stage, *_):
        if stage.name == "train_device":
            raise KeyboardInterrupt
        return gpu.Result(stage.name, "passed")

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    with pytest.raises(SystemExit, match="stopped"):
        gpu.main(["--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)])
    [stage] = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert stage["name"] == "tests"
    assert "| tests | 0 | passed |" in (tmp_path / "results.md").read_text()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write"):
        gpu.main(["--device", "cpu", "--shape", "tiny", "--out", str(tmp_path / "file/out")])


def test_only_its_section_of_the_results_is_replaced():
    text = "# Speed\n\n## CPU\n\nfast\n\n## GPU\n\nnone so far\n"
    assert put_section(text, "## GPU\n\nnew\n") == "# Speed\n\n## CPU\n\nfast\n\n## GPU\n\nnew\n"
    last = "\n## Later\n\nmore\n"
    assert put_section(text + last, "## GPU\n\nnew\n").endswith("fast\n\n## GPU\n\nnew\n" + last)


def test_the_results_have_one_such_section():
    text = (ROOT / "speed/RESULTS.md").read_text()
    assert text.count(f"\n{gpu.HEADING}\n") == 1


def metrics(folder, rows):
    for name in ("policy/model.safetensors", "curves.png", f"step-{len(rows):06}/run.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    lines = []
    for step, reward in enumerate(rows):
        seconds = dict(update=1.0, step=2.5)
        row = dict(step=step, reward=reward, loss=0.0, gradient_norm=1.0, seconds=seconds, memory_gb=1.0)
        lines.append(row)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_training_is_whole_or_what_lacks_is_named(tmp_path):
    metrics(tmp_path, [1.0, 2.0])
    found, = gpu.read_training("", tmp_path, continued=False)
    assert (found["reward"], found["seconds"]) == (2.0, 2.5)
    with pytest.raises(Failed, match="does not say that it continues"):
        gpu.read_training("", tmp_path, continued=True)
    metrics(tmp_path, [1.0, float("nan")])
    with pytest.raises(Failed, match="reward of step 1 is nan"):
        gpu.read_training("", tmp_path, continued=False)
    (tmp_path / "curves.png").unlink()
    with pytest.raises(Failed, match="curves.png is missing"):
        gpu.read_training("", tmp_path, continued=False)


def test_the_command_ends_with_what_failed_and_leaves_the_results_of_a_gpu(tmp_path, capsys):
    def stages(*_):
        return [Stage("good", [python("print('{\"what\": \"speed\", \"ms\": 1.5}')")], gpu.read_part),
                Stage("bad", [python("import sys; sys.exit(3)")], gpu.read_part)]

    before = Path(gpu.RESULTS).read_text()
    with mock.patch.object(gpu, "all_stages", stages), pytest.raises(SystemExit, match="failed: bad"):
        gpu.main(["--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)])
    assert "good" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert "| good | speed | ms 1.5 |" in text
    assert "| failed: exit code 3" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [stage["status"] for stage in results["stages"]] == ["passed", "failed"]
    assert results["machine"]["torch"] == torch.__version__
    assert Path(gpu.RESULTS).read_text() == before


def test_every_stage_has_a_command(tmp_path):
    names = []
    for stage in gpu.all_stages("cpu", "tiny", tmp_path):
        names.append(stage.name)
        for command in stage.commands:
            assert (stage.folder / command[1]).is_file() or command[1] == "-m"
    training = ["train_device", "train_host", "train_shard", "train_adapters"]
    assert set(names) == {"tests", *training, "step", *PARTS}

"""Runs of many processes that lose nothing: kills, full disks, time-outs, torchrun, checkpoints, memory."""
import gc
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
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import run.checkpoint
import run.draw
import train
from benchmarks.toy import toy_clip
from data import Clip, Frames, Processor, frames_to_ground, prompt_inputs
from model import Thinker
from rewards import reward_terms, total_rewards
from run.checkpoint import StateReader, check_place, find_checkpoint, only_one
from run.draw import Source, hold_out, read_clip, take_items, training_sources
from run.guard import guard
from run.log import Log, Watch, plot, read_rows
from run.processes import start_processes
from run.settings import frame_range
from segment import ground, thinker_system2
from tests.world import ROOT, settings_of
from trust import program
from trust.errors import BadInput
from trust.options import TOY_POLICY

TINY = ("--device cpu --threads 1 --workers 0 --dtype float32 --batch 2 --updates 1 --group 2 "
        "--max_new_tokens 16 --consistency 0").split()
# Seconds that a busy machine may take.
PATIENCE = 240
# The toy world's, built once: that takes as long as a run of a few steps.
SOURCES = training_sources("toy", ".", {}, 0, (24, 24))


# ---- processes that train --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        context.Process(target=int).start()
        return context


def no_look(album, *step):
    """Looks take longer than the steps of these runs."""


def nothing_else(_):
    pass


def ready_sources(*arguments):
    assert arguments == ("toy", ".", {}, 0, (24, 24))
    return SOURCES


@pytest.fixture
def quick(monkeypatch):
    """Leaves out of a run in this process what takes longer than its steps: sources, and looks."""
    monkeypatch.setattr(train, "training_sources", ready_sources)
    monkeypatch.setattr(train.Album, "look", no_look)


def trainer(rank, world, nodes, folder, runs, setup):
    """A training process as torchrun would start it, for one run after another: runs are [(port, arguments)].

    What it prints goes to FOLDER/RANK.txt. setup(rank) may patch the process before.
    """
    os.chdir(folder)
    printed = os.open(f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    # No search for garbage among what the server has imported.
    gc.freeze()
    # Only those that are no daemons may have workers.
    multiprocessing.current_process()._config["daemon"] = False
    train.training_sources = ready_sources
    train.Album.look = no_look
    setup(rank)
    for port, arguments in runs:
        if world > 1:
            set_torchrun_variables(rank, world, world // nodes, port)
        train.main(arguments)


def set_torchrun_variables(rank, world, local, port):
    variables = dict(
        RANK=rank,
        WORLD_SIZE=world,
        LOCAL_RANK=rank % local,
        LOCAL_WORLD_SIZE=local,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    for name, value in variables.items():
        os.environ[name] = str(value)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(server, folder, *runs, world=1, nodes=1, setup=nothing_else):
    """Starts `world` processes that train. runs: strings of settings, beside TINY."""
    ports_and_arguments = [(free_port(), [*TINY, *arguments.split()]) for arguments in runs]
    processes = []
    for rank in range(world):
        arguments = (rank, world, nodes, folder, ports_and_arguments, setup)
        processes.append(server.Process(target=trainer, args=arguments, daemon=True))
    for process in processes:
        process.start()
    return processes


def finish(processes, codes=None):
    """Waits for processes to end with these exit codes; None: all with 0."""
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == (codes or [0] * len(processes))


def kill(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def wait_for(condition, processes=()):
    """Waits until the condition holds, while the processes live."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        assert all(process.exitcode is None for process in processes)
        time.sleep(0.01)


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def torchrun(*options):
    """The command that starts train.py by torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "train.py", *TINY]


# ---- what runs leave behind ------------------------------------------------------------------------
def log_lines(folder, name):
    log = folder / f"out/{name}/metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def checkpoints(folder, name):
    return sorted(path.name for path in (folder / f"out/{name}").glob("step-*"))


def outcome(folder, name):
    """(rows of the log without what differs from run to run, bytes of the trained weights)"""
    rows = []
    with open(folder / f"out/{name}/metrics.jsonl") as file:
        for line in file:
            row = json.loads(line)
            for column in ("seconds", "speed", "memory_gb"):
                del row[column]
            rows.append(row)
    # No gaps, no step twice.
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return rows, (folder / f"out/{name}/policy/model.safetensors").read_bytes()


def distance(weights, others):
    """Euclidean distance of two sets of weights."""
    total = 0.0
    for name in weights:
        total += ((weights[name].double() - others[name].double()) ** 2).sum()
    return math.sqrt(total)


def flat(row):
    """The row with the figures of its second turn, if there is one, beside the others; -1 for None."""
    row = dict(row)
    for name, value in row.pop("grounding", {}).items():
        row[f"grounding {name}"] = -1 if value is None else value
    return row


def same_training(folder, name, other, tolerance=1e-4):
    """Whether two runs are the same up to the order of summation: all numbers of the log, and where the
    weights moved."""
    rows, _ = outcome(folder, name)
    other_rows, _ = outcome(folder, other)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert flat(row) == pytest.approx(flat(other_row), rel=tolerance, abs=2e-5)
    before = load_file(Path(TOY_POLICY) / "model.safetensors")
    after = load_file(folder / f"out/{name}/policy/model.safetensors")
    other_after = load_file(folder / f"out/{other}/policy/model.safetensors")
    moved = distance(after, before)
    apart = distance(after, other_after)
    assert moved > 0
    assert apart < 10 * tolerance * moved


# ---- kills and restarts ----------------------------------------------------------------------------
SIX = "--steps 6 --save_every 3 --name"


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A folder with six steps at one go, by 1 process (out/straight1) and by 2 (out/straight2)."""
    folder = tmp_path_factory.mktemp("straight")
    for world in (1, 2):
        finish(start(server, folder, f"{SIX} straight{world}", world=world))
    return folder


def as_restarted(_):
    """torchrun starts killed processes again with the same command, and says so."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


@pytest.mark.parametrize("world", [1, 2])
def test_three_steps_a_kill_and_three_more_are_six_steps_bit_for_bit(server, straight, world):
    """Only one process is killed, as when memory runs out. Nobody ends its workers, nor the other process."""
    name = f"killed{world}"
    settings = f"{SIX} {name} --workers 2"
    processes = start(server, straight, settings, world=world)
    wait_for(lambda: log_lines(straight, name) > 4, processes)
    processes[-1].kill()
    finish(processes, [1, -signal.SIGKILL][-world:])
    printed = (straight / "0.txt").read_text()
    assert printed.count("error: rank 1 (of 2) has died") == world - 1
    assert "Traceback" not in printed
    assert not (straight / f"out/{name}/policy").exists()
    again = f"{settings} --overwrite true"
    finish(start(server, straight, again, world=world, setup=as_restarted))
    assert f"continues at step 3 from out/{name}" in (straight / "0.txt").read_text()
    assert outcome(straight, name) == outcome(straight, f"straight{world}")
    same_training(straight, "straight1", name)


def test_told_to_end_a_run_saves_and_goes_on_with_another_number_of_processes(server, straight):
    processes = start(server, straight, "--steps 6 --name told", world=2)
    wait_for(lambda: log_lines(straight, "told") > 1)
    # One of them is enough.
    os.kill(processes[1].pid, signal.SIGTERM)
    finish(processes)
    done = log_lines(straight, "told")
    assert 2 <= done < 6
    line = f"{done} steps are done and saved in out/told/step-{done:06d}"
    assert line in (straight / "0.txt").read_text()
    finish(start(server, straight, "--steps 6 --name told"))
    same_training(straight, "straight1", "told")


def test_a_run_with_a_second_turn_goes_on_bit_for_bit(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--steps", "3", "--save_every", "1", "--keep", "3", "--ground_weight", "1"]
    train.main([*options, "--name", "straight"])
    shutil.copytree("out/straight", "out/cut")
    shutil.rmtree("out/cut/policy")
    for step in (2, 3):
        shutil.rmtree(f"out/cut/step-00000{step}")
    train.main([*options, "--name", "cut"])
    rows, weights = outcome(tmp_path, "cut")
    assert (rows, weights) == outcome(tmp_path, "straight")
    assert {"reward", "format", "iou", "null", "tokens", "kl"} <= rows[2]["grounding"].keys()


def die_while_saving(rank):
    """Dies in the middle of the second checkpoint: its state is written, the rest has not got its name
    yet."""
    save = run.checkpoint.dcp.save
    times = itertools.count(1)

    def save_and_die(*arguments, **options):
        save(*arguments, **options)
        if next(times) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    run.checkpoint.dcp.save = save_and_die


def test_a_run_killed_at_any_moment_goes_on_from_a_complete_checkpoint(server, straight):
    settings = "--steps 6 --save_every 1 --name moments"
    finish(start(server, straight, settings, setup=die_while_saving), [-signal.SIGKILL])
    assert (straight / "out/moments/step-000002.partial").exists()
    processes = start(server, straight, settings)
    wait_for(lambda: (straight / "out/moments/step-000003").exists())
    time.sleep(random.random())
    kill(processes)
    finish(start(server, straight, settings))
    # --keep is 2.
    assert checkpoints(straight, "moments") == ["step-000005", "step-000006"]
    assert outcome(straight, "moments") == outcome(straight, "straight1")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_twenty_random_moments(server, straight, world):
    """One process of it is, in a start, a resume, a step or a save."""
    name = f"twenty{world}"
    settings = f"--steps 6 --save_every 1 --name {name} --workers 2"
    rng = random.Random(world)
    kills = 0
    partial = 0
    while kills < 20:
        processes = start(server, straight, settings, world=world)
        victim = rng.choice(processes)
        victim.join(rng.uniform(0.5, 6.0))
        if victim.exitcode == 0:
            # It got to the end: once more from the start.
            finish(processes)
            assert outcome(straight, name) == outcome(straight, f"straight{world}")
            shutil.rmtree(straight / f"out/{name}")
            continue
        kill([victim])
        for process in processes:
            process.join(20)
        # Those that wait for it to join them, which torchrun would end.
        kill(processes)
        kills += 1
        partial += any((straight / f"out/{name}").glob("*.partial"))
    finish(start(server, straight, settings, world=world))
    assert outcome(straight, name) == outcome(straight, f"straight{world}")
    print(f"{partial} of 20 kills fell into the writing of a checkpoint")


def test_a_new_start_does_not_ask_for_the_dead_of_the_one_before(monkeypatch):
    """torchrun's agent keeps the store in which processes leave their addresses."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = dict(RANK=0, WORLD_SIZE=2, GROUP_WORLD_SIZE=1, TORCHELASTIC_USE_AGENT_STORE=True,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=agent.port)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    stores = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setattr(dist, "get_rank", int)
    monkeypatch.setattr(dist, "get_world_size", int)
    # Two processes of the first start, then one of the second.
    for count in (0, 0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        start_processes("cpu")
    first, second, restarted = stores
    first.set("address", "1")
    assert second.get("address") == b"1"
    assert not restarted.check(["address"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_torchrun_restarts_a_killed_worker(straight, world):
    name = f"restarted{world}"
    options = ["--nproc_per_node", str(world), "--master_port", str(free_port()), "--max_restarts", "3"]
    command = [*torchrun(*options), *SIX.split(), name, "--overwrite", "true"]
    with open(straight / "torchrun.txt", "w") as printed:
        launcher = subprocess.Popen(command, cwd=straight, stdout=printed, stderr=printed)
    wait_for(lambda: log_lines(straight, name) > 3)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 0
    assert "continues at step 3" in (straight / "torchrun.txt").read_text()
    assert outcome(straight, name) == outcome(straight, f"straight{world}")


@pytest.mark.slow
def test_torchrun_itself_is_killed_and_the_same_command_goes_on_at_once(straight):
    """Its processes and their workers end with it. The next start does not meet them."""
    name = "orphaned2"
    options = ["--nproc_per_node", "2", "--master_port"]
    settings = [*SIX.split(), name, "--workers", "2"]
    with open(straight / "orphaned.txt", "w") as printed:
        command = [*torchrun(*options, str(free_port())), *settings]
        launcher = subprocess.Popen(command, cwd=straight, stdout=printed, stderr=printed)
        wait_for(lambda: log_lines(straight, name) > 3)
        launcher.kill()
        launcher.wait()
        command = [*torchrun(*options, str(free_port())), *settings]
        assert subprocess.run(command, cwd=straight, stdout=printed, stderr=printed).returncode == 0
    printed = (straight / "orphaned.txt").read_text()
    assert "continues at step 3" in printed
    assert "another process is writing" not in printed
    assert outcome(straight, name) == outcome(straight, "straight2")


def test_a_process_that_waits_for_a_dead_one_ends_soon_also_if_it_is_told_to(server, straight):
    processes = start(server, straight, "--steps 500 --name waiting", world=2)
    wait_for(lambda: log_lines(straight, "waiting") > 0, processes)
    processes[1].kill()
    os.kill(processes[0].pid, signal.SIGTERM)
    killed = time.monotonic()
    finish(processes, [1, -signal.SIGKILL])
    # Not torchrun's 30 s, nor the 30 minutes of --timeout_minutes.
    assert time.monotonic() - killed < 25
    assert "error: rank 1 (of 2) has died" in (straight / "0.txt").read_text()


def test_a_worker_ends_with_its_parent(monkeypatch):
    """By Linux at once, on other systems within seconds."""
    fork = multiprocessing.get_context("fork")

    def work():
        run.draw.begin_worker(0)
        time.sleep(PATIENCE)

    def parent():
        multiprocessing.current_process()._config["daemon"] = False
        fork.Process(target=work).start()
        alive.send("started")
        time.sleep(PATIENCE)

    for prctl in (True, False):
        if not prctl:
            monkeypatch.setattr(program.ctypes, "CDLL", lambda _: object())
        ended, alive = fork.Pipe(duplex=False)
        process = fork.Process(target=parent, daemon=True)
        process.start()
        alive.close()
        assert ended.recv() == "started"
        kill([process])
        # The pipe closes when its last process has ended.
        assert ended.poll(PATIENCE)
        with pytest.raises(EOFError):
            ended.recv()


def test_a_parent_that_is_gone_while_it_takes_a_tensor_is_no_stack_trace_of_its_worker(capfd):
    """No kill hits that moment on purpose. To the worker a connection closed unread looks the same."""
    def work():
        run.draw.begin_worker(0)
        shared = DupFd(sys.stdout.fileno())
        address, _ = shared._id
        with socket.socket(socket.AF_UNIX) as parent:
            parent.connect(address)
            parent.recv(1)
        # The same thread answers, so it has met the closed one by then.
        os.close(shared.detach())
        print("answered")

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(PATIENCE)
    printed = capfd.readouterr()
    assert printed.out == "answered\n"
    assert printed.err == ""


# ---- Ctrl-C ----------------------------------------------------------------------------------------
def test_ctrl_c_saves_the_step_and_the_second_one_ends_at_once(server, straight):
    settings = "--steps 6 --name interrupted --workers 2"
    processes = start(server, straight, settings)
    wait_for(lambda: log_lines(straight, "interrupted") > 1)
    os.kill(processes[0].pid, signal.SIGINT)
    finish(processes)
    done = log_lines(straight, "interrupted")
    assert f"told to end: {done} steps are done and saved" in (straight / "0.txt").read_text()
    processes = start(server, straight, settings)
    wait_for(lambda: log_lines(straight, "interrupted") > done)
    for _ in range(2):
        os.kill(processes[0].pid, signal.SIGINT)
    # Unless it came to its end before.
    processes[0].join(PATIENCE)
    assert processes[0].exitcode in (0, 130)
    finish(start(server, straight, settings))
    assert outcome(straight, "interrupted") == outcome(straight, "straight1")
    assert "Traceback" not in (straight / "0.txt").read_text().split(f"told to end: {done} steps")[-1]


def interrupt_oneself(_):
    def load_systems(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
    train.load_systems = load_systems


def test_ctrl_c_before_the_first_step_is_one_line(server, straight):
    finish(start(server, straight, "--steps 6 --name early", setup=interrupt_oneself), [130])
    assert "interrupted before the first step" in (straight / "0.txt").read_text()


def test_the_second_ctrl_c_ends_at_once_whatever_the_program_waits_for(tmp_path):
    fork = multiprocessing.get_context("fork")

    def wait_inside():
        watch = Watch(phase="rollout")
        with guard(watch, tmp_path, 30, rank=0, world=1):
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: watch.stop_requested)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE)

    process = fork.Process(target=wait_inside)
    process.start()
    finish([process], [130])


# ---- full disks ------------------------------------------------------------------------------------
def small_files(rank):
    """The last process's files may not grow beyond 2 MB, as if its disk were full."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


# Too small for weights and state, too small for the state only.
@pytest.mark.parametrize("limit", [2_000_000, pytest.param(7_000_000, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_old_checkpoint(limit, tmp_path, monkeypatch, capfd, quick):
    monkeypatch.chdir(tmp_path)
    command = [*TINY, "--batch", "1", "--name", "full", "--save_every", "1", "--steps"]
    train.main([*command, "1"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            train.main([*command, "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code == 1
    (line,) = re.findall("error: .*", capfd.readouterr().err)
    assert re.search("cannot save out/full/step-000002, where .* GB are free: ", line)
    folders = {path.name for path in (tmp_path / "out/full").iterdir() if path.is_dir()}
    assert folders - {"phases"} == {"policy", "step-000001"}
    train.main([*command, "2"])
    assert "continues at step 1 from out/full/step-000001" in capfd.readouterr().out
    assert len(outcome(tmp_path, "full")[0]) == 2


def test_one_full_disk_ends_all_processes(server, straight):
    settings = "--steps 2 --save_every 1 --name fuller"
    finish(start(server, straight, settings, world=2, setup=small_files), [1, 1])
    line = "error: cannot save out/fuller/step-000001, where .* GB are free: "
    assert len(re.findall(line, (straight / "0.txt").read_text())) == 1
    assert not re.findall(line, (straight / "1.txt").read_text())
    assert not list((straight / "out/fuller").glob("*-*"))


# ---- other runs of a name --------------------------------------------------------------------------
@pytest.mark.parametrize("more, line", [
    ("--lr 0.5 --kl k1", "--lr 0.0007 -> 0.5, --kl k3 -> k1"),
    ("--resume never", "out/straight1/metrics.jsonl"),
])
def test_another_run_is_not_continued(straight, monkeypatch, capsys, more, line):
    monkeypatch.chdir(straight)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *SIX.split(), "straight1", *more.split()])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_a_finished_run_is_not_repeated(straight, monkeypatch, capsys):
    monkeypatch.chdir(straight)
    train.main([*TINY, *SIX.split(), "straight1", "--keep", "5", "--steps", "4"])
    assert "out/straight1 is finished: 6 steps" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_more_steps_and_a_damaged_checkpoint_is_named(
        straight, tmp_path, monkeypatch, capsys, quick):
    shutil.copytree(straight / "out/straight1", tmp_path / "out/more")
    monkeypatch.chdir(tmp_path)
    command = [*TINY, "--name", "more", "--steps"]
    train.main([*command, "7"])
    assert "continues at step 6 from out/more/step-000006" in capsys.readouterr().out
    assert log_lines(tmp_path, "more") == 7

    # Its state is cut off.
    checkpoint = tmp_path / "out/more/step-000007"
    (state,) = (checkpoint / "state").glob("*.distcp")
    state.write_bytes(state.read_bytes()[:100])
    train.main([*command, "8"])
    printed = capsys.readouterr().out
    assert f"{state.relative_to(tmp_path)} is damaged" in printed
    assert "continues at step 6 from out/more/step-000006" in printed
    assert outcome(tmp_path, "more")[0][-1]["step"] == 7


# ---- damaged checkpoints ---------------------------------------------------------------------------
def flip(file):
    """Changes a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_settings(file):
    record = json.loads(file.read_text())
    del record["settings"]
    file.write_text(json.dumps(record))


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-10])


DAMAGES = [
    ("state/__0_0.distcp", flip, "is not what was saved"),
    ("model.safetensors", flip, "is not what was saved"),
    ("state/.metadata", flip, "is not what was saved"),
    ("model.safetensors", Path.unlink, "no such file"),
    ("metrics.jsonl", cut_off, "is not what was saved"),
    ("run.json", without_settings, "its 'settings' is missing"),
    ("run.json", lambda file: file.write_text("[]"), "a dict expected"),
    ("run.json", Path.unlink, "no such file"),
    ("checksums.json", lambda file: file.write_text("{"), "cannot use"),
    ("checksums.json", lambda file: file.write_text("{}"), "none of its files"),
    ("checksums.json", Path.unlink, "no such file"),
]


@pytest.fixture
def alone():
    """A group of one process."""
    start_processes("cpu")
    yield
    dist.destroy_process_group()


def found(folder, capsys):
    """(name of the checkpoint that a run of 8 steps continues from, what is printed)"""
    settings = settings_of(*TINY, "--steps", 8, "--save_every", 3)
    checkpoint, earlier = find_checkpoint(str(folder), settings)
    return checkpoint.name, earlier["step"], capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(straight, tmp_path, alone, capsys):
    for i, (name, damage, line) in enumerate(DAMAGES):
        out = shutil.copytree(straight / "out/straight1", tmp_path / str(i))
        damage(out / "step-000006" / name)
        taken, step, printed = found(out, capsys)
        assert (taken, step) == ("step-000003", 3)
        assert "step-000006" in printed
        assert line in printed
        assert "falls back to" in printed
        assert (out / "step-000006.damaged").exists()
        # It is said once.
        assert "falls back" not in found(out, capsys)[2]


def test_without_a_whole_checkpoint_a_run_ends_and_keeps_all(straight, tmp_path, alone, capsys):
    out = shutil.copytree(straight / "out/straight1", tmp_path / "out")
    flip(out / "step-000003/state/__0_0.distcp")
    without_settings(out / "step-000006/run.json")
    with pytest.raises(BadInput, match="'settings'.*step-000003/state/__0_0.distcp.*no whole checkpoint"):
        found(out, capsys)
    assert not list(out.glob("*.damaged"))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def test_the_index_of_a_state_runs_no_code(tmp_path, monkeypatch, straight):
    monkeypatch.chdir(tmp_path)
    state = shutil.copytree(straight / "out/straight1/step-000006/state", tmp_path / "state")
    assert StateReader(state).read_metadata().storage_data
    bytes_of_any_kind = dist.checkpoint.metadata.BytesStorageMetadata()
    for content in (Payload(), bytes_of_any_kind):
        (state / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(pickle.UnpicklingError, match="no part of a checkpoint's index"):
            StateReader(state).read_metadata()
    assert not Path("payload").exists()


# ---- the log ---------------------------------------------------------------------------------------
def test_lines_of_the_log_wait_while_a_disk_is_full(tmp_path, capsys):
    log = Log(str(tmp_path / "metrics.jsonl"), "wb")
    log.write(dict(step=0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        log.write(dict(step=1))
        # No checkpoint without it.
        with pytest.raises(OSError):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    warning = "warning: writing .*metrics.jsonl .* failed, and the run goes on"
    assert re.search(warning, capsys.readouterr().err)
    log.write(dict(step=2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_curves_never_end_a_run(tmp_path, monkeypatch, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "reward": 1.0}\n{"step": 1, "rew\n[]\n{}\n{"step": 2, "reward": 2.0}\n')
    assert [row["step"] for row in read_rows(log)] == [0, 2]
    plot(tmp_path)
    assert (tmp_path / "curves.png").exists()
    log.write_text('{"step": 0, "reward": "high"}\n{"step": 1, "reward": {}}\n')
    plot(tmp_path)
    log.unlink()
    plot(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("warning: drawing" in line for line in lines)


# ---- the place of a run ----------------------------------------------------------------------------
def test_two_runs_of_one_name_do_not_meet(tmp_path):
    """But a worker that outlives its parent does not keep the name."""
    fork = multiprocessing.get_context("fork")

    def hold():
        multiprocessing.current_process()._config["daemon"] = False
        lock = only_one(tmp_path)
        worker = fork.Process(target=time.sleep, args=(PATIENCE,))
        worker.start()
        sender.send(worker.pid)
        time.sleep(PATIENCE)
        lock.close()

    receiver, sender = fork.Pipe(duplex=False)
    holder = fork.Process(target=hold, daemon=True)
    holder.start()
    worker = receiver.recv()
    with pytest.raises(BadInput, match="another process is writing to"):
        only_one(tmp_path)
    kill([holder])
    only_one(tmp_path).close()
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("option, words", [
    ("policy", ["out/here/policy"]),
    ("system2", ["reference", "out/here/policy"]),
    ("sam2_weights", ["out/here/step-000001/model.pt"]),
])
def test_a_run_does_not_remove_what_it_is_made_of(tmp_path, option, words):
    out = tmp_path / "out/here"
    words[-1] = str(tmp_path / words[-1])
    settings = replace(settings_of("--name", "here", "--overwrite", "true"), **{option: " ".join(words)})
    with pytest.raises(BadInput, match=f"--{option} .* lies in {out}, where the run would replace it"):
        check_place(str(out), settings)
    check_place(str(tmp_path / "out/there"), settings)


# ---- workers that die ------------------------------------------------------------------------------
DEATH = r"error: a worker that reads clips has died \(.+\); the same command continues from the newest .*"


def test_a_killed_worker_ends_the_run(tmp_path):
    """Its other workers must not keep the process alive: nobody would start it again."""
    more = ["--workers", "2", "--name", "workers", "--steps", "500"]
    command = [sys.executable, ROOT / "train.py", *TINY, *more]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    wait_for(lambda: log_lines(tmp_path, "workers") > 1)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search(DEATH, errors)
    assert "Traceback" not in errors


class Deadly:
    """Items of which number 3 ends its worker by `end`."""

    def __init__(self, end):
        self.end = end

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == 3:
            self.end()
        return torch.tensor(i)


def kill_oneself():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    """Exit code 0, which the loader takes for no failure."""
    os._exit(0)


def stumble():
    raise ConnectionResetError("of an item itself")


def items_of(end):
    loader = DataLoader(Deadly(end), batch_size=None, num_workers=2)
    return take_items(iter(loader))


def test_without_workers_errors_stay_as_they_are():
    def items():
        yield 1
        raise OSError("a disk")

    with pytest.raises(OSError, match="a disk"):
        list(take_items(items()))


@pytest.mark.parametrize("end", [kill_oneself, leave])
def test_the_death_of_a_worker_is_one_line(child_handler, end):
    with pytest.raises(SystemExit, match=DEATH):
        list(items_of(end))


def test_a_worker_may_die_while_others_work(child_handler):
    """The loader's handler raises at any place."""
    items = items_of(nothing_else)
    next(items)
    os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
    with pytest.raises(SystemExit, match=DEATH):
        time.sleep(PATIENCE)


def test_an_error_of_an_item_is_no_death(child_handler):
    with pytest.raises(ConnectionResetError, match="of an item itself"):
        list(items_of(stumble))


@pytest.mark.parametrize("error", [
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError("/tmp/pymp-1/listener-2"),
    EOFError(),
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
])
def test_an_item_is_lost_a_moment_before_its_worker_counts_as_dead(error):
    """The sockets of a dying process close before the process ends."""
    def items():
        yield 1
        raise error

    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.3,))
    worker.start()
    taken = take_items(items())
    assert next(taken) == 1
    with pytest.raises(SystemExit, match=DEATH):
        next(taken)
    worker.join()


# ---- hanging ---------------------------------------------------------------------------------------
def hang(rank):
    """The second process hangs in the second step's data, as if since half a minute, until others wait."""
    watch = Watch()
    train.Watch = lambda: watch
    read = run.draw.TrainingItems.__getitem__
    other = Path("out/hung/phases/0")

    def read_or_hang(items, i):
        # Two a step, every other one is its.
        if i == 3:
            wait_for(lambda: other.exists() and other.read_text() == "rollout of step 1")
            watch.last -= 30
            time.sleep(PATIENCE)
        return read(items, i)
    run.draw.TrainingItems.__getitem__ = read_or_hang


def test_a_time_out_names_process_and_phase(server, straight):
    settings = "--steps 2 --timeout_minutes 0.5 --name hung"
    finish(start(server, straight, settings, world=2, setup=hang), [1, 1])
    line = ("rank 1 (of 2) has been in data of step 1 for 0.5 minutes; "
            "the others: rank 0 rollout of step 1")
    assert line in (straight / "1.txt").read_text()


def test_a_phase_is_read_whole_while_it_is_written(tmp_path):
    # Never over, and written thousands of times a second.
    watch = Watch(step=3, phase="rollout", last=math.inf)
    file = tmp_path / "phases/0"
    with guard(watch, tmp_path, 1e-6, rank=0, world=1):
        wait_for(file.exists)
        for _ in range(5000):
            assert file.read_text() == "rollout of step 3"


# ---- any number of processes -----------------------------------------------------------------------
@pytest.mark.slow
def test_two_nodes_of_two_processes_each(server, straight):
    settings = "--steps 3 --batch 4 --lr 1e-4 --name"
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc_per_node", "2"]
    options += ["--rdzv_backend", "c10d", "--rdzv_id", "nodes", "--rdzv_endpoint", endpoint]
    command = [*torchrun(*options), *settings.split(), "nodes"]
    nodes = [subprocess.Popen(command, cwd=straight, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait(PATIENCE) for node in nodes] == [0, 0]
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


# name: (processes, nodes)
SHAPES = dict(one=(1, 1), two=(2, 1), four=(4, 1), nodes=(4, 2))
FLAT = [
    "--accumulate 2 --updates 2 --ratio sequence --average token --kl k2 --skip_equal true --ground_weight 2",
    "--lora_rank 4 --lr 1e-3 --accumulate 2 --ground_weight 0.5 --parts 2",
]
NODES = ["--average constant --scale_by_std false"]
ALL = [
    "",
    "--accumulate 2",
    "--updates 2",
    "--updates 2 --ratio sequence",
    "--average token",
    "--average constant",
    "--kl k1",
    "--kl k2",
    "--scale_by_std false",
    "--skip_equal true",
    "--skip_equal true --average token --accumulate 2",
    "--accumulate 2 --updates 2 --average token --clip_high 0.28 --skip_equal true",
    "--beta 0 --updates 2",
    "--batch 8",
    "--ground_weight 1 --average constant --accumulate 2",
]


@pytest.mark.parametrize("names, variants", [
    pytest.param("one two four", FLAT, id="flat"),
    pytest.param("one nodes", NODES, id="nodes"),
    pytest.param("one two four nodes", ALL, id="all", marks=pytest.mark.slow),
])
def test_any_number_of_processes_trains_alike(server, tmp_path, names, variants):
    names = names.split()
    settings = "--steps 3 --batch 4 --lr 1e-4 --max_new_tokens 24"
    for name in names:
        world, nodes = SHAPES[name]
        runs = [f"{settings} {variant} --name {name}{i}" for i, variant in enumerate(variants)]
        finish(start(server, tmp_path, *runs, world=world, nodes=nodes, setup=use_mixed_sources))
    steps = []
    for i in range(len(variants)):
        for name in names[1:]:
            same_training(tmp_path, f"one{i}", f"{name}{i}")
        steps += outcome(tmp_path, f"one{i}")[0]
    assert any(row["broken"] for row in steps)
    assert any(0 < row["equal_groups"] < 1 for row in steps)


@pytest.mark.parametrize("world", [1, 2])
def test_where_the_reference_rests_changes_nothing(server, tmp_path, world):
    places = ("device", "shard", "host")
    settings = "--steps 2 --batch 2 --lr 1e-3 --updates 2 --max_new_tokens 24 --ground_weight 1"
    runs = [f"{settings} --reference {place} --name {place}" for place in places]
    finish(start(server, tmp_path, *runs, world=world))
    device, shard, host = (outcome(tmp_path, place) for place in places)
    assert device == shard
    assert device == host
    rows, _ = device
    assert rows[1]["kl"] > 0
    assert rows[1]["grounding"]["kl"] > 0


# ---- validation ------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2])
def test_the_best_checkpoint_by_validation_stays(server, tmp_path, world):
    arguments = "--steps 5 --lr 0.02 --max_new_tokens 48 --save_every 1 --keep 1 --validate 3 --name best"
    finish(start(server, tmp_path, arguments, world=world))
    rows, _ = outcome(tmp_path, "best")
    scores = [row["validation"] for row in rows]
    assert len(set(scores)) > 1
    best = 1 + scores.index(max(scores))
    assert checkpoints(tmp_path, "best") == [f"step-{step:06d}" for step in sorted({5, best})]
    # The older of the two.
    step = min(5, best)
    policy = tmp_path / f"out/best/step-{step:06d}"
    settings = settings_of(*TINY, "--max_new_tokens", 48, "--validate", 3, "--policy", policy)
    assert validation_by_hand(settings) == pytest.approx(scores[step - 1], abs=1e-4)


def validation_by_hand(settings):
    """Mean reward of a saved policy's greedy answers to the clips that are left out of training."""
    sources, _ = training_sources(settings.data, ".", {}, 0, frame_range(settings.frames))
    left, validation_items = hold_out(sources, 3, 0)
    assert len(validation_items) == 3
    videos = [item[0].video for _, item in validation_items]
    left_videos = {item[0].video for item in left[0].items}
    assert not left_videos & set(videos)
    assert len(left_videos) == len(left[0].items) == 100_000 - 3

    policy = Thinker.from_pretrained(settings.policy)
    processor = Processor(TOY_POLICY)
    system2 = thinker_system2(Thinker.from_pretrained(TOY_POLICY), processor)
    rewards = []
    for k, (source, item) in enumerate(validation_items):
        clip = read_clip(source, item, np.random.default_rng([0, k]))
        prompts = policy.embed([prompt_inputs(processor, clip, np.random.default_rng([0, k]))])
        drawn = policy.generate(prompts, 1, settings.max_new_tokens, eos_ids=processor.eos_ids,
                                temperature=0.0)
        ids = drawn[0][0]
        text = processor.decode(ids)
        ((boxes,),) = ground(system2, [clip], [[frames_to_ground(clip, text)]])
        terms = reward_terms(clip, (1, 1), text, boxes, None)
        rewards += list(total_rewards([terms], [len(ids)], settings))
    return np.mean(rewards)


def numbers(task, count, start=0):
    """A source whose items are numbers and whose clips are named after them."""
    picture = Frames([Image.new("RGB", (8, 8))].__getitem__, [0])

    def read(item, rng):
        return Clip(str(item), picture, "", task=task)
    return Source(task, range(start, start + count), read)


def test_clips_are_held_out_of_every_source_and_never_all():
    sources = (numbers("vos", 7), numbers("avs", 3, 100))
    left, validation_items = hold_out(sources, 6, 1)
    names = []
    for source in left:
        names += source.items
    assert len(names) == 4
    names += [item for _, item in validation_items]
    assert sorted(names) == [*range(7), 100, 101, 102]
    for source, item in validation_items:
        assert item in source.items
    assert hold_out(sources, 0, 1) == (sources, [])
    with pytest.raises(BadInput, match="--validate 10"):
        hold_out(sources, 10, 1)

"""What only a GPU can show, in one command: tests, the toy's training, speed.

    python speed/gpu.py                              # one GPU, nine minutes; `make gpu` is the same
    python speed/gpu.py --device cpu --shape tiny    # shows that it runs through
    python speed/gpu.py step decode                  # some of its stages

Each stage is a process of its own, and one that fails does not stop the others. What does not fit the device,
and what is left when time is up, is skipped by name. A stage's output goes to out/gpu/NAME.log, all results
to out/gpu/results.json and out/gpu/results.md, and on a GPU also to the section "GPU" of speed/RESULTS.md.
The exit code is 1 where something failed.

Letters: P prompt tokens, G completions of C tokens.
"""
import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import torch

from run.log import revision
from run.plan import USABLE, count, without_memory
from speed.step import PROOF_ROWS, PROOF_TOKENS, device_limits, table
from trust.options import at_least

RESULTS = HERE / "RESULTS.md"
HEADING = "## GPU"
# P, C, G of the step.
STEP_SIZES = {"tiny": (40, 4, 2), "small": (1024, 128, 8), "3b": (4096, 512, 8), "7b": (4096, 512, 8)}
# The toy's training, small: two steps, of which the first one is saved.
TRAINING = (
    "--batch 2 --group 2 --updates 1 --max_new_tokens 32 --dtype bfloat16 --checkpointing true "
    "--save_every 1 --threads 1"
)
# A stage that cannot end in so many seconds is not begun. A step of the 7B takes some four minutes.
SHORTEST = 10
SHORTEST_STEP = {"3b": 90, "7b": 150}
# On a GPU, tests and a training of the toy that take longer hang.
LONGEST = {"cpu": math.inf, "cuda": 150}


class Failed(Exception):
    """What a stage gave is not what it should be."""


@dataclass
class Stage:
    """Commands, one after the other, and what is read from their output."""
    name: str
    commands: list[list[str]]
    read: Callable           # output -> findings, a list of dicts; raises Failed
    folder: Path = ROOT      # in which they run
    device_bytes: float = 0  # of memory needed at least
    host_bytes: float = 0
    shortest: float = SHORTEST
    longest: float = math.inf    # seconds after which it hangs


@dataclass
class Result:
    """What became of a stage: "passed", "failed" or "skipped", and why."""
    name: str
    status: str
    why: str = ""
    seconds: float = 0.0
    findings: list = field(default_factory=list)


# ---- the stages ------------------------------------------------------------------------------------
def all_stages(device: str, shape: str, out: Path) -> list[Stage]:
    """In their order: what must be right, then the step, then its parts."""
    python = sys.executable
    tests = [*"-m pytest -q -p no:cacheprovider tests/test_device.py --device".split(), device]
    stages = [Stage("tests", [[python, *tests]], read_tests, longest=LONGEST[device])]
    for name, options in {
        "device": "--reference device",
        "host": "--reference host",
        "shard": "--reference shard",
        "adapters": "--lora_rank 8",
    }.items():
        stages.append(training_stage(name, options, device, out))

    thinker = without_memory(str(HERE / f"shapes/{shape}"))
    number_size = 2 if device == "cuda" else 4
    weights = number_size * count(thinker)
    P, C, G = STEP_SIZES[shape]
    step = [python, "speed/step.py", *f"--shape {shape} --device {device} --repeats 1".split()]
    step += [*f"--prompt {P} --completion {C} --group {G}".split(), "--threads", str(threads(device))]
    # The proof: weights, gradients, and the recipe's logits, their softmax and gradients.
    logits = 12 * PROOF_ROWS * (P + PROOF_TOKENS) * thinker.config.text_config.vocab_size
    stages.append(Stage(
        "step", [step], read_step,
        device_bytes=2 * weights + logits,
        host_bytes=3 * weights if device == "cuda" else 0,  # gradients of three ways
        shortest=SHORTEST_STEP.get(shape, SHORTEST),
    ))
    for name in ("decode", "attend", "towers", "tracker", "attention_step", "plans", "rows"):
        command = [python, "speed/parts.py", name, "--shape", shape, "--device", device]
        command += ["--threads", str(threads(device))]
        needed = 1.1 * weights if name in ("decode", "towers", "rows") else 0
        stages.append(Stage(name, [command], read_part, device_bytes=needed))
    return stages


def threads(device: str) -> int:
    """Of the CPU: one where it is measured, all where it only helps a GPU."""
    return os.cpu_count() if device == "cuda" else 1


def training_stage(name: str, options: str, device: str, out: Path) -> Stage:
    """Two steps of the toy's training. The run "device" is continued by a third one."""
    command = [sys.executable, str(ROOT / "train.py"), *f"--name {name} {options} --device {device}".split()]
    command += TRAINING.split()
    commands = [[*command, "--steps", "2", "--overwrite", "true"]]
    continued = name == "device"
    if continued:
        commands.append([*command, "--steps", "3"])

    def read(output):
        return read_training(output, out / "out" / name, continued)
    return Stage(f"train_{name}", commands, read, folder=out, longest=LONGEST[device])


# ---- what they give --------------------------------------------------------------------------------
def read_tests(output: str) -> list[dict]:
    lines = output.strip().splitlines()
    return [dict(what=lines[-1])]


def read_training(output: str, folder: Path, continued: bool) -> list[dict]:
    """Findings of a training run in a folder. Raises Failed where it is not whole."""
    steps = 3 if continued else 2
    if continued and "continues at step 2 from" not in output:
        raise Failed("the second command does not say that it continues at step 2")
    files = ["policy/model.safetensors", "curves.png", f"step-{steps:06}/run.json"]
    for file in files:
        if not (folder / file).is_file():
            raise Failed(f"{folder / file} is missing")
    with open(folder / "metrics.jsonl") as log:
        rows = [json.loads(line) for line in log]
    if [row["step"] for row in rows] != list(range(steps)):
        raise Failed(f"{folder / 'metrics.jsonl'} lacks steps")
    for row in rows:
        for name in ("reward", "loss", "gradient_norm"):
            if not math.isfinite(row[name]):
                raise Failed(f"{name} of step {row['step']} is {row[name]}")
    last = rows[-1]
    return [dict(what="the last step", reward=last["reward"], seconds=last["seconds"]["step"],
                 memory_gb=last["memory_gb"])]


def read_step(output: str) -> list[dict]:
    found = json.loads(output.strip().splitlines()[-1])
    found["what"] = "step"
    return [found]


def read_part(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


# ---- running them ----------------------------------------------------------------------------------
def run_stage(stage: Stage, deadline: float, memory: dict, out: Path) -> Result:
    """Runs its commands until a time of time.monotonic(). Never raises for what happens in them.

    memory: bytes of the device and of the host that may be taken, by name.
    """
    start = time.monotonic()
    why = not_fitting(stage, memory)
    if why:
        return Result(stage.name, "skipped", why)
    if deadline - start < stage.shortest:
        return Result(stage.name, "skipped", "no time is left")
    log = out / f"{stage.name}.log"
    log.unlink(missing_ok=True)
    end = min(deadline, start + stage.longest)
    try:
        for command in stage.commands:
            code = run_command(command, end, log, stage.folder)
            if code:
                raise Failed(f"exit code {code}")
        result = Result(stage.name, "passed", findings=stage.read(log.read_text()))
    except subprocess.TimeoutExpired:
        result = Result(stage.name, "skipped", "cut off, time is up")
        if end < deadline:
            result = Result(stage.name, "failed", f"hangs: not done after {stage.longest:g} s")
    except (Failed, OSError, LookupError, ValueError) as error:
        result = stage_failure(stage, error, log)
    result.seconds = round(time.monotonic() - start, 1)
    return result


def stage_failure(stage: Stage, error: Exception, log: Path) -> Result:
    text = log.read_text() if log.exists() else ""
    # Tests and the toy fit anywhere: if memory is lacking there, something is wrong.
    if stage.device_bytes and "out of memory" in text.lower():
        return Result(stage.name, "skipped", "does not fit the device: out of memory")
    last = (text.strip().splitlines() or [""])[-1]
    return Result(stage.name, "failed", f"{error}; {last[:200]}")


def run_command(command: list[str], deadline: float, log: Path, folder: Path) -> int:
    """Its exit code. It ends with all that it has started when time is up."""
    with open(log, "a") as file:
        child = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait(max(1.0, deadline - time.monotonic()))
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def not_fitting(stage: Stage, memory: dict) -> str:
    """Why a stage does not fit; "" where it does."""
    for name, needed in (("device", stage.device_bytes), ("host", stage.host_bytes)):
        if needed > memory[name]:
            there = memory[name] / 1e9
            return f"does not fit: needs {needed / 1e9:.0f} GB of the {name}, where {there:.0f} are free"
    return ""


def free_memory(device: str) -> dict[str, float]:
    """Bytes that a stage may take of the device and of the host."""
    host = host_memory()
    if device == "cpu":
        return dict(device=host, host=host)
    free, _ = torch.cuda.mem_get_info()
    return dict(device=USABLE * free, host=host)


def host_memory() -> float:
    """Bytes of this machine's memory that are free. Endless where the system does not say it."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    return math.inf


# ---- the report ------------------------------------------------------------------------------------
def machine(device: str) -> dict:
    """The device, its limits, and versions."""
    found = dict(device=processor(), torch=torch.__version__)
    if device == "cuda":
        found |= dict(
            device=torch.cuda.get_device_name(),
            memory_gb=round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
            driver=driver(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
        limits = device_limits()
        if limits:
            found |= dict(limit_tb_per_s=limits[0] / 1e12, limit_bf16_tflop_per_s=limits[1] / 1e12)
    for package in ("transformers", "sam2"):
        found[package] = version(package)
    return found | dict(revision=revision(), date=time.strftime("%Y-%m-%d"))


def processor() -> str:
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def driver() -> str:
    """The driver's version; "" where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except OSError:
        return ""


def section(command: str, seconds: float, facts: dict, device: str, results: list[Result]) -> str:
    """What RESULTS.md says of a run."""
    lines = [HEADING, "", f"One run of {seconds:.0f} s, written by the command itself:", ""]
    lines += ["```", command, "```", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if value), ""]
    lines += ["| stage | seconds | |", "|---|---|---|"]
    for result in results:
        status = f"{result.status}: {result.why}" if result.why else result.status
        lines.append(f"| {result.name} | {result.seconds:g} | {status} |")
    for result in results:
        if result.name == "step" and result.findings:
            lines += ["", *step_lines(result.findings[0], device)]
    lines += ["", "| part | | |", "|---|---|---|"]
    for result in results:
        for found in result.findings:
            if result.name != "step":
                lines.append(f"| {result.name} | {found['what']} | {figures(found)} |")
    return "\n".join(lines) + "\n"


def step_lines(found: dict, device: str) -> list[str]:
    """The table of speed/step.py, and its proof."""
    head, *rows = table(found["parts"], device).splitlines()
    errors = found["proof"]["errors"]
    first = (f"The step, P {found['prompt']}, C {found['completion']}, G {found['group']}, {found['dtype']}. "
             f"Proof: log-probabilities within {errors['logprobs']:.1e} of their scale, "
             f"gradients within {errors['gradients']:.1e}, masks' IoU {found['proof']['iou']:.4f}. "
             f"{figures(found['physics'])}")
    return [first.strip(), "", head, "|---" * (head.count("|") - 1) + "|", *rows]


def figures(found: dict) -> str:
    """Numbers of a finding by their names."""
    shown = []
    for name, value in found.items():
        if name != "what" and value not in (None, []):
            shown.append(f"{name} {number(value)}")
    return ", ".join(shown)


def number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def put_section(text: str, new: str) -> str:
    """A text with its section HEADING replaced, up to the next heading of that rank. The rest stays."""
    start = text.index(f"{HEADING}\n")
    end = text.find("\n## ", start)
    rest = "" if end < 0 else text[end:]
    return text[:start] + new + rest


# ---- the program -----------------------------------------------------------------------------------
def read_options(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", help="only these, by name; default: all")
    add("--device", choices=["cpu", "cuda"], default="cuda")
    add("--shape", choices=sorted(STEP_SIZES), default="7b")
    add("--minutes", type=at_least(1), default=9,
        help="after these nothing more is begun, and what runs is cut off (default: 9)")
    add("--out", type=Path, default=ROOT / "out/gpu", help="folder of logs and results")
    return parser.parse_args(arguments)


def chosen_stages(options, out: Path) -> list[Stage]:
    stages = all_stages(options.device, options.shape, out)
    names = [stage.name for stage in stages]
    for name in options.stages:
        if name not in names:
            sys.exit(f"there is no stage {name}; stages are {', '.join(names)}")
    return [stage for stage in stages if not options.stages or stage.name in options.stages]


def write_results(options, command: str, seconds: float, facts: dict, results: list[Result], out: Path):
    """Writes all that is known so far."""
    stages = [asdict(result) for result in results]
    found = dict(command=command, seconds=seconds, machine=facts, stages=stages)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    new = section(command, seconds, facts, options.device, results)
    (out / "results.md").write_text(new)
    if options.device == "cuda":
        RESULTS.write_text(put_section(RESULTS.read_text(), new))


def main(arguments=None):
    start = time.monotonic()
    options = read_options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --device cpu --shape tiny shows that the command runs through")
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot write {out} ({error.strerror})")
    command = f"python speed/gpu.py {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    facts = machine(options.device)
    results = []
    for stage in chosen_stages(options, out):
        try:
            result = run_stage(stage, start + 60 * options.minutes, free_memory(options.device), out)
        except KeyboardInterrupt:
            sys.exit(f"stopped in {stage.name}; what was done before is in {out / 'results.md'}")
        results.append(result)
        print(f"{result.name:15} {result.seconds:6.1f} s  {result.status}  {result.why}", flush=True)
        # After each stage: whoever ends this program loses nothing that was measured.
        write_results(options, command, time.monotonic() - start, facts, results, out)
    failed = [result.name for result in results if result.status == "failed"]
    print(f"{time.monotonic() - start:.0f} s in all; {out / 'results.md'}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

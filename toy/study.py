"""The studies of the toy: trainings, their evaluations, and tables of both.

    python toy/study.py all --jobs 2      runs what is missing of all studies, then prints their tables
    python toy/study.py rewards           one of them
    python toy/study.py all --plan        every run, and how long those that are missing may take
    python toy/study.py table             all tables, from what is on disk
    python toy/study.py figure            toy/study.png (with --out: OUT/study.png), from what is on disk
    python toy/study.py all --quick       each with a few steps and clips: shows that it works, and no more

A study compares recipes. A recipe makes one policy for each seed, and every policy is evaluated in the ways
that the study's columns need. Studies share runs. A finished run is not made again; one cut off goes on.
Only one process at a time runs studies in a folder.

    OUT/out/RECIPE-seedN/              a training, as train.py writes it
    OUT/eval/RECIPE-seedN/EVALUATION/  results.json and the predictions
    OUT/commands/                      what made each result
    OUT/logs/, OUT/times.jsonl         what the programs printed, and how long they took
    OUT/study.json, OUT/lock           what all runs have in common; who is writing
"""
import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from trust.errors import BadInput, fail
from trust.files import PARTIAL, check_file, read_json, writing
from trust.options import LARGEST_SEED, TOY_POLICY, TOY_SAM2, Parser, at_least, check_out
from trust.program import INTERRUPTED, begin_program, tell


# ---- recipes: how a policy is made -----------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    label: str
    options: str = ""
    program: str = "train.py"    # "": nothing is trained


# Rewards: base and format always count, and so does the penalty for surplus boxes.
RECIPES = {
    "cold": Recipe("cold start", program=""),
    "grpo": Recipe("GRPO"),
    "rk": Recipe("R_K", "--alignment 0 --consistency 0"),
    "rk_ra": Recipe("R_K + R_A", "--consistency 0"),
    "rk_rg": Recipe("R_K + R_G", "--alignment 0"),
    "rg": Recipe("R_G", "--keyframe 0 --alignment 0"),
    "four": Recipe("GRPO, four kinds", "--data toy_four"),
    "sft": Recipe("supervised", "--lr 7e-4", "toy/supervised.py"),
    "sft_slow": Recipe("supervised, lr 2e-4", "--lr 2e-4", "toy/supervised.py"),
    "sft_four": Recipe("supervised, four kinds", "--lr 7e-4 --data toy_four", "toy/supervised.py"),
    "sft_bare": Recipe("supervised, no reasoning", "--lr 7e-4 --reasoning false", "toy/supervised.py"),
    "sft_bare_four": Recipe(
        "supervised, no reasoning, four kinds",
        "--lr 7e-4 --reasoning false --data toy_four",
        "toy/supervised.py",
    ),
    "low_sft": Recipe("supervised boxes, low resolution", "--turn grounding", "toy/supervised.py"),
    "low_grpo": Recipe("GRPO of both turns, low resolution", "--ground_weight 1 --image_tokens 9"),
    "dapo": Recipe("DAPO", "--average token --clip_high 0.28 --skip_equal true"),
    "dr_grpo": Recipe("Dr. GRPO", "--average constant --scale_by_std false"),
    "gspo": Recipe("GSPO", "--ratio sequence --clip_low 3e-4 --clip_high 4e-4 --parts 4 --updates 1"),
    "beta0": Recipe("GRPO, beta 0", "--beta 0"),
    "ground_half": Recipe("ground_weight 0.5", "--ground_weight 0.5"),
    "ground_one": Recipe("ground_weight 1", "--ground_weight 1"),
    "saliency": Recipe("saliency 1", "--saliency 1"),
    "single": Recipe("one keyframe", "--single 1 --keyframe 0"),
    "lora": Recipe("adapters of rank 16", "--lora_rank 16 --lr 1.5e-3"),
}

# ---- evaluations: (program, options) ---------------------------------------------------------------
EVALUATIONS = {
    # A policy that was trained at another resolution keeps it in its directory.
    "test": ("eval.py", "--split test --image_tokens 64"),
    "pairs": ("eval.py", "--split pairs"),
    "long": ("eval.py", "--split long"),
    "crowd": ("eval.py", "--split crowd"),
    "reasoning": ("eval.py", "--split reasoning"),
    "absent": ("eval.py", "--split absent"),
    "heard": ("eval.py", "--split heard"),
    "silent": ("eval.py", "--split silent"),
    "swapped": ("eval.py", "--split swapped"),
    "colours": ("eval.py", f"--split test --system2 {ROOT}/plugs/colours.py"),
    "low": ("eval.py", "--split test --image_tokens 9"),
    "frames": ("toy/grounding.py", "frames"),
    "pictures": ("toy/grounding.py", "pictures"),
}
# Five things narrated and four keyframes have fewer tokens.
ANSWER_TOKENS = 160
# A split has no more.
MOST_CLIPS = 1000


# ---- studies ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    header: str
    evaluation: str
    value: str = "J&F"    # as tables.value_of
    kind: str = ""        # of the rows that count, as tables.counts; "": all


@dataclass(frozen=True)
class Study:
    title: str
    recipes: tuple        # the first one is what the others are compared with
    columns: tuple        # the first one is shown in the figure


STUDIES = {
    "kinds": Study("GRPO against the cold start", ("cold", "grpo"), (
        Column("reasoning, named", "reasoning", "named", "reasoning"),
        Column("target follows the reasoning", "reasoning", "follows", "reasoning"),
        Column("all", "test"),
        Column("referring", "test", kind="referring"),
        Column("reasoning", "reasoning", kind="reasoning"),
        Column("sound", "heard"),
        Column("null", "absent", "named"),
        Column("unseen pairs", "pairs"),
        Column("long", "long"),
        Column("crowd", "crowd"),
        Column("crowd, reasoning named", "crowd", "named", "reasoning"),
    )),
    "rewards": Study("Rewards (table 4 of the paper)", ("grpo", "cold", "rk", "rk_ra", "rk_rg", "rg"), (
        Column("J&F", "test"),
        Column("with plugs/colours.py", "colours"),
        Column("target on keyframes", "test", "visible"),
    )),
    "supervised": Study(
        "Supervised fine-tuning beside GRPO",
        ("grpo", "cold", "sft", "sft_slow", "sft_bare", "four", "sft_four", "sft_bare_four"), (
            Column("held-out kinds, named", "reasoning", "named", "held out"),
            Column("other kinds, named", "reasoning", "named", "kept"),
            Column("held-out kinds", "reasoning", kind="held out"),
            Column("all", "test"),
            Column("unseen pairs", "pairs"),
            Column("long", "long"),
        )),
    "one_system": Study("One system against two", ("grpo", "cold", "low_sft", "low_grpo"), (
        Column("evenly spaced frames", "frames"),
        Column("the same, referring", "frames", kind="referring"),
        Column("two systems, low resolution", "low"),
        Column("two systems", "test"),
    )),
    "objectives": Study("Objectives", ("grpo", "cold", "dapo", "dr_grpo", "gspo", "beta0"), (
        Column("J&F", "test"),
        Column("target on keyframes", "test", "visible"),
        Column("reasoning, named", "reasoning", "named", "reasoning"),
    )),
    "sound": Study("Sound and null", ("cold", "grpo"), (
        Column("heard", "heard"),
        Column("silent", "silent"),
        Column("swapped", "swapped"),
        Column("heard, named", "heard", "named"),
        Column("silent, named", "silent", "named"),
        Column("swapped, named", "swapped", "named"),
        Column("silent, null", "silent", "null"),
        Column("swapped, null", "swapped", "null"),
        Column("null queries, null", "absent", "null"),
    )),
    "ground": Study(
        "Training the grounding turn", ("grpo", "ground_half", "ground_one", "saliency", "single"), (
            Column("J&F", "test"),
            Column("box where the target is not", "pictures", "boxed", "hidden"),
            Column("IoU on the clearest frame", "pictures", "IoU", "shown"),
            Column("target on keyframes", "test", "visible"),
            Column("null queries, null", "absent", "null"),
        )),
    "adapters": Study("Adapters against all weights", ("grpo", "cold", "lora"), (
        Column("J&F", "test"),
        Column("reasoning, named", "reasoning", "named", "reasoning"),
    )),
}

# --quick
QUICK = dict(seeds="0", clips=4, steps=2, jobs=2, out="out/study-quick")
USUAL = dict(seeds="0,1,2", clips=200, steps=None, jobs=1, out="out/study")
QUICK_TRAINING = {
    "train.py": "--batch 4 --group 2 --warmup 1",
    "toy/supervised.py": "--batch 2",
}


# ---- options ---------------------------------------------------------------------------------------
def read_options(arguments=None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("name", choices=[*STUDIES, "all", "table", "figure"], help="a study, or what to do with all of them")
    add("--quick", action="store_true", help="one seed, 2 steps, 4 clips, into out/study-quick")
    add("--seeds", help="of the trainings, by commas (default: 0,1,2)")
    add("--clips", type=at_least(1), help="of every evaluation (default: 200)")
    add("--steps", type=at_least(1), help="of every training (default: as the policy's training.json says)")
    add("--out", metavar="DIR", help="folder of all that is written (default: out/study)")
    add("--jobs", type=at_least(1), help="runs at a time, each on one core (default: 1; with --quick 2)")
    add("--plan", action="store_true", help="lists the runs and ends")
    options = parser.parse_args(arguments)
    in_place = options.out is None and not options.quick
    for name, value in (QUICK if options.quick else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        options.seeds = read_seeds(options.seeds)
        if options.clips > MOST_CLIPS:
            raise BadInput(f"--clips {options.clips}: a split has {MOST_CLIPS}")
        check_out(options.out)
        options.out = Path(options.out).absolute()
        options.figure = ROOT / "toy/study.png" if in_place else options.out / "study.png"
        check_place(options)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


def read_seeds(text: str) -> list[int]:
    """The seeds of a text such as "0,1,2". Raises BadInput for others."""
    seeds = []
    for part in text.split(","):
        # int() refuses thousands of digits with an error of its own.
        right = part.isdecimal() and len(part) <= 10 and int(part) <= LARGEST_SEED
        if not right or int(part) in seeds:
            wanted = f"whole numbers from 0 to {LARGEST_SEED} by commas, each once"
            raise BadInput(f"--seeds {text[:80]}: {wanted}")
        seeds.append(int(part))
    return seeds


def facts_of_place(options) -> dict:
    """What all runs of a folder have in common."""
    facts = dict(steps=options.steps, clips=options.clips, quick=options.quick)
    files = dict(
        policy=Path(TOY_POLICY, "model.safetensors"),
        training=Path(TOY_POLICY, "training.json"),
        sam2=Path(TOY_SAM2),
    )
    for name, file in files.items():
        facts[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return facts


def check_place(options) -> None:
    """Raises BadInput where OUT holds runs of other steps or clips, or from another cold start."""
    path = options.out / "study.json"
    if not path.exists():
        return
    was = read_json(path)
    for name, value in facts_of_place(options).items():
        if was.get(name) != value:
            other = f"{name} {was.get(name)}, not {value}"
            raise BadInput(f"{options.out} holds runs with {other}: give another --out")


def chosen_studies(options) -> dict:
    """{name: Study} of the name on the command line."""
    return {options.name: STUDIES[options.name]} if options.name in STUDIES else STUDIES


# ---- the plan --------------------------------------------------------------------------------------
@dataclass
class Run:
    """One command. Runs of a chain need each other, in their order."""
    name: str         # RECIPE-seedN, or RECIPE-seedN/EVALUATION
    program: str
    arguments: list
    result: Path      # is there when it is finished
    record: Path      # holds the words of the command that made it

    @property
    def finished(self) -> bool:
        """Raises BadInput where the result was made by another command."""
        if not self.result.exists():
            return False
        if self.record.exists() and read_json(self.record).get("command") != self.words:
            raise BadInput(f"{self.result} was made by another command, {self.record}: give another --out")
        return True

    @property
    def words(self) -> list[str]:
        return [self.program, *self.arguments]

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / self.program), *self.arguments]


def plan(studies: dict, options) -> list[list[Run]]:
    """A chain of runs for each policy: its training, then its evaluations, each once."""
    wanted = {}    # recipe: its evaluations
    for study in studies.values():
        for recipe in study.recipes:
            wanted.setdefault(recipe, {}).update((column.evaluation, None) for column in study.columns)
    chains = []
    for recipe, evaluations in wanted.items():
        for seed in seeds_of(recipe, options.seeds):
            chain = training(recipe, seed, options)
            for evaluation in evaluations:
                chain += evaluating(recipe, seed, evaluation, options)
            chains.append(chain)
    return chains


def seeds_of(recipe: str, seeds: list[int]) -> list[int]:
    """The cold start is one policy."""
    return seeds if RECIPES[recipe].program else seeds[:1]


def policy_name(recipe: str, seed: int) -> str:
    return f"{recipe}-seed{seed}" if RECIPES[recipe].program else recipe


def policy_folder(recipe, seed, options) -> Path:
    if not RECIPES[recipe].program:
        return Path(TOY_POLICY)
    return options.out / "out" / policy_name(recipe, seed) / "policy"


def results_file(recipe: str, seed: int, evaluation: str, options) -> Path:
    return options.out / "eval" / policy_name(recipe, seed) / evaluation / "results.json"


def files_of(study: Study, options) -> dict:
    """{label: {evaluation: [results.json of each seed]}}, whether they are there or not."""
    files = {}
    for recipe in study.recipes:
        own = {}
        for evaluation in {column.evaluation for column in study.columns}:
            seeds = seeds_of(recipe, options.seeds)
            own[evaluation] = [results_file(recipe, seed, evaluation, options) for seed in seeds]
        files[RECIPES[recipe].label] = own
    return files


def training(recipe, seed, options) -> list[Run]:
    """The run that makes a policy; none for the cold start."""
    program = RECIPES[recipe].program
    if not program:
        return []
    name = policy_name(recipe, seed)
    folder = policy_folder(recipe, seed, options)
    arguments = [*RECIPES[recipe].options.split(), "--seed", str(seed)]
    if options.steps:
        arguments += ["--steps", str(options.steps)]
    if options.quick:
        arguments += QUICK_TRAINING[program].split()
    if program == "train.py":
        # It writes to out/NAME below the folder that it runs in, which is OUT.
        arguments += ["--name", name, "--workers", "1"]
    else:
        arguments += ["--out", str(folder)]
    return [Run(name, program, arguments, folder / "config.json", record_file(name, program, options))]


def evaluating(recipe, seed, evaluation, options) -> list[Run]:
    """The runs of one evaluation of a policy."""
    program, words = EVALUATIONS[evaluation]
    name = f"{policy_name(recipe, seed)}/{evaluation}"
    result = results_file(recipe, seed, evaluation, options)
    clips = ["--clips", str(options.clips), "--out", str(result.parent)]
    answers = ["--policy", str(policy_folder(recipe, seed, options))]
    if program == "eval.py":
        answers += ["--max_new_tokens", str(ANSWER_TOKENS)]
    record = record_file(name, program, options)
    runs = [Run(name, program, [*words.split(), *answers, *clips], result, record)]
    if evaluation == "frames":
        # It leaves masks, and eval.py scores them.
        scored = ["--split", "test", "--predictions", str(result.parent)]
        record = record_file(name, "eval.py", options)
        runs.append(Run(name, "eval.py", [*scored, *clips], result, record))
    return runs


def record_file(name, program, options) -> Path:
    return options.out / "commands" / f"{name.replace('/', '-')}-{Path(program).stem}.json"


# ---- running ---------------------------------------------------------------------------------------
@dataclass
class Runner:
    """Runs chains, a few at a time."""
    out: Path
    kept_open: tuple = ()    # numbers of files that stay open in the programs it starts
    processes: set = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run_all(self, chains, jobs) -> bool:
        """Whether all of them could be finished. Ctrl-C and SIGTERM end what runs; train.py saves first."""
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, signal.default_int_handler)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                return all(list(pool.map(self.run_chain, chains)))
            except KeyboardInterrupt:
                self.stop()
                raise
            finally:
                # While the programs end, a second signal ends this one at once.
                for number, handler in before.items():
                    signal.signal(number, handler)

    def stop(self):
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()

    def run_chain(self, chain) -> bool:
        """Whether all runs of a chain are finished. After one that fails, the rest is left out."""
        try:
            for run in [run for run in chain if not run.finished]:
                if not self.run(run):
                    return False
        # Told now: other chains may go on for hours.
        except (OSError, BadInput) as error:
            tell(f"{chain[0].name}: {error}")
            return False
        return True

    def run(self, run) -> bool:
        log = self.out / "logs" / f"{run.name.replace('/', '-')}.log"
        # The clock of the day may be set while a run takes its time.
        start = time.monotonic()
        with open(log, "ab") as file:
            earlier = file.tell()
            with self.lock:
                if self.stopped:
                    return False
                process = subprocess.Popen(run.command, cwd=self.out, env=environment(), stdout=file,
                                           stderr=file, pass_fds=self.kept_open)
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
            if self.stopped:
                return False
            seconds = round(time.monotonic() - start, 1)
            if not code and run.program != "toy/grounding.py" and not run.result.exists():
                tell(f"{run.name}: ended before it was finished; the same command goes on")
                return False
            if code:
                tell(f"{run.name}: failed with code {code}: {last_line(log, earlier)} (all of it: {log})")
                return False
            write_whole(run.record, dict(command=run.words))
            tell(f"{run.name}: {run.program}, {seconds / 60:.1f} minutes")
            times = self.out / "times.jsonl"
            with writing(times), open(times, "a") as file:
                file.write(json.dumps(dict(name=run.name, program=run.program, seconds=seconds)) + "\n")
        return True


def environment() -> dict:
    """As in the Makefile: one thread a run, and freed memory stays with its process."""
    own = dict(OMP_NUM_THREADS="1", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000")
    return os.environ | own


def last_line(path, earlier: int = 0) -> str:
    """The last line of a log, without its first `earlier` bytes: those are of runs before."""
    with open(path, "rb") as file:
        file.seek(earlier)
        text = file.read().decode(errors="replace")
    # Progress bars end their lines with \r.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def write_whole(path, value: dict) -> None:
    """Writes a JSON file all at once: a kill or a full disk leaves what was there before."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with writing(path):
        partial.write_text(json.dumps(value))
        os.replace(partial, path)


def lock_folder(file, out) -> None:
    """Locks OUT by the open file `file`. Raises BadInput where others hold the lock.

    The programs that hold the file open hold the lock too, also where the study itself was killed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another study, or a program that one has started, is writing to {out}: "
                       f"wait for it to end, or give another --out") from None


# ---- how long it takes -----------------------------------------------------------------------------
def measured(out: Path) -> dict:
    """{program: mean seconds} of the runs that were made in this folder."""
    seconds = {}
    path = out / "times.jsonl"
    if path.exists():
        check_file(path)
        for line in path.read_text(errors="replace").splitlines():
            # A full disk may have cut a line. No more than a time is lost.
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if 0 <= row["seconds"] < math.inf:
                    seconds.setdefault(row["program"], []).append(row["seconds"])
    return {program: sum(values) / len(values) for program, values in seconds.items()}


def estimate(chains: list[list[Run]], options) -> str:
    """A line: how many runs there are, how many are missing, and how long these may take."""
    runs = [run for chain in chains for run in chain]
    missing = [run for run in runs if not run.finished]
    seconds = measured(options.out)
    unknown = {run.program for run in missing} - seconds.keys()
    text = f"{len(runs)} runs, {len(missing)} of them missing"
    if unknown:
        return f"{text}; no time measured here yet of {', '.join(sorted(unknown))}"
    hours = sum(seconds[run.program] for run in missing) / 3600 / options.jobs
    return f"{text}: about {hours:.1f} hours, {options.jobs} at a time, by the mean of those that were made"


def print_plan(chains, options) -> None:
    for chain in chains:
        for run in chain:
            state = "finished" if run.finished else "missing "
            print(f"{state} {run.name}: {run.program} {' '.join(run.arguments)}")
    print(estimate(chains, options))


# ---- the program -----------------------------------------------------------------------------------
def run_studies(studies, options) -> bool:
    """Runs what is missing. Returns whether all of it could be finished."""
    for folder in ("logs", "commands"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    lock = options.out / "lock"
    if lock.exists():
        check_file(lock)
    with open(lock, "w") as file:
        lock_folder(file, options.out)
        # Another study may have begun there since the options were read.
        check_place(options)
        write_whole(options.out / "study.json", facts_of_place(options))
        chains = plan(studies, options)
        tell(estimate(chains, options))
        return Runner(options.out, (file.fileno(),)).run_all(chains, options.jobs)


def split_of(evaluation: str) -> str:
    """The split of an evaluation's clips."""
    program, words = EVALUATIONS[evaluation]
    # toy/grounding.py has no other.
    return words.split()[1] if program == "eval.py" else "test"


def show(studies, options) -> None:
    """Prints the tables, or draws the figure, of what is on disk. Raises BadInput for foreign results."""
    # Slow to import.
    from toy.tables import check_results, draw_figure, print_tables
    files = {name: files_of(study, options) for name, study in studies.items()}
    there = 0
    for of_study in files.values():
        for own in of_study.values():
            for evaluation, paths in own.items():
                there += check_results(paths, evaluation, split_of(evaluation), options.clips)
    if options.name != "figure":
        print_tables(studies, files)
        return
    if not there:
        raise BadInput(f"{options.out} holds no results to draw")
    draw_figure(studies, files, options.figure)
    print(f"written: {options.figure}")


def main(arguments=None):
    options = read_options(arguments)
    studies = chosen_studies(options)
    whole = True
    try:
        if options.plan:
            return print_plan(plan(studies, options), options)
        if options.name not in ("table", "figure"):
            whole = run_studies(studies, options)
        show(studies, options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    begin_program()
    main()

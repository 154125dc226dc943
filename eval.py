"""Evaluates a policy on a benchmark, or predictions of any model. The toy world is one of the benchmarks.

    python eval.py --policy DIR --out DIR
    torchrun --nproc_per_node 8 eval.py --bench revos --data_root DIR --policy DIR --sam2_weights FILE
    python eval.py --bench revos --data_root DIR --predictions DIR --out DIR

    predict   samples -> OUT/Annotations in the official layout, OUT/answers-RANK.jsonl with System 1's words
    score     OUT -> a row for each sample, the means of subsets, a table, OUT/results.json, OUT/report.html
    compare   these rows -> the difference to those of another evaluation, --against OTHER/results.json

A benchmark of questions has replies in place of masks: benchmarks/quiz.py asks and scores them.
Predictions are written sample by sample: the same command continues after an interruption, and torchrun
shares the work. Two columns are added to the official ones, in per cent: `visible`, the share of keyframes on
which the target is visible, and `format`, the share of well-formed answers.
"""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

from benchmarks import (
    add_controls,
    add_roots,
    check_root,
    chosen_root,
    find_benchmark,
    find_entry,
    open_split,
    split_names,
    tested_names,
)
from trust.errors import BadInput, fail
from trust.files import writing
from trust.options import (
    Parser,
    add_model_options,
    at_least,
    check_given,
    check_models,
    check_out,
    reference_folder,
    true_or_false,
)
from trust.plugged import NoBoxes
from trust.program import begin_program


# ---- options ---------------------------------------------------------------------------------------
def read_options(arguments: list[str] | None = None):
    """The options of the command line. Exits with code 2 and one line where one cannot be right."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--bench", default="toy", choices=tested_names(), help="what is evaluated")
    add("--split", help="of the benchmark, several by commas; default: those that are usually evaluated")
    add_roots(parser)
    add("--ask", help="how its questions are asked: refavs by frames (default) or by its first frame")
    add("--predictions", metavar="PATH", help="scores what is there, of any model, instead of a policy")
    add_model_options(parser)
    add_controls(parser)
    add("--limit", "--clips", type=at_least(1), help="how many samples, the first ones; default: as usual")
    add("--zip", action="store_true", help="whether the predictions are packed for the benchmark's server")
    add("--batch", type=at_least(1), default=16, help="clips at a time")
    add("--against", metavar="FILE", help="results.json of another evaluation, for the paired difference")
    add("--out", metavar="DIR", default="out/eval", help="folder of all that is written")
    add("--overwrite", type=true_or_false, nargs="?", const=True, default=False,
        help="whether the predictions that are in --out are replaced")
    options = parser.parse_args(arguments)
    try:
        check_options(options)
    except (OSError, BadInput) as error:
        sys.exit(fail(error))
    return options


def check_options(options):
    """Raises BadInput or FileNotFoundError for an unknown split and for files that are missing."""
    entry = find_entry(options.bench)
    split_names(entry, options.split or entry.tested)
    check_root(entry, chosen_root(entry, options))
    check_out(options.out)
    if options.against:
        check_given("against", options.against)
    if options.predictions:
        check_given("predictions", options.predictions, folder=True)
    else:
        check_models(options)


if __name__ == "__main__":
    begin_program()
    # A wrong option is told now: the imports below take seconds.
    read_options()

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.predictions import (
    begin_prediction,
    check_claim,
    clear,
    fingerprint,
    finish_prediction,
    is_whole,
    open_predictions,
    read_answers,
    read_prediction,
    unpredicted,
    write_frame,
    zip_predictions,
)
from benchmarks.quiz import CONTROLS, answer_questions, check_controls, conclude_questions, unanswered
from benchmarks.reports import (
    ANSWER_COLUMNS,
    compare,
    read_others,
    score_table,
    total,
    visible_share,
    write_json,
)
from benchmarks.samples import Benchmark, Sample, load
from report.causes import cause_of
from report.evaluation import evaluation_page, questions_page, write_evaluation
from rewards import format_reward
from segment import answer_clips, chosen_device, follow_answers, load_models


# ---- predict ---------------------------------------------------------------------------------------
def predict(options, benchmark, samples, claim, rank, processes):
    """Writes to OUT the masks of this process's samples that have none yet, and System 1's answers."""
    samples = samples[rank::processes]
    todo = unpredicted(options.out, samples)
    if not todo:
        return
    models = load_models(options)
    # Written only after the models could be loaded.
    write_json(claim, f"{options.out}/run.json")
    done = len(samples) - len(todo)
    bar = tqdm(total=len(samples), initial=done, desc=benchmark.name, unit="expression", disable=rank > 0)
    with open(f"{options.out}/answers-{rank}.jsonl", "a") as answers, bar:
        # A process that was killed may have left half a line.
        if answers.tell():
            answers.write("\n")
        for first in range(0, len(todo), options.batch):
            batch = todo[first:first + options.batch]
            predict_batch(options, benchmark, batch, models, answers)
            bar.update(len(batch))


def predict_batch(options, benchmark, samples, models, answers):
    """Predicts some samples. A sample that cannot be read is named and gets no prediction."""
    try:
        segment_batch(options, benchmark, samples, models, answers)
    # The fault of a System 2 from a file is not the samples'.
    except NoBoxes:
        raise
    except BadInput as error:
        if len(samples) == 1:
            tqdm.write(f"no prediction for {samples[0].name}: {error}", file=sys.stderr)
            return
        # One of them cannot be read: each is predicted by itself.
        for sample in samples:
            predict_batch(options, benchmark, [sample], models, answers)


def segment_batch(options, benchmark, samples, models, answers):
    """Writes the masks of some samples, and a line for each to the file `answers`."""
    clips = []
    for sample in samples:
        asked = replace(sample, read_masks=None, task=benchmark.task or sample.task)
        clips.append(load(asked))
        if len(clips[-1].frames) != len(sample.names):
            raise BadInput(f"{sample.name}: {len(clips[-1].frames)} frames for {len(sample.names)} names")
    policy, system2, processor, tracker = models
    found = answer_clips(policy, system2, processor, clips, options.max_new_tokens, options.frames)
    # Answers come before masks, because a sample with masks is never predicted again.
    with writing(answers.name):
        for sample, answer in zip(samples, found):
            answers.write(json.dumps(dict(name=sample.name, query=sample.query) | vars(answer)) + "\n")
            begin_prediction(options.out, sample)
        answers.flush()
    # Masks are written as they come: all masks of a batch of long videos do not fit into memory.
    for c, t, mask in follow_answers(tracker, clips, found):
        write_frame(options.out, samples[c], t, mask)
        if t == len(clips[c].frames) - 1:
            finish_prediction(options.out, samples[c])


def run_claim(options, benchmark, root) -> dict:
    """What OUT/run.json holds: whose predictions are in OUT."""
    claim = dict(
        bench=benchmark.name,
        task=benchmark.task or None,
        split=options.split or benchmark.tested,
        data=os.path.realpath(root) if benchmark.folder else "",
        policy=os.path.realpath(options.policy),
        policy_weights=fingerprint(options.policy),
        sam2_weights=os.path.realpath(options.sam2_weights))
    for name in ("system2", "mask_prompt", "frames", "video_tokens", "image_tokens", "max_new_tokens"):
        claim[name] = getattr(options, name)
    if benchmark.quiz:
        claim |= {name: getattr(options, name) for name in CONTROLS}
    folder = reference_folder(options.system2)
    if folder:
        claim["system2_weights"] = fingerprint(folder)
    return claim


# ---- score -----------------------------------------------------------------------------------------
def score_predictions(benchmark: Benchmark, samples: list[Sample], predictions, workers: int = 8) -> dict:
    """Scores predictions of any model, `workers` samples at a time -> results as `total` gives them.

    predictions: a directory as `write_prediction` makes it, with or without the level Annotations, or a .json
    of run lengths. Raises BadInput where the masks are not public.
    """
    if not samples:
        raise BadInput(f"nothing to score in {benchmark.name}: no samples")
    if any(sample.read_masks is None for sample in samples):
        raise BadInput(f"nothing to score in {benchmark.name}: its masks are not public")
    source = open_predictions(predictions)
    answers = read_answers(predictions)

    def score(sample):
        return score_sample(benchmark, sample, source, answers.get(sample.name))

    # Threads help, because decoding and the computation of distances release Python's lock.
    with ThreadPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(score, samples), total=len(samples), desc="scores", unit="expression"))
    return total(benchmark, samples, rows, source)


def score_sample(benchmark, sample, source, answer=None) -> dict:
    """The row of a sample: what it is, the benchmark's values, and what is known of its answer.

    Its `problem` is None, "missing" (no prediction), or what cannot be read.
    """
    true = pred = None
    try:
        true = sample.read_masks()
        pred = read_prediction(source, sample, true.shape[2:])
        values = benchmark.score(sample, true, pred)
        problem = "missing" if pred is None else None
    except (OSError, ValueError) as error:
        values = benchmark.score(sample, true, None)
        problem = str(error)
    row = dict(name=sample.name, kind=sample.kind, query=sample.query, objects=sample.objects,
               problem=problem) | values
    if "J" in row and "F" in row:
        row["J&F"] = (row["J"] + row["F"]) / 2
    row["cause"] = cause_of(row[benchmark.paired], sample, true, pred, answer)
    if answer is not None:
        keyframes = [int(t) for t in answer["keyframes"]]
        row["visible"] = None if true is None else visible_share(sample, true, keyframes)
        row["format"] = format_reward(answer["text"])
        row["keyframes"] = keyframes
        row["text"] = answer["text"]
    return row


# ---- the program -----------------------------------------------------------------------------------
def evaluate(options):
    """Predicts what is not predicted yet, each process its share. The first process then scores."""
    benchmark = find_benchmark(options.bench, options.ask)
    check_controls(options, benchmark)
    root = chosen_root(benchmark, options)
    splits = split_names(benchmark, options.split or benchmark.tested)
    listed = []
    for split in splits:
        listed += open_split(benchmark, split, root)
    samples = listed[:options.limit or benchmark.usual]
    others = None
    if options.against:
        others = read_others(options, samples, benchmark.paired)
    os.makedirs(options.out, exist_ok=True)

    rank = int(os.environ.get("RANK", 0))
    if options.predictions is None:
        predict_share(options, benchmark, samples, root, rank)
    if rank == 0:
        report = dict(bench=benchmark.name, split=splits)
        report["policy"] = None if options.predictions else options.policy
        report["predictions"] = options.predictions or options.out
        if benchmark.quiz:
            columns = conclude_questions(options, benchmark, samples, len(listed), report, others)
            write_evaluation(options.out, questions_page, report, columns)
        else:
            conclude(options, benchmark, samples, len(listed), report, others)


def predict_share(options, benchmark, samples, root, rank):
    """Predicts this process's share of the samples and waits for the other processes.

    Raises BadInput where OUT holds predictions of another model, unless --overwrite.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        # Processes only wait for each other by it.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    options.device = chosen_device(options.device)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    claim = run_claim(options, benchmark, root)
    if options.overwrite:
        if rank == 0:
            clear(options.out)
        if processes > 1:
            dist.barrier()
    check_claim(options.out, claim)
    left = unanswered if benchmark.quiz else unpredicted
    done = len(samples) - len(left(options.out, samples))
    if done and rank == 0:
        unit = "questions" if benchmark.quiz else "expressions"
        print(f"{done} of {len(samples)} {unit} were already there")
    answer = answer_questions if benchmark.quiz else predict
    answer(options, benchmark, samples, claim, rank, processes)
    if processes > 1:
        dist.barrier()


def conclude(options, benchmark, samples, count, report, others):
    """Scores samples with public masks, counts those for a server, compares and packs.

    count: how many samples the splits have, without --limit.
    """
    predictions = report["predictions"]
    public = [sample for sample in samples if sample.read_masks]
    hidden = [sample for sample in samples if not sample.read_masks]
    if public or not hidden:
        report |= score_predictions(benchmark, public, predictions)
        print(score_table(benchmark, report))
        if benchmark.export is not None and not options.predictions:
            readable = {row["name"] for row in report["expressions"] if row["problem"] is None}
            benchmark.export(options.out, public, readable)
    if hidden:
        source = open_predictions(predictions)
        missing = sum(not is_whole(source, sample) for sample in hidden)
        print(f"{len(hidden)} expressions are for the server, their true masks are not public")
        print(f"no prediction: {missing} of {len(hidden)}")
        report["hidden"] = dict(expressions=len(hidden), missing=missing)
    written = f"{options.out}/results.json"
    write_json(report, written)
    if others is not None:
        compare(report, others, benchmark.paired, options.against)
        write_json(report, written)
    if public:
        columns = (*benchmark.columns, *ANSWER_COLUMNS)
        write_evaluation(
            options.out, evaluation_page, benchmark, public, report, columns, options.against)
    if options.zip:
        packed = zip_predictions(benchmark, hidden or samples, predictions, options.out)
        if len(samples) < count:
            packed += f" (partial: --limit {len(samples)}, of {count} expressions)"
        print(f"packed: {packed}")
    print(f"written: {written}")


def main(arguments=None):
    try:
        evaluate(read_options(arguments))
    except (OSError, BadInput) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

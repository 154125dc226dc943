"""Asks the questions of a benchmark and scores the replies: what eval.py does where there are no masks.

    answer_questions   samples -> OUT/answers-RANK.jsonl, in batches of prompts of similar length
    score_replies      these, or replies of any model -> a row for each question, and the parts of the table

Two numbers stand side by side. `ours` counts every row: what is unreadable, missing or skipped is wrong.
`official` takes the benchmark's own parser and its own denominator. All columns are in per cent.
"""
import filecmp
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.predictions import read_answers
from benchmarks.questions import YES_NO, Question, batches, group_questions, prepare
from benchmarks.replies import last_answer, official_text, read_letter, read_yes_no
from benchmarks.reports import compare, write_json
from benchmarks.samples import Benchmark, shown
from data import Processor
from model import Thinker
from trust.errors import BadInput
from trust.files import read_json, writing
from trust.options import TOY_POLICY

# Columns of numbers of rows. counted: the denominator of `official`.
COUNTS = ("counted", "unreadable", "missing", "skipped", "rows")


@dataclass(frozen=True)
class Quiz:
    """How a benchmark's questions are scored."""
    # {column: (text, sample) -> whether it is right; None: the row does not count in this column}. text is
    # what replies.official_text gives; None where there is no reply.
    parsers: dict
    # (rows, columns) -> {part of the table: {column: value}}; None: `by_groups`.
    parts: Callable | None = None
    columns: tuple = ()             # of `parts`, if they are not ours and those of the parsers
    # (out, samples, rows) writes more files and returns lines about them.
    export: Callable | None = None
    note: str = ""                  # a line below every table


def columns_of(quiz: Quiz) -> tuple:
    """Of the table, but for counts."""
    return quiz.columns or ("ours", *quiz.parsers)


# ---- options ---------------------------------------------------------------------------------------
CONTROLS = ("think", "sound", "subtitles")


def check_controls(options, benchmark) -> None:
    """Raises BadInput where an option means nothing to the benchmark."""
    if benchmark.quiz is not None:
        if options.zip:
            raise BadInput(f"--zip: {benchmark.name} has no masks to pack")
        return
    usual = dict(think=True, sound=True, subtitles=False)
    for name in CONTROLS:
        if getattr(options, name) != usual[name]:
            raise BadInput(f"--{name} means nothing to --bench {benchmark.name}, which asks no questions")


# ---- ask -------------------------------------------------------------------------------------------
def unanswered(out: str, samples: list[Question]) -> list[Question]:
    """The questions without a reply in OUT."""
    answers = read_answers(out)
    return [sample for sample in samples if answers.get(sample.name, {"problem": "none"}).get("problem")]


def answer_questions(options, benchmark, samples, claim, rank, processes) -> None:
    """Writes to OUT the replies to this process's share of the questions that have none yet.

    Questions about the same media stay together. options.device is cpu or cuda.
    """
    share = []
    for group in group_questions(samples)[rank::processes]:
        share += [samples[i] for i in group]
    todo = unanswered(options.out, share)
    if not todo:
        return
    processor = Processor(options.policy, options.video_tokens, options.image_tokens)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    policy = Thinker.from_pretrained(options.policy, dtype, options.device)
    # Written only after the model could be loaded.
    write_json(claim, f"{options.out}/run.json")
    done = len(share) - len(todo)
    bar = tqdm(total=len(share), initial=done, desc=benchmark.name, unit="question", disable=rank > 0)
    with open(f"{options.out}/answers-{rank}.jsonl", "a") as file, bar:
        # A process that was killed may have left half a line.
        if file.tell():
            file.write("\n")
        replies = Replies(file, bar)
        prepared = replies.readable(prepare(processor, todo, options), todo)
        for batch in batches(prepared, options.batch):
            texts = reply(policy, processor, [inputs for _, inputs in batch], options.max_new_tokens)
            for (number, _), text in zip(batch, texts):
                replies.write(todo[number], text)


@dataclass
class Replies:
    """An open answers-RANK.jsonl and its progress bar."""
    file: IO
    bar: tqdm

    def write(self, sample: Question, text: str, problem: str = "") -> None:
        """A line; problem: why the question could not be asked. It is asked again by the same command."""
        answer = dict(name=sample.name, query=sample.query, text=text, keyframes={})
        if problem:
            answer["problem"] = problem
            tqdm.write(f"not asked: {problem}", file=sys.stderr)
        with writing(self.file.name):
            self.file.write(json.dumps(answer) + "\n")
            self.file.flush()
        self.bar.update()

    def readable(self, items: Iterator, samples: list) -> Iterator[tuple]:
        """(number, Inputs) of the questions that can be asked; a line for each of the others."""
        for item in items:
            for number, inputs in zip(item.numbers, item.inputs):
                if inputs is None:
                    sample = samples[number]
                    self.write(sample, "", f"{sample.name}: {item.problem}")
                else:
                    yield number, inputs


def reply(policy: Thinker, processor: Processor, inputs: list, max_new_tokens: int) -> list[str]:
    """What System 1 says to each prompt, greedily."""
    prompts = policy.embed(inputs)
    completions = policy.generate(prompts, 1, max_new_tokens, eos_ids=processor.eos_ids, temperature=0.0)
    return [processor.decode(ids) for (ids,) in completions]


# ---- score -----------------------------------------------------------------------------------------
def open_replies(path: str) -> dict:
    """{name of a question: its answer} of a folder, or of a .json of any model: {name: reply}."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such folder or .json of replies: {path}")
    if os.path.isdir(path):
        return read_answers(path)
    answers = {}
    for name, text in read_json(path).items():
        if not isinstance(text, str):
            raise BadInput(f"not {{name of a question: reply}}: {name} in {path}")
        answers[name] = dict(text=text)
    return answers


def read_reply(text: str, sample: Question) -> str:
    """Our reading of a reply: a letter, Yes or No, or a sentence; "" where it cannot be read."""
    answer = last_answer(text)
    if sample.choices:
        return read_letter(answer, sample.choices)
    return read_yes_no(answer) if sample.form == YES_NO else answer


def score_reply(quiz: Quiz, sample: Question, answer: dict | None) -> dict:
    """The row of a question.

    problem: None, "unreadable", "missing", or why it was not asked. A value is 0, 100, or None where the row
    does not count.
    """
    problem = f"{sample.name}: {sample.broken}" if sample.broken else ""
    text = None
    if not problem and answer is None:
        there = os.path.exists(sample.pictures[0])
        problem = "missing" if there else f"{sample.name}: no such file or folder: {sample.pictures[0]}"
    elif not problem:
        problem = answer.get("problem", "")
        text = None if problem else answer["text"]
    said = "" if text is None else read_reply(text, sample)
    if text is not None and not said:
        problem = "unreadable"
    row = dict(name=sample.name, kind=sample.kind, query=sample.query, problem=problem or None,
               groups=sample.groups, solution=sample.solution, said=said, text=text)
    row["ours"] = per_cent(said != "" and said == sample.solution if sample.graded else None)
    given = None if text is None else official_text(text)
    for column, parser in quiz.parsers.items():
        row[column] = per_cent(parser(given, sample) if sample.graded else None)
    return row


def per_cent(right) -> float | None:
    return None if right is None else 100.0 * bool(right)


def mean_part(rows: list[dict], columns) -> dict:
    """{column: mean over the rows that count in it, None without any; and how many rows are what}"""
    part = {}
    for column in columns:
        values = [row[column] for row in rows if row[column] is not None]
        part[column] = float(np.mean(values)) if values else None
        if column == "official":
            part["counted"] = len(values)
    part["unreadable"] = sum(row["problem"] == "unreadable" for row in rows)
    part["missing"] = sum(row["problem"] == "missing" for row in rows)
    problems = sum(row["problem"] is not None for row in rows)
    part["skipped"] = problems - part["unreadable"] - part["missing"]
    part["rows"] = len(rows)
    return part


def by_groups(rows: list[dict], columns) -> dict:
    """All rows, and the rows of each value of each group."""
    parts = {"overall": mean_part(rows, columns)}
    groups = {}    # {group: {value: its rows}}
    for row in rows:
        for group, value in row["groups"].items():
            groups.setdefault(group, {}).setdefault(value, []).append(row)
    for group, values in groups.items():
        for value in sorted(values):
            parts[f"{group}: {value}"] = mean_part(values[value], columns)
    return parts


def score_replies(benchmark: Benchmark, samples: list[Question], predictions: str) -> dict:
    """Results: {"summary", "subsets", "expressions": rows, and counts of rows}.

    Raises BadInput where there are replies, and all are to other questions.
    """
    quiz = benchmark.quiz
    answers = open_replies(predictions)
    names = {sample.name for sample in samples}
    if answers and not names & answers.keys():
        raise BadInput(f"no reply to a question of {benchmark.name} in {predictions}; its first is to "
                       f"{shown(next(iter(answers)))}")
    rows = [score_reply(quiz, sample, answers.get(sample.name)) for sample in samples]
    columns = columns_of(quiz)
    parts = (quiz.parts or by_groups)(rows, columns)
    summary = {}
    for name, part in parts.items():
        for column in columns:
            if part.get(column) is not None:
                summary[f"{name} {column}"] = part[column]
    results = dict(summary=summary, subsets=parts, expressions=rows)
    total = mean_part(rows, ())
    for count in ("unreadable", "missing", "skipped"):
        results[count] = total[count]
    others = ("unreadable", "missing", None)
    results["broken"] = [row["problem"] for row in rows if row["problem"] not in others]
    return results


def reply_table(quiz: Quiz, results: dict) -> str:
    """The parts as a table, and a line on what was not asked."""
    parts = results["subsets"]
    columns = []
    for column in (*columns_of(quiz), *COUNTS):
        if any(column in part for part in parts.values()):
            columns.append(column)
    width = max(14, *map(len, parts)) + 1
    lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
    for name, part in parts.items():
        line = f"{name:{width}}"
        for column in columns:
            value = part.get(column)
            if value is None:
                cell = ""
            elif column in COUNTS:
                cell = str(value)
            else:
                cell = f"{value:.2f}"
            line += f"{cell:>11}"
        lines.append(line)
    broken = results["broken"]
    if broken:
        count = len(results["expressions"])
        lines.append(f"not asked: {len(broken)} of {count} questions, first: {broken[0]}")
    if quiz.note:
        lines.append(quiz.note)
    return "\n".join(lines)


# ---- the end of an evaluation ----------------------------------------------------------------------
def toy_note(policy: str | None) -> str:
    """A line for the toy policy, also after training; "" for others."""
    if policy is None:
        return ""
    files = [os.path.join(folder, "tokenizer.json") for folder in (policy, TOY_POLICY)]
    if all(map(os.path.isfile, files)) and filecmp.cmp(*files, shallow=False):
        return "The toy policy was never taught to answer questions: the table shows that the path runs."
    return ""


def conclude_questions(options, benchmark, samples, count, report, others) -> tuple:
    """Scores, prints, writes results.json and the benchmark's own files, compares. Returns the columns.

    count: how many questions the splits have, without --limit.
    """
    report |= score_replies(benchmark, samples, report["predictions"])
    for name in CONTROLS:
        report[name] = None if options.predictions else getattr(options, name)
    print(reply_table(benchmark.quiz, report))
    notes = []
    if len(samples) < count:
        notes.append(f"partial: --limit {len(samples)}, of {count} questions")
    notes.append(toy_note(report["policy"]))
    # The page shows them, too; the table ends with the quiz's own.
    report["notes"] = [note for note in (benchmark.quiz.note, *notes) if note]
    for note in filter(None, notes):
        print(note)
    if benchmark.quiz.export is not None:
        for line in benchmark.quiz.export(options.out, samples, report["expressions"]):
            print(line)
    written = f"{options.out}/results.json"
    write_json(report, written)
    if others is not None:
        compare(report, others, benchmark.paired, options.against)
        write_json(report, written)
    print(f"written: {written}")
    return columns_of(benchmark.quiz)

"""How the code is built: arrows between rooms, where a benchmark's facts may stand, lengths and sizes.

Sources are parsed, not run.
"""
import ast
import io
import tokenize
from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks import BENCHMARKS
from tests.world import ROOT

NAMES = {benchmark.name for benchmark in BENCHMARKS}
CORE = ("model", "grpo", "rewards", "segment", "train", "data", "eval")
FOLDERS = (".", "trust", "plugs", "benchmarks", "report", "run", "toy", "speed", "tests")


def sources() -> list[Path]:
    """All Python files of the repository."""
    files = []
    for folder in FOLDERS:
        files += sorted((ROOT / folder).glob("*.py"))
    return files


def module_of(path) -> str:
    """Its dotted name: "benchmarks" for benchmarks/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


@lru_cache(maxsize=None)
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


SOURCES = sources()
MODULES = {module_of(path): path for path in SOURCES}
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
each_file = pytest.mark.parametrize("path", SOURCES, ids=IDS)


# ---- arrows ----------------------------------------------------------------------------------------
# A room imports from lower floors, and from itself.
FLOORS = {
    "trust": 0,
    "plugs": 1,
    "data": 1,
    "model": 2,
    "rewards": 2,
    "benchmarks": 3,
    "segment": 4,
    "report": 4,
    "grpo": 5,
    "eval": 5,
    "toy": 5,
    "run": 6,
    "train": 7,
    "speed": 8,
    "tests": 9,
    "test_all": 10,
}


def imports_of(path) -> set[str]:
    """The repository's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                # `from room import module` or `from module import name`.
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names & MODULES.keys()


def room(module) -> str:
    return module.split(".")[0]


def test_every_file_has_a_floor():
    assert {room(module) for module in MODULES} <= FLOORS.keys()


@each_file
def test_arrows_go_one_way(path):
    here = room(module_of(path))
    for module in imports_of(path):
        there = room(module)
        lower = FLOORS[there] < FLOORS[here]
        assert lower or there == here, f"{here} imports {module}"


def test_no_module_imports_itself_by_way_of_others():
    arrows = {module: imports_of(path) for module, path in MODULES.items()}
    # Modules that import nothing are taken away until none is left.
    while arrows:
        ends = [module for module, targets in arrows.items() if not targets]
        assert ends, f"a circle among {', '.join(arrows)}"
        for module in ends:
            del arrows[module]
        for targets in arrows.values():
            targets.difference_update(ends)


# ---- benchmarks ------------------------------------------------------------------------------------
def docstrings(tree) -> set[int]:
    """ids of the nodes that are docstrings."""
    nodes = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                nodes.add(id(first.value))
    return nodes


def defaults(tree) -> set[int]:
    """ids of the nodes that are defaults of options: default=... of an argument, the first of a setting."""
    nodes = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        nodes |= {id(word.value) for word in node.keywords if word.arg == "default"}
        if getattr(node.func, "id", "") == "setting":
            nodes |= {id(argument) for argument in node.args[:1]}
    return nodes


def entries(tree) -> set[int]:
    """ids of the nodes inside the list of benchmarks: Entry(...)."""
    nodes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Entry":
            nodes |= {id(inner) for inner in ast.walk(node)}
    return nodes


def has_record(path) -> bool:
    """Whether a file makes a benchmark's record."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Benchmark":
            return True
    return False


def shared_files() -> list[Path]:
    """The core, run/, trust/, and what several benchmarks share."""
    files = [ROOT / f"{name}.py" for name in CORE]
    files += sorted((ROOT / "run").glob("*.py"))
    files += sorted((ROOT / "trust").glob("*.py"))
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if not has_record(path):
            files.append(path)
    return files


SHARED = shared_files()
SHARED_IDS = [str(path.relative_to(ROOT)) for path in SHARED]


def test_benchmarks_share_a_few_files():
    assert {"benchmarks/__init__.py", "benchmarks/samples.py", "benchmarks/check.py"} <= set(SHARED_IDS)
    assert "benchmarks/toy.py" not in SHARED_IDS


@pytest.mark.parametrize("path", SHARED, ids=SHARED_IDS)
def test_no_shared_file_asks_for_the_name_of_a_benchmark(path):
    """The name stands in its own file and in the list. Elsewhere it is a default at most."""
    tree = tree_of(path)
    allowed = docstrings(tree) | defaults(tree) | entries(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in allowed:
            assert node.value not in NAMES, f"line {node.lineno}: {node.value!r}"


def is_extra(node) -> bool:
    """Whether a node is `something.extra`."""
    return isinstance(node, ast.Attribute) and node.attr == "extra"


def extra_keys(tree) -> tuple[set, set]:
    """(keys of Sample.extra that are written, keys that are read)"""
    written = set()
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_extra(node.value):
            keys = written if isinstance(node.ctx, ast.Store) else read
            keys.add(ast.literal_eval(node.slice))
    return written, read


@each_file
def test_what_only_a_benchmark_knows_is_read_in_its_own_file(path):
    if path.name.startswith("test_"):
        pytest.skip("tests look at everything")
    tree = tree_of(path)
    written, read = extra_keys(tree)
    assert read <= written
    # No other way to it than by a key.
    uses = 0
    for node in ast.walk(tree):
        uses += is_extra(node)
        uses -= isinstance(node, ast.Subscript) and is_extra(node.value)
    assert uses == 0
    if path in SHARED:
        assert not written


# ---- measures --------------------------------------------------------------------------------------
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
MOST_COLUMNS = 110
MOST_LINES = 50
MOST_CORE_TOKENS = 28_000


@each_file
def test_lines_are_short(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= MOST_COLUMNS, f"line {number}"


@each_file
def test_functions_are_short(path):
    """Under 50 lines of code; at most 50 with the docstring."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = node.end_lineno - node.lineno + 1
        assert lines <= MOST_LINES, f"{node.name}: {lines} lines"
        assert lines < MOST_LINES or ast.get_docstring(node), f"{node.name}: {lines} lines"


def count_tokens(path) -> int:
    """Tokens of code: without comments, docstrings and line ends."""
    tree = tree_of(path)
    spans = set()
    texts = docstrings(tree)
    for node in ast.walk(tree):
        if id(node) in texts:
            spans |= set(range(node.lineno, node.end_lineno + 1))
    reader = io.StringIO(path.read_text(encoding="utf-8")).readline
    count = 0
    for token in tokenize.generate_tokens(reader):
        if token.type not in NO_CODE and token.start[0] not in spans:
            count += 1
    return count


def test_tokens_are_counted_as_one_reads_them(tmp_path):
    path = tmp_path / "few.py"
    lines = ['"""Two', 'lines."""', "# A comment.", "x = (1,", '     "a b")']
    lines += ["def f():", '    """One."""', "    x", ""]
    path.write_text("\n".join(lines))
    # x = ( 1 , "a b" ) def f ( ) : x
    assert count_tokens(path) == 13


def test_the_core_is_small():
    counts = {name: count_tokens(ROOT / f"{name}.py") for name in CORE}
    assert sum(counts.values()) <= MOST_CORE_TOKENS, counts

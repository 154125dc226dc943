"""Fixtures of several test files."""
import gc
import multiprocessing
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import find_benchmark  # noqa: E402
from model import Thinker  # noqa: E402
from tests.world import tiny_config, toy_systems, toy_tracker, write_miniature  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="of the tests that take one")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; left out by make test")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")


@pytest.fixture(autouse=True)
def leave_out_slow(request):
    """Without -m nobody waits for slow tests."""
    if request.node.get_closest_marker("slow") and not request.config.option.markexpr:
        pytest.skip("slow: make test-all")


@pytest.fixture
def child_handler():
    """Lets the next loader set its own handler of SIGCHLD; ends its workers afterwards."""
    handling = torch.utils.data._utils.signal_handling
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    was_set = handling._SIGCHLD_handler_set
    handling._SIGCHLD_handler_set = False
    yield
    # No handler may learn of deaths that are wanted: it would raise in the next test.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Loaders that are collected forget their workers.
    gc.collect()
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    handling._SIGCHLD_handler_set = was_set
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture(scope="session")
def device(request):
    """The device of --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def minis(tmp_path_factory):
    """name -> root of a miniature of two videos a split; do not write there."""
    out = tmp_path_factory.mktemp("mini")

    def root(name):
        benchmark = find_benchmark(name)
        folder = out / benchmark.folder
        if not folder.exists():
            write_miniature(benchmark, folder)
        return folder
    return root


@pytest.fixture
def copy(minis, tmp_path):
    """name -> root of a copy of one's own."""
    def root(name):
        return shutil.copytree(minis(name), tmp_path / find_benchmark(name).folder)
    return root


@pytest.fixture
def data_root(minis):
    """A data root with miniatures of all that can be trained on without pyarrow."""
    for name in ("revos", "mevis", "refavs", "video_r1"):
        root = minis(name)
    return root.parent


@pytest.fixture(scope="module")
def systems():
    return toy_systems()


@pytest.fixture(scope="module")
def tracker():
    return toy_tracker()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' model with random weights, large enough that attention is not flat, and its directory."""
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(tiny_config()).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            std = 0.5 if "embed" in name else 1.5 * weight[0].numel() ** -0.5
            torch.nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(model.path)
    return model


@pytest.fixture
def thinker(reference):
    return Thinker.from_pretrained(reference.path)

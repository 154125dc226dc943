"""A step, an evaluation and a clip on a pretend device, and their waits. Kernels of a step of decoding."""
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import model
import run.log
import segment
import train
from model import Cache, Decoder, Prompt, Thinker, add_adapters, read_config
from run.processes import start_processes
from segment import Tracker
from tests.pretend import DEVICE, Elsewhere, counted, pretend_device
from tests.world import ROOT, evaluate_here, settings_of, training_step
from trust.options import TOY_POLICY

# ---- what is counted -------------------------------------------------------------------------------
# Today's waits of a call, by their places. Most of them could go: lower the numbers with the code.
A_TOKEN = {}
A_LOOK_AT_ENDS = {"model.py:rows_to_keep": 1}
# The end tokens, the suppressed ones, which places lie beyond a prompt; the completions come back.
A_GENERATION = {"model.py:generate": 2, "model.py:suppressed": 1, "model.py:__init__": 1}
A_PREFILL = {"model.py:prefill": 1}  # which prompts a batch has
A_PROMPT = {"model.py:embed": 6, "model.py:check_count": 2}
# Inside the towers, mostly lengths of windows.
A_VISION_BATCH = {"model.py:see": 19}
A_SOUND_BATCH = {"model.py:hear": 12}
# Tracking waits for nothing, on no frame. In training, J of a clip comes back at the end.
A_TRACKED_FRAME = {}
A_CLIP_OF_TRAINING = {"segment.py:track_similarity": 1}
# Where masks are written, each comes back.
A_MASK = {"segment.py:follow_answers": 1}
# Mean and standard deviation of pictures. SAM2 moves its rotations to the device, once for each of its
# attentions.
A_NEW_TRACKER = {"segment.py:__init__": 2, "segment.py:attend": 4}
# The completions, the suppressed ids.
LOG_PROBABILITIES = {"model.py:logprobs": 1, "model.py:suppressed": 1}
A_BACKWARD_PASS = {"grpo.py:accumulate_gradients": 2}    # mask and advantages
A_NORM = {"train.py:clip_gradients": 1}
# Values go there and come back; in a step, six of them are read from the device one by one.
SUMS = {"run/processes.py:sums_over_processes": 2}
A_STEP = {"run/processes.py:sums_over_processes": 6}
AN_ADAPTER = {"model.py:__init__": 1}
# Weights, as often as there are.
LOADING = {
    "trust/weights.py:read_shards", "model.py:from_pretrained", "segment.py:from_pretrained",
    "trust/weights.py:check_weight"}

# Kernels of a decode step of the 7B, without and with adapters.
KERNELS = 1025
KERNELS_WITH_ADAPTERS = 1809

# (where a function is, its name): waits of each of its calls.
WAITS = {
    (Decoder, "step"): A_TOKEN,
    (model, "rows_to_keep"): A_LOOK_AT_ENDS,
    (Thinker, "generate"): A_GENERATION,
    (model, "Prefill"): A_PREFILL,
    (model, "Prompt"): A_PROMPT,
    (model.Qwen2_5OmniVisionEncoder, "forward"): A_VISION_BATCH,
    (model.Qwen2_5OmniAudioEncoder, "forward"): A_SOUND_BATCH,
    (segment, "union_masks"): A_TRACKED_FRAME,
    (segment, "overlap"): A_CLIP_OF_TRAINING,
    (segment, "follow_answers"): A_MASK,
    (Tracker, "__init__"): A_NEW_TRACKER,
    (Thinker, "logprobs"): LOG_PROBABILITIES,
    (train, "accumulate_gradients"): A_BACKWARD_PASS,
    (train, "clip_gradients"): A_NORM,
    (train, "sums_over_processes"): SUMS,
    (run.log, "sums_over_processes"): SUMS,
    (train, "update"): A_STEP,
    (model.Adapted, "__init__"): AN_ADAPTER,
}


def expected_waits(calls) -> Counter:
    """{place: waits} of so many calls of what WAITS has, {key: count}."""
    expected = Counter()
    for key, count in calls.items():
        for place, each in WAITS[key].items():
            expected[place] += count * each
    return expected


def places() -> set[str]:
    """All places that may wait."""
    allowed = set(LOADING)
    for each in WAITS.values():
        allowed |= each.keys()
    return allowed


def counted_items(function, counts, key):
    """A function that gives a generator, and counts what is taken from it."""
    def call(*arguments):
        for item in function(*arguments):
            counts[key] += 1
            yield item
    return call


@pytest.fixture
def calls(monkeypatch):
    """{key of WAITS: calls of it}."""
    counts = Counter()
    for key in WAITS:
        owner, name = key
        count = counted_items if name == "follow_answers" else counted
        monkeypatch.setattr(owner, name, count(getattr(owner, name), counts, key))
    monkeypatch.setattr(evaluation, "follow_answers", segment.follow_answers)
    return counts


def check_waits(device, calls):
    """Asserts that the host has waited where WAITS says, and as often."""
    expected = expected_waits(calls)
    faults = []
    for place in sorted(device.waits.keys() | expected.keys()):
        count = device.waits[place]
        if place not in LOADING and count != expected[place]:
            lines = [line for where, line in device.lines if where == place]
            faults.append(f"{place} waits {count} times, not {expected[place]}: {', '.join(lines)}")
    assert not faults, "\n".join(faults)


# ---- the pretend device itself ---------------------------------------------------------------------
FREE = {
    "arithmetic": lambda x: (2 * x + x.sum()).softmax(0),
    "a slice filled": lambda x: x[1:2].fill_(5.0),
    "a slice set to a number": lambda x: set_item(x, slice(1, 2), 5.0),
    "a mask set to a number": lambda x: set_item(x, x > 1, 5.0),
    "places of the device": lambda x: x[(2 * x).argsort()],
    "a copy on the device": lambda x: x.new_zeros(3).copy_(x),
    "a copy that nobody waits for": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "one number of the CPU": lambda x: x + torch.tensor(3.0),
    "made there": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2.0, device=x.device),
}
WAITING = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the device": lambda x: torch.ones(3).to(x.device),
    "a tensor made of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "an element set to a number": lambda x: set_item(x, 1, 5.0),
    "places set to a number": lambda x: set_item(x, x.argsort(), 5.0),
    "a list as index": lambda x: x[[0, 2]],
    "a list as index of what is set": lambda x: set_item(x, [0, 2], x[:2].clone()),
    "a mask as index": lambda x: x[x > 1],
    "nonzero": lambda x: x.nonzero(),
    "counts of repeats": lambda x: x.repeat_interleave(x.long()),
    "copied from the CPU": lambda x: x.copy_(torch.ones(3)),
}


def set_item(x, index, value):
    x[index] = value
    return x


def values_of(x):
    """As a tensor of the CPU."""
    return x.inner if isinstance(x, Elsewhere) else torch.as_tensor(x)


@pytest.mark.parametrize("name", FREE)
def test_the_device_computes_without_waits(name):
    with pretend_device() as device:
        x = torch.arange(3.0, device=DEVICE)
        device.allowed = set()
        result = FREE[name](x)
    assert result.device == DEVICE
    assert torch.equal(result.inner, FREE[name](torch.arange(3.0)))


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted_and_raises_where_it_is_not_allowed(name):
    with pretend_device() as device:
        x = torch.arange(3.0, device=DEVICE)
        result = WAITING[name](x.clone())
        assert device.waits.total() == 1
        device.allowed = set()
        with pytest.raises(RuntimeError, match=r"tests/test_pretend.py:\d+: the host waits"):
            WAITING[name](x.clone())
    expected = WAITING[name](torch.arange(3.0))
    assert torch.equal(values_of(result), values_of(expected))


def test_tensors_of_both_devices_do_not_meet():
    with pretend_device():
        x = torch.arange(3.0, device=DEVICE)
        for meet in (torch.add, torch.dot, torch.minimum):
            with pytest.raises(RuntimeError, match="one of the CPU, torch.float32"):
                meet(x, torch.ones(3))
        with pytest.raises(RuntimeError, match="one of the CPU"):
            torch.cat([x, torch.ones(3)])
    with pytest.raises(RuntimeError, match="outside"):
        x + x


def test_gradients_are_those_of_the_cpu():
    def gradient(device):
        generator = torch.Generator(device).manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(0.5)
        layer = layer.to(device)
        x = torch.empty(5, 4, device=device).exponential_(generator=generator)
        layer(x).relu().square().sum().backward()
        return values_of(layer.weight.grad)

    expected = gradient("cpu")
    with pretend_device():
        assert torch.equal(gradient(DEVICE), expected)


# ---- a step, an evaluation, a clip -----------------------------------------------------------------
@pytest.fixture
def one_process():
    start_processes("cpu")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_step_is_that_of_the_cpu_and_waits_only_where_it_may(lora_rank, one_process, calls, monkeypatch):
    # Sharding needs a device with a driver.
    monkeypatch.setattr(train, "shard", lambda *_: None)
    settings = settings_of("--group", 2, "--batch", 1, "--updates", 1, "--max_new_tokens", 32, "--lr", 1e-3,
                           "--warmup", 0, "--lora_rank", lora_rank)
    group, row, policy = training_step(torch.device("cpu"), settings)
    assert any(terms["consistency"] for terms in group.terms), "nothing is tracked"
    calls.clear()
    with pretend_device() as device:
        device.allowed = places()
        other, other_row, other_policy = training_step(DEVICE, settings)
        other_weights = dict(other_policy.named_parameters())
    check_waits(device, calls)
    assert other.texts == group.texts
    assert other.terms == group.terms
    assert torch.equal(other.completions, group.completions)
    assert torch.equal(other.reference_logp.inner, group.reference_logp)
    for name in set(row) - {"seconds", "memory_gb", "speed"}:
        assert other_row[name] == pytest.approx(row[name], abs=2e-6), name
    for name, weight in policy.named_parameters():
        # Attention does not depend on a bias of the keys. Its gradient is rounding, and AdamW makes it large.
        if not name.endswith("k_proj.bias"):
            difference = (other_weights[name].inner - weight).abs().mean()
            assert difference < 1e-3 * settings.lr, name


def files_of(folder) -> dict:
    """{name: bytes} of all files below a folder that say nothing of the run itself."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("results.json", "run.json"):
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def test_an_evaluation_is_that_of_the_cpu_and_waits_only_where_it_may(calls, monkeypatch, tmp_path):
    def evaluate(name):
        return evaluate_here(tmp_path / name, "--clips", 2)

    expected = evaluate("cpu")
    calls.clear()
    monkeypatch.setattr(segment, "chosen_device", lambda name: DEVICE)
    with pretend_device() as device:
        device.allowed = places()
        results = evaluate("pretend")
    check_waits(device, calls)
    assert results["summary"] == expected["summary"]
    assert files_of(tmp_path / "pretend") == files_of(tmp_path / "cpu")


def test_a_clip_is_segmented_as_on_the_cpu_and_waits_only_where_it_may(calls, monkeypatch, tmp_path):
    def program(name):
        segment.main(["--index", "2", "--max_new_tokens", "48", "--out", str(tmp_path / name)])

    monkeypatch.setattr(segment, "chosen_device", lambda name: "cpu")
    program("cpu")
    calls.clear()
    monkeypatch.setattr(segment, "chosen_device", lambda name: DEVICE)
    with pretend_device() as device:
        device.allowed = places()
        program("pretend")
    check_waits(device, calls)
    files = files_of(tmp_path / "pretend")
    assert files == files_of(tmp_path / "cpu")
    assert len(files) == calls[segment, "union_masks"] + 3
    assert calls[segment, "follow_answers"] == calls[segment, "union_masks"]


def test_one_more_wait_a_token_is_found(monkeypatch):
    def advance(cache, length, recorded):
        assert cache.length.item() >= 0
        before(cache, length, recorded)

    before = Cache.advance
    monkeypatch.setattr(Cache, "advance", advance)
    with pretend_device() as device:
        thinker = Thinker.from_pretrained(TOY_POLICY, device=DEVICE)
        ids = torch.arange(5, 9, device=DEVICE)
        prompt = Prompt(ids, ids.expand(3, -1), ids[:0], thinker.no_features())
        device.allowed = places()
        with pytest.raises(RuntimeError, match=r"test_pretend.py:\d+: the host waits .*_local_scalar_dense"):
            thinker.generate([prompt], 2, 4, eos_ids={1})


# ---- the 7B on a device that holds nothing ---------------------------------------------------------
class Kernels(TorchDispatchMode):
    """Counts operations that would launch kernels: all but views and memory that is only taken."""
    NONE = {"aten::_unsafe_view", "aten::empty", "prim::device"}

    def __init__(self):
        super().__init__()
        self.count = Counter()

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if not func.is_view and name not in self.NONE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def bfloat16():
    """Inside, tensors are bfloat16 where nothing else is said."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("lora_rank, most", [(0, KERNELS), (64, KERNELS_WITH_ADAPTERS)])
def test_kernels_of_a_decode_step_of_the_7b(lora_rank, most):
    config = read_config(ROOT / "speed/shapes/7b")
    B, n, P, C = 8, 8, 4095, 512
    with FakeTensorMode():
        with torch.device("cuda"), bfloat16():
            thinker = Thinker(config)
        if lora_rank:
            add_adapters(thinker, lora_rank, seed=0)
        decoder = Decoder.__new__(Decoder)
        decoder.thinker = thinker
        decoder.suppressed = thinker.suppressed
        decoder.cache = Cache([P] * B, n, C, config.text_config, like=thinker.lm_head.weight)
        decoder.cache.advance(5, recorded=True)
        tokens = torch.zeros(B * n, dtype=torch.long, device="cuda")
        with torch.no_grad(), Kernels() as kernels:
            logits = decoder.compute(tokens, tokens.expand(3, -1))
    assert logits.shape == (B * n, config.text_config.vocab_size)
    assert logits.device.type == "cuda"
    count = kernels.count.total()
    assert count <= most, dict(kernels.count)
    assert count == most, f"{count} kernels now, {most} before: lower the number"

"""The memory plan against a step of the real code at the real size, on tensors that hold no numbers.

FakeTensorMode runs every operation on shapes alone. `Memory` adds up the bytes of all tensors that are alive.
A process of eight is pretended, too (torch's backend "fake": its collectives only return). Autograd and FSDP
need a driver for tensors that claim to be on a GPU, so here they claim to be on the CPU, and the operations
that a GPU does otherwise (attention, norm, products of two dtypes, AdamW) are called by their GPU's names.
SAM2 needs no gradient: its tensors are on a GPU.
"""
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import model as model_file
import run.processes
import segment
import train
from data import KEYFRAMES
from model import VISION_PATCHES, Cache, Decoder, Prompt, Thinker, draw_tokens, read_config
from run.log import throughput
from run.plan import (
    ANSWER,
    GPU_LIMITS,
    GROUNDED,
    PICTURE,
    memory_plan,
    pinned_bytes,
    time_plan,
    without_memory,
)
from segment import Tracker
from tests.world import ROOT, settings_of
from trust.sam2_config import build_sam2

CPU = torch.device("cpu")
# torch looks for wrapped tensors by their address.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


# ---- bytes that are alive --------------------------------------------------------------------------
class Memory(TorchDispatchMode):
    """Follows the storages of all tensors. `now`: bytes of those that are alive. `most`: the peak."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.now = 0
        self.most = 0
        self.where = ""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            # A sharded tensor says the size of the whole.
            x = getattr(x, "_local_tensor", x)
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.remember(x.untyped_storage())
        return out

    def remember(self, storage):
        """Counts a storage as it is now. FSDP resizes them."""
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = 0
            weakref.finalize(storage, self.forget, key)
        self.now += storage.nbytes() - self.alive[key]
        self.alive[key] = storage.nbytes()
        self.most = max(self.most, self.now)

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def peak(self) -> float:
        """The peak since the last call."""
        most = self.most
        self.most = self.now
        return most


# ---- what a GPU does otherwise ---------------------------------------------------------------------
def flash(q, k, v, *_, attn_mask=None, is_causal=False, scale=None, **__):
    """F.scaled_dot_product_attention by the flash kernel, which keeps one number a row and head."""
    lower = torch.bfloat16
    causal = is_causal or attn_mask is not None
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q.to(lower), k.to(lower), v.to(lower), is_causal=causal, scale=scale)[0]


def windows(module, q, k, v, *_, **__):
    """Attention of a tower, all windows at once."""
    return flash(q, k, v).transpose(1, 2), None


def products(q, k):
    product = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT).float()
    return product.view(*q.shape[:-1], -1)


def rms_norm(x, shape, weight=None, eps=None):
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


@contextmanager
def pretended(world: int, monkeypatch):
    """One process of `world`, with tensors that hold nothing -> Memory."""
    memory = Memory()
    make_mesh = run.processes.init_device_mesh

    def real_mesh(*arguments, **options):
        with unset_fake_temporarily():
            return make_mesh(*arguments, **options)

    def watched(change):
        def resize(tensor):
            change(tensor)
            memory.remember(tensor.untyped_storage())
        return resize

    monkeypatch.setattr(run.processes, "init_device_mesh", real_mesh)
    for name in ("alloc_storage", "free_storage"):
        monkeypatch.setattr(fsdp_param, name, watched(getattr(fsdp_param, name)))
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    monkeypatch.setattr(Thinker, "generate", generate)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, **_: x)
    monkeypatch.setattr(model_file, "causal_lower_right", lambda *_: "lower right")
    monkeypatch.setattr(model_file, "products", products)
    monkeypatch.setattr(model_file, "read_shards", fake_shards)
    monkeypatch.setattr(train, "Processor", lambda *_: None)
    monkeypatch.setattr(train, "load_system2", lambda *_: None)
    monkeypatch.setattr(train, "rest_on_host", rest_elsewhere)
    monkeypatch.setattr(train, "Tracker", SimpleNamespace(from_pretrained=fake_tracker))
    ALL_ATTENTION_FUNCTIONS.register("flash_pretended", windows)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with FakeTensorMode(), memory:
            yield memory
    finally:
        dist.destroy_process_group()


def fake_shards(path, shapes, dtype, device):
    """The weights of a Thinker, in files of 5 GB."""
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.empty(shape, dtype=dtype, device=device)
        if sum(x.nbytes for x in weights.values()) > 5e9:
            yield weights
            weights = {}
    yield weights


def fake_tracker(*_):
    """SAM2 on a pretended GPU."""
    with pytest.MonkeyPatch.context() as patch:
        # Its numbers are read.
        patch.setattr(torch, "linspace", lambda a, b, n: [SimpleNamespace(item=lambda: 0.0)] * n)
        with torch.device("cuda"):
            return Tracker(build_sam2("sam2.1_hiera_l"))


# ---- the phases ------------------------------------------------------------------------------------
def fake_prompts(thinker, count, tokens):
    """Prompts of so many tokens before the last, nearly all of media."""
    ids = torch.zeros(tokens + 1, dtype=torch.long)
    slots = torch.zeros(tokens - 100, dtype=torch.long)
    prompts = []
    for _ in range(count):
        media = torch.zeros(len(slots), thinker.config.text_config.hidden_size, dtype=thinker.dtype)
        prompts.append(Prompt(ids, torch.zeros(3, tokens + 1, dtype=torch.long), slots, media))
    return prompts


def see(thinker, patches):
    """The vision tower over so many patches, in batches as in Thinker.see."""
    features = []
    thinker.visual.config._attn_implementation = "flash_pretended"
    for start in range(0, patches, VISION_PATCHES):
        count = min(VISION_PATCHES, patches - start)
        lengths = torch.zeros(count // 64, dtype=torch.int32)
        made = thinker.visual(
            torch.zeros(count, 1176, dtype=torch.bfloat16), grid_thw=None,
            position_ids=torch.zeros(count, 2, dtype=torch.long), cu_seqlens=lengths, max_seqlen=64,
            window_index=torch.zeros(count // 4, dtype=torch.long), cu_window_seqlens=lengths,
            max_window_seqlen=64)
        features.append(made.pooler_output)
    return features


@torch.no_grad()
def generate(thinker, prompts, n, room):
    """The tokens of Thinker.generate at which most memory is used: the first ones and the last."""
    decoder = Decoder(thinker, prompts, n, room)
    generators = [torch.Generator() for _ in prompts]
    alive = torch.arange(len(prompts) * n)
    drawn = torch.zeros(len(alive), room, dtype=torch.long)
    for c in (0, 1, room - 1):
        logits = decoder.step(c, torch.zeros(len(prompts), n, dtype=torch.long))
        temperature = 1.0 if n > 1 else 0.0
        drawn[:, c].index_copy_(0, alive, draw_tokens(logits, generators, n, alive, temperature, 0, 1.0))
        del logits
    if n > 1:
        # Half of the rows have ended.
        decoder.cache.keep(torch.zeros(len(prompts), n // 2, dtype=torch.long))


def rest_elsewhere(thinker, device):
    """rest_on_host, with nothing left where the weights were: the memory of the host is not counted."""
    weights = [*thinker.model.parameters(), *thinker.lm_head.parameters()]
    shapes = [p.shape for p in weights]

    def rest():
        for p in weights:
            p.data = torch.empty(0, dtype=p.dtype)

    @contextmanager
    def awake():
        for p, shape in zip(weights, shapes):
            p.data = torch.empty(shape, dtype=p.dtype)
        yield
        rest()

    rest()
    return awake


def measured(settings, world, monkeypatch) -> dict[str, float]:
    """{phase: bytes} at the peak of each phase of a step of the real code, but masks."""
    peaks = {}
    B = settings.batch // world
    G = settings.group
    requests = B * G * KEYFRAMES
    with pretended(world, monkeypatch) as memory:
        # Loading.
        systems = train.load_systems(settings, CPU)
        policy = systems.policy
        reference = systems.reference
        optimizer = train.start_optimizer(policy, settings)
        # As on a GPU.
        for group in optimizer.param_groups:
            group["fused"] = True
        peaks["loading"] = memory.peak()
        # Rollout.
        see(reference, 4 * B * settings.prompt_tokens)
        prompts = fake_prompts(reference, B, settings.prompt_tokens)
        completions = torch.zeros(G, settings.max_new_tokens, dtype=torch.long)
        with systems.policy_whole():
            policy.generate(prompts, G, settings.max_new_tokens)
        peaks["rollout"] = memory.peak()
        # Grounding, and the reference's log-probabilities.
        with systems.reference_awake():
            see(reference, requests * PICTURE)
            asked = fake_prompts(reference, requests, GROUNDED - ANSWER)
            reference.generate(asked, 1, ANSWER)
            del asked
            with torch.no_grad():
                for prompt in prompts:
                    reference.logprobs(prompt, completions)
        peaks["grounding"] = memory.peak()
        # Update. Gradients of the first group rest while the second one's are made.
        groups = [(prompt, completions) for prompt in prompts[:2]]
        if settings.ground_weight:
            peaks |= second_turn(systems, settings, B, groups, memory, peaks)
        for prompt, drawn in groups:
            logp, _ = policy.logprobs(prompt, drawn)
            logp.sum().backward()
        optimizer.step()
        peaks["update"] = memory.peak()
    return peaks


def second_turn(systems, settings, B, groups, memory, peaks) -> dict[str, float]:
    """The larger peaks of both turns' rollout and grounding. Adds a group of the second one to the groups."""
    asked = fake_prompts(systems.reference, B, GROUNDED - ANSWER)
    with systems.policy_whole():
        systems.policy.generate(asked, settings.group, ANSWER)
    rollout = memory.peak()
    answers = torch.zeros(settings.group, ANSWER, dtype=torch.long)
    with systems.reference_awake(), torch.no_grad():
        for prompt in asked:
            systems.reference.logprobs(prompt, answers)
    groups.append((asked[0], answers))
    return dict(rollout=max(peaks["rollout"], rollout), grounding=max(peaks["grounding"], memory.peak()))


def tracking(monkeypatch, clips=1, objects=32, frames=24) -> tuple[float, float]:
    """(bytes of SAM2, bytes at the peak while so many objects of each clip are tracked)."""
    def unite(logits, unions, size):
        for part in logits.split(segment.OBJECTS_AT_ONCE):
            assert (F.interpolate(part[:, None], size[::-1], mode="bilinear") > 0).ndim == 4

    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(segment, "union_masks", unite)
    monkeypatch.setattr(segment, "send", lambda x, device: x.to(device))
    monkeypatch.setattr(segment, "square_picture", lambda _, side: torch.zeros(3, side, side, device="cuda"))
    # Otherwise autocast is off where there is no GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    # One number of a list would be a constant, which is computed with: on a GPU.
    monkeypatch.setattr(torch, "tensor", lambda x, device=None: torch.arange(np.size(x), device=device).view(
        np.shape(x)))
    pictures = [SimpleNamespace(size=(1280, 720))] * frames
    # Each keyframe of a clip has the boxes of all completions.
    boxes = [{n % KEYFRAMES: (10.0, 10.0, 90.0, 90.0)} for n in range(objects)]
    memory = Memory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        tracker = fake_tracker()
        weights = memory.now
        memory.peak()
        for _ in tracker.follow([(pictures, boxes, None)] * clips):
            pass
        return weights, memory.peak()


# ---- the plan against it ---------------------------------------------------------------------------
# How far a phase may be from the truth.
CLOSE = 0.15


def settings_for(policy, *arguments):
    return settings_of("--policy", policy, "--sam2_weights", "sam2.1_hiera_large.pt", "--plan", *arguments)


def faults_of(plan, peaks) -> list[str]:
    """Phases whose planned bytes are far from the truth."""
    faults = []
    for phase, most in peaks.items():
        planned = sum(plan[phase].values())
        if abs(planned - most) > CLOSE * most:
            faults.append(f"{phase}: {planned / 1e9:.2f} GB planned, {most / 1e9:.2f} needed")
    return faults


def shallow(path, shape):
    """The folder of a policy of a shape with four layers in each part."""
    config = json.loads((ROOT / f"speed/shapes/{shape}/config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    config["vision_config"]["depth"] = 4
    config["audio_config"]["encoder_layers"] = 4
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("world, options", [
    (8, ""),
    (8, "--lora_rank 64"),
    (2, "--reference host --group 4 --max_new_tokens 512 --checkpointing false"),
    # The second turn is larger than the first.
    (8, "--ground_weight 1 --group 64 --max_new_tokens 16 --prompt_tokens 256"),
])
def test_a_step_of_four_layers_takes_what_is_planned(tmp_path, monkeypatch, world, options):
    settings = settings_for(shallow(tmp_path, "3b"), *options.split())
    plan = memory_plan(settings, world)
    peaks = measured(settings, world, monkeypatch)
    assert not faults_of(plan, peaks), plan
    # The test sees what a plan leaves out.
    for phase in peaks:
        wrong = dict(plan[phase])
        del wrong[max(wrong, key=wrong.get)]
        assert faults_of({phase: wrong}, {phase: peaks[phase]})


def test_the_plan_knows_weights_and_optimizer(tmp_path):
    settings = settings_for(shallow(tmp_path, "small"))
    thinker = Thinker(read_config(tmp_path))
    expected = sum(p.nbytes for p in thinker.parameters() if p.requires_grad)
    for state in train.start_optimizer(thinker, settings).state.values():
        # But the count of steps.
        expected += sum(x.nbytes for x in state.values() if x.ndim)
    assert memory_plan(settings, 1)["update"]["weights, AdamW"] == expected
    assert memory_plan(settings, 4)["update"]["weights, AdamW"] == expected / 4


def test_rows_that_stay_are_copied_without_their_index():
    """Numbers of 8 bytes for each of 2 would be four times the copy."""
    config = read_config(ROOT / "speed/shapes/small").text_config
    cache = Cache([8], 8, 512, config, like=torch.zeros(1, dtype=torch.bfloat16))
    before = cache.own.nbytes
    with Memory() as memory:
        cache.keep(torch.tensor([[1, 2, 5, 7]]))
    assert cache.own.nbytes == before / 2
    assert memory.most < 1.1 * (before + cache.own.nbytes)


def test_the_plan_knows_what_an_update_keeps(monkeypatch):
    """With real numbers, on the CPU."""
    # A kind of tensor that cannot be watched.
    monkeypatch.setattr(model_file, "causal_lower_right", lambda *_: None)
    P, G, C = 1024, 4, 64
    settings = settings_for(
        ROOT / "speed/shapes/small", "--dtype", "float32", "--batch", 1, "--group", G,
        "--max_new_tokens", C, "--prompt_tokens", P)
    thinker = Thinker(read_config(Path(settings.policy))).requires_grad_(False)
    # A pass that makes no gradient but the first layer's.
    thinker.model.layers[0].input_layernorm.weight.requires_grad_(True)
    thinker.gradient_checkpointing = True
    prompt, = fake_prompts(thinker, 1, P)
    weights = 0
    for part in (thinker.model.layers, thinker.lm_head, thinker.model.norm):
        weights += sum(p.nbytes for p in part.parameters())
    with Memory() as memory:
        thinker.logprobs(prompt, torch.zeros(G, C, dtype=torch.long))[0].sum().backward()
    plan = memory_plan(settings, 1)["update"]
    planned = plan["kept of all layers"] + plan["a layer, or logits"]
    assert planned == pytest.approx(memory.most - weights, rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "", "--lora_rank 64", "--reference host", "--reference shard", "--checkpointing false --group 4"])
@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("shape", ["3b", "7b"])
def test_a_step_takes_what_is_planned(monkeypatch, shape, world, options):
    settings = settings_for(ROOT / f"speed/shapes/{shape}", *options.split())
    plan = memory_plan(settings, world)
    assert not faults_of(plan, measured(settings, world, monkeypatch)), plan


@pytest.mark.slow
@pytest.mark.parametrize("clips, objects", [(1, 32), (2, 32)])
def test_tracking_takes_what_is_planned(monkeypatch, clips, objects):
    settings = settings_for(ROOT / "speed/shapes/3b", "--batch", 8 * clips)
    planned = memory_plan(settings, 8)["masks"]
    weights, most = tracking(monkeypatch, clips, objects)
    # Codes of place come on top of the weights.
    assert planned["SAM2"] == pytest.approx(weights, rel=0.05)
    assert planned["tracking"] == pytest.approx(most - weights, rel=CLOSE)


# ---- what is printed -------------------------------------------------------------------------------
def printed(capsys, *arguments) -> str:
    train.main(["--plan", "--sam2_weights", "sam2.1_hiera_large.pt", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments, fits", [
    ("--policy speed/shapes/7b --nproc 8", "fits 80 GB 141 GB"),
    ("--policy speed/shapes/7b --nproc 1", "fits no device"),
    ("--policy speed/shapes/3b --nproc 1,8", "fits 40 GB 48 GB 80 GB"),
])
def test_the_plan_is_printed_without_weights_or_gpu(monkeypatch, capsys, arguments, fits):
    monkeypatch.chdir(ROOT)
    assert fits in printed(capsys, *arguments.split())


def test_pinned_memory_of_a_node_is_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    # 15.2 GB are rounded up to 2 ** 34 bytes, for each of 8 processes.
    options = "--policy speed/shapes/7b --reference host --nproc 16 --batch 16"
    text = printed(capsys, *options.split())
    assert "8 x 17.2 = 137.4 GB, pinned" in text
    assert pinned_bytes(2 ** 34) == 2 ** 34
    assert pinned_bytes(2 ** 34 + 1) == 2 ** 35


def test_a_batch_that_cannot_be_shared_is_no_plan(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = printed(capsys, "--policy", "speed/shapes/3b", "--nproc", "8,3").splitlines()
    assert lines[0].startswith("  8 x loading")
    assert lines[1] == "  3 x no: --batch 8 cannot be shared by 3 processes"
    assert printed(capsys, "--nproc", "3").count("\n") == 1


def test_float32_has_no_times(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = printed(capsys, "--policy", "speed/shapes/7b", "--nproc", "8", "--dtype", "float32")
    assert "several times attention's scores, 11.3" in text
    assert "an estimate" not in text


@pytest.mark.parametrize("arguments, named", [("--policy nowhere", "nowhere"), ("--nproc 8,x", "8,x")])
def test_a_plan_that_cannot_be_made_names_why(monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        train.main(["--plan", "--sam2_weights", "sam2.1_hiera_large.pt", *arguments.split()])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_times_follow_the_limits_of_a_gpu(monkeypatch, capsys):
    settings = settings_for(ROOT / "speed/shapes/7b")
    thinker = without_memory(settings.policy)
    times = time_plan(settings, 8, "H200", thinker)
    # Twice the bandwidth halves what draws tokens, twice the arithmetic halves what reads them.
    bandwidth, arithmetic = GPU_LIMITS["H200"]
    monkeypatch.setitem(GPU_LIMITS, "wide", (2 * bandwidth, arithmetic))
    monkeypatch.setitem(GPU_LIMITS, "quick", (bandwidth, 2 * arithmetic))
    wide = time_plan(settings, 8, "wide", thinker)
    quick = time_plan(settings, 8, "quick", thinker)
    assert wide["rollout"] < 0.55 * times["rollout"] and quick["rollout"] > 0.95 * times["rollout"]
    for phase in ("update", "reference", "masks"):
        assert wide[phase] == times[phase] == 2 * quick[phase]
    # One device does the work of eight one after the other, but draws all rows at once.
    alone = time_plan(settings, 1, "H200", thinker)
    assert time_plan(settings, 8, "H200", thinker, side=512)["masks"] == times["masks"] / 4
    assert alone["update"] == pytest.approx(8 * times["update"])
    assert times["rollout"] < alone["rollout"] < 4 * times["rollout"]
    # The second turn takes a little more time, and System 2 none.
    grounding = time_plan(replace(settings, ground_weight=0.5), 8, "H200", thinker)
    for phase in ("rollout", "reference", "update"):
        assert times[phase] < grounding[phase] < 1.2 * times[phase]
    assert grounding["grounding"] == times["grounding"]
    # An update in parts reads the batch once more, before them.
    parts = time_plan(replace(settings, parts=4), 8, "H200", thinker)
    once_more = times["reference"]
    assert parts["update"] == pytest.approx(times["update"] + once_more)
    other = replace(settings, accumulate=2, beta=0.0, consistency=0.0)
    twice = time_plan(other, 8, "H200", thinker)
    assert twice["update"] == 2 * times["update"]
    assert twice["reference"] == twice["masks"] == 0

    monkeypatch.chdir(ROOT)
    text = printed(capsys, "--policy", "speed/shapes/7b", "--nproc", "8")
    step = sum(times.values())
    line = next(line for line in text.splitlines() if line.strip().startswith("H200"))
    assert f"in all {step:.1f}; a completion {step / 64:.2f};" in line
    assert f"{775 * step / 3600:.1f} hours" in line
    assert "an estimate" in text


def test_the_log_has_seconds_per_completion(systems):
    """Wall time of the step over the completions of all processes."""
    settings = settings_of("--batch", 8, "--group", 4, "--accumulate", 3)
    seconds = dict(data=1.0, rollout=20.0, masks=3.0, update=24.0)
    # One of eight processes: three groups of its own.
    mask = torch.ones(4, 5)
    group = SimpleNamespace(prompt=SimpleNamespace(ids=torch.zeros(7)), mask=mask, second=None)
    row = throughput([group] * 3, seconds, systems, settings, CPU)
    assert row["seconds_per_completion"] == 48 / (8 * 4 * 3)
    assert row["decode_tokens_per_s"] == 3 * 20 / 20
    assert row["update_tokens_per_s"] == 3 * (6 + 20) * settings.updates / 24
    # Both turns are drawn and go through the update.
    second = SimpleNamespace(prompt=SimpleNamespace(ids=torch.zeros(3)), mask=torch.ones(4, 2), second=None)
    both = SimpleNamespace(prompt=group.prompt, mask=mask, second=second)
    row = throughput([both] * 3, seconds, systems, settings, CPU)
    assert row["decode_tokens_per_s"] == 3 * (20 + 8) / 20
    assert row["update_tokens_per_s"] == 3 * (6 + 20 + 2 + 8) * settings.updates / 24

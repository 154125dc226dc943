"""What a device may change: recordings, kernels, precision.

    python -m pytest tests/test_device.py --device cuda

On a CPU, too, every test runs: there a recording is imitated by a trace.
"""
import copy

import pytest
import torch
import torch.distributed as dist

import model as model_file
from model import Recorded, Thinker
from run.checkpoint import whole_weights
from run.processes import start_processes
from segment import Tracker
from speed.step import in_single_precision
from tests.test_model import Traced, assert_same_gradients, chosen, generate_ids, gradients, ragged
from tests.test_segment import assert_same_masks, predictor_logits, toy_prompts, tracker_logits
from tests.world import EOS, KINDS, MEDIA, inputs_of, prompts_of, settings_of, training_step
from trust.options import TOY_SAM2
from trust.sam2_config import find_config

RECORDERS = dict(cpu=Traced, cuda=Recorded)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact_convolutions():
    """On a GPU they would round to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ---- the Thinker -----------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0, 1.3])
@torch.no_grad()
def test_recorded_and_not_the_tokens_are_the_same(reference, device, monkeypatch, temperature):
    options = dict(ends=[EOS, 11, 12, 13], temperature=temperature, seeds=[5, 6, 7])

    def tokens(place, recorder):
        thinker = Thinker.from_pretrained(reference.path, device=place)
        prompts = prompts_of(thinker, reference, ["text", "video with sound", "image"])
        monkeypatch.setitem(model_file.RECORDERS, place.type, recorder)
        return generate_ids(thinker, prompts, 6, 40, **options)

    monkeypatch.setattr(model_file, "SHORTEST_SPAN", 16)
    wanted = tokens(device, None)
    assert tokens(device, RECORDERS[device.type]) == wanted
    # Devices draw differently, but they agree on the likeliest token.
    if temperature == 0:
        assert tokens(CPU, None) == wanted


def their_logprobs(theirs, inputs, completion):
    """transformers' own forward over prompt and completion: log-probabilities (C,)."""
    ids = torch.cat([inputs["input_ids"][0], completion])[None]
    whole = inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = theirs(**whole, use_cache=False).logits[0, -len(completion) - 1:-1]
    logits = logits.index_fill(-1, torch.tensor(MEDIA, device=ids.device), -torch.inf)
    return chosen(logits.log_softmax(-1), completion)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_gradients_equal_transformers_own_forward(reference, device, kind):
    thinker = Thinker.from_pretrained(reference.path, device=device)
    theirs = copy.deepcopy(reference).to(device)
    ours, inputs = inputs_of(kind, reference)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.to(device)
    completions, mask = ragged([9, 4])
    logp, _ = thinker.logprobs(*thinker.embed([ours]), completions)
    logp = logp[mask.to(device)]
    expected = []
    for row, keep in zip(completions, mask):
        expected.append(their_logprobs(theirs, inputs, row[keep].to(device)))
    expected = torch.cat(expected)
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)

    found = gradients(thinker, logp.sum())
    wanted = {}
    for name, gradient in gradients(theirs, expected.sum()).items():
        # Newer transformers keep the language model one level deeper.
        name = name.replace("model.language_model.", "model.")
        if name in found:
            wanted[name] = gradient
    assert_same_gradients(found, wanted)


@torch.no_grad()
def test_bfloat16_is_near_float32(reference, device):
    """Where the device is a GPU: other kernels for attention, in the towers and in training."""
    completions, _ = ragged([9, 9])
    media = {}
    logp = {}
    for dtype in (torch.float32, torch.bfloat16):
        thinker = Thinker.from_pretrained(reference.path, dtype, device)
        prompts = prompts_of(thinker, reference)
        media[dtype] = torch.cat([prompt.media for prompt in prompts]).float()
        logp[dtype] = torch.cat([thinker.logprobs(prompt, completions)[0] for prompt in prompts]).float()
    for values, limit in ((media, 0.03), (logp, 0.05)):
        exact = values[torch.float32]
        assert (values[torch.bfloat16] - exact).norm() < limit * exact.norm()


# ---- the tracker -----------------------------------------------------------------------------------
def test_masks_equal_those_of_sam2s_own_predictor(device, tmp_path, monkeypatch):
    tracker = Tracker.from_pretrained(find_config(TOY_SAM2), TOY_SAM2, device)
    frames, objects = toy_prompts(0)
    with in_single_precision(device.type), monkeypatch.context() as patched:
        expected = predictor_logits(tracker.model, frames, objects, tmp_path, patched)
        logits, = tracker_logits(tracker, [(frames, objects)])
        masks = tracker.track(frames, objects)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-4)
    assert masks.any()
    assert_same_masks(masks, expected.cpu().numpy() > 0)


# ---- a training step -------------------------------------------------------------------------------
def step_and_weights(device, settings):
    """(group, log, whole weights on the CPU) after one training step."""
    _, _, device = start_processes(device.type)
    try:
        group, row, policy = training_step(device, settings)
        return group, row, {name: weight.cpu() for name, weight in whole_weights(policy)}
    finally:
        dist.destroy_process_group()


def drawn_once(generate):
    """Completions are drawn once, for both steps, as each device draws its own. Greedy ones are not kept."""
    drawn = []

    def once(thinker, *arguments, temperature=1.0, **options):
        if temperature == 0:
            return generate(thinker, *arguments, temperature=0, **options)
        if not drawn:
            drawn.append(generate(thinker, *arguments, temperature=temperature, **options))
        return drawn[0]
    return once


def test_a_training_step_is_that_of_the_cpu(device, monkeypatch):
    monkeypatch.setattr(Thinker, "generate", drawn_once(Thinker.generate))
    settings = settings_of("--group", 2, "--batch", 1, "--updates", 1, "--max_new_tokens", 32, "--lr", 1e-3,
                           "--warmup", 0)
    expected, expected_row, expected_weights = step_and_weights(CPU, settings)
    assert any(terms["consistency"] for terms in expected.terms), "nothing is tracked"
    with in_single_precision(device.type):
        group, row, weights = step_and_weights(device, settings)
    assert group.texts == expected.texts
    for terms, wanted in zip(group.terms, expected.terms, strict=True):
        assert terms == pytest.approx(wanted, abs=1e-3)
    for name in set(expected_row) - {"seconds", "memory_gb", "speed"}:
        assert row[name] == pytest.approx(expected_row[name], rel=1e-3, abs=1e-5), name
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        # Attention does not depend on a bias of the keys. Its gradient is rounding, and AdamW makes it large.
        if not name.endswith("k_proj.bias"):
            assert (weights[name] - weight).abs().mean() < 1e-2 * settings.lr, name

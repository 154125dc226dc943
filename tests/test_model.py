"""The Thinker in miniature: against transformers, log-probabilities, generation, checkpoints.

Letters as in model.py: P prefix tokens, G or n rows of a prompt, C tokens of a completion, H heads,
K key/value heads, d width of a head, V vocabulary.
"""
import json
import shutil
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

import model as model_file
from model import (
    Cache,
    Prefill,
    Prompt,
    Recorded,
    Rows,
    Thinker,
    adapters_off,
    add_adapters,
    draw_tokens,
    head_logits,
    in_batches,
    prefill_batches,
    read_config,
    speed_up_towers,
    token_logprobs,
    truncate,
)
from run import processes
from run.checkpoint import whole_weights
from tests.world import (
    EOS,
    KINDS,
    MEDIA,
    SOUND,
    TOY,
    VOCAB,
    inputs_of,
    prompts_of,
    text_ids,
    tiny_config,
)
from trust.errors import BadInput


# ---- slow twins, and what is compared --------------------------------------------------------------
def full_logits(thinker, prompt, completion):
    """Slow twin: one plain forward over prompt and completion.

    Returns the logits (C, V) that predict the completion.
    """
    C = len(completion)
    own = prompt.positions.max() + 1 + torch.arange(C)
    own = own.expand(3, -1)
    positions = torch.cat([prompt.positions, own], dim=1)
    ids = torch.cat([prompt.ids, completion])
    whole = Prompt(ids, positions, prompt.slots, prompt.media)
    logits = thinker.logits(whole)
    logits = logits[-C - 1:-1].clone()
    logits[:, MEDIA] = -torch.inf
    return logits


def chosen(values, tokens):
    """Of values (N, V) those of N tokens, (N,)."""
    return values.gather(-1, tokens[:, None])[:, 0]


def slow_logprobs(thinker, prompts, completions, mask, temperature):
    """Slow twin: every completion in a forward of its own, without its padding -> flat logp and entropy."""
    logp = []
    entropy = []
    for prompt, row, keep in zip(prompts, completions, mask):
        tokens = row[keep]
        logits = full_logits(thinker, prompt, tokens) / temperature
        logp.append(chosen(logits.log_softmax(-1), tokens))
        entropy.append(torch.distributions.Categorical(logits=logits).entropy())
    entropy = torch.cat(entropy)
    return torch.cat(logp), entropy.detach()


def slow_generate(thinker, prompt, n, steps, seed, **options):
    """Slow twin: a full forward per token, the same draws -> n lists of ids."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.arange(n)
    rows = torch.empty(n, 0, dtype=torch.long)
    for _ in range(steps):
        # The logits predict the last token. It is any id here.
        rows = F.pad(rows, (0, 1))
        logits = [full_logits(thinker, prompt, row)[-1] for row in rows]
        logits = torch.stack(logits)
        rows[:, -1] = draw_tokens(logits, [generator], n, alive, **options)
    completions = []
    for row in rows.tolist():
        length = row.index(EOS) + 1 if EOS in row else steps
        completions.append(row[:length])
    return completions


def ragged(lengths, seed=0):
    """Completions right-padded with the end id (G, C), and the mask of what counts."""
    rows = []
    for i, length in enumerate(lengths):
        ids = text_ids(length, seed + i)
        rows.append(torch.tensor(ids))
    completions = pad_sequence(rows, batch_first=True, padding_value=EOS)
    lengths = torch.tensor(lengths)
    mask = torch.arange(completions.shape[1]) < lengths[:, None]
    return completions, mask


def generate_ids(thinker, prompts, n, steps, ends=(EOS,), **options):
    """n completions of each prompt, as lists of ids."""
    groups = thinker.generate(prompts, n, steps, eos_ids=set(ends), **options)
    completions = []
    for group in groups:
        completions.append([row.tolist() for row in group])
    return completions


def gradients(model, loss):
    """{name: gradient} of a loss. Older gradients are cleared."""
    model.zero_grad()
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found


def assert_close(found, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def assert_same_gradients(found, expected, tolerance=1e-4):
    """Absolute tolerances are relative to the largest gradient of a tensor."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=tolerance, atol=tolerance * largest,
            msg=lambda message: f"{name}: {message}")


def assert_loads_in_transformers(path):
    """transformers' model of a directory, in which it finds each of its weights and nothing else."""
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    return model.eval()


# ---- against transformers --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_transformers(reference, thinker, kind):
    ours, theirs = inputs_of(kind, reference)
    logits = thinker.logits(*thinker.embed([ours]))
    expected = reference(**theirs, use_cache=False).logits[0]
    assert_close(logits, expected)

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, generator=generator)
    found = gradients(thinker, (logits * weights).mean())
    for name in found:
        assert not name.startswith(("visual.", "audio_tower."))
    wanted = {}
    whole = gradients(reference, (expected * weights).mean())
    for name, gradient in whole.items():
        # Newer transformers keep the language model one level deeper.
        name = name.replace("model.language_model.", "model.")
        if name in found:
            wanted[name] = gradient
    assert_same_gradients(found, wanted)


def test_removing_the_sound_changes_the_logits(reference, thinker):
    ours, _ = inputs_of("video with sound", reference)
    heard = thinker.logits(*thinker.embed([ours]))
    ours.mel = torch.zeros_like(ours.mel)
    silent = thinker.logits(*thinker.embed([ours]))
    first = (ours.ids == SOUND).nonzero()[0]
    assert torch.equal(heard[:first], silent[:first])
    change = heard[-1] - silent[-1]
    assert change.abs().max() > 1e-2


def test_towers_run_once_for_a_list_and_stay_frozen(reference, thinker, monkeypatch):
    thinker.train()
    assert not thinker.visual.training
    assert not thinker.audio_tower.training
    calls = []
    for tower in (thinker.visual, thinker.audio_tower):
        tower.register_forward_hook(lambda *_: calls.append(1))
    together = prompts_of(thinker, reference)
    assert len(calls) == 2
    for seed, (kind, prompt) in enumerate(zip(KINDS, together)):
        ours, _ = inputs_of(kind, reference, seed)
        alone, = thinker.embed([ours])
        assert_close(prompt.media, alone.media, atol=1e-5)
        assert torch.equal(prompt.slots, alone.slots)
        assert not prompt.media.requires_grad
    # One prompt at a time.
    monkeypatch.setattr(model_file, "VISION_PATCHES", 1)
    for prompt, in_parts in zip(together, prompts_of(thinker, reference)):
        assert_close(prompt.media, in_parts.media, atol=1e-5)


def test_media_and_placeholders_must_agree(reference, thinker):
    text, _ = inputs_of("text", reference)
    image, _ = inputs_of("image", reference)
    image.ids[8] = 50
    with pytest.raises(ValueError, match="prompt 1: 23 image or video placeholders, but 24"):
        thinker.embed([text, image])
    sound, _ = inputs_of("sound", reference)
    sound.mel = None
    with pytest.raises(ValueError, match="prompt 0: 23 sound placeholders, but 0"):
        thinker.embed([sound])
    image, _ = inputs_of("image", reference)
    image.ids[[8, -1]] = image.ids[[-1, 8]]
    with pytest.raises(ValueError, match="must end with a text token"):
        thinker.embed([image])


# ---- log-probabilities -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text", "video with sound"])
def test_shared_prefix_equals_one_forward_per_completion(reference, thinker, kind):
    prompt, = prompts_of(thinker, reference, [kind])
    completions, mask = ragged([9, 1, 14, 6])
    logp, entropy = thinker.logprobs(prompt, completions, temperature=0.7)
    slow, slow_entropy = slow_logprobs(thinker, [prompt] * 4, completions, mask, 0.7)
    assert_close(logp[mask], slow)
    assert_close(entropy[mask], slow_entropy, rtol=1e-3)
    weights = torch.randn(len(slow))
    found = gradients(thinker, (logp[mask] * weights).sum())
    assert_same_gradients(found, gradients(thinker, (slow * weights).sum()))


def test_forward_equals_one_forward_per_prompt(reference, thinker):
    prompts = prompts_of(thinker, reference)
    completions, mask = ragged([9, 1, 14, 6, 14])
    logp, entropy = thinker(prompts, completions)
    slow, slow_entropy = slow_logprobs(thinker, prompts, completions, mask, 1.0)
    assert_close(logp[mask], slow)
    assert_close(entropy[mask], slow_entropy, rtol=1e-3)
    found = gradients(thinker, logp[mask].sum())
    assert_same_gradients(found, gradients(thinker, slow.sum()))


def test_padding_carries_no_gradient(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, _ = ragged([5, 5])
    longer = F.pad(completions, (0, 7), value=EOS)
    logp, _ = thinker.logprobs(prompt, completions)
    plain = gradients(thinker, logp.sum())
    logp, _ = thinker.logprobs(prompt, longer)
    padded = gradients(thinker, logp[:, :5].sum())
    assert_same_gradients(padded, plain)


def test_checkpointed_layers_give_equal_gradients(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, mask = ragged([9, 4])

    def shared_prefix():
        logp, _ = thinker.logprobs(prompt, completions)
        return gradients(thinker, logp[mask].sum())

    plain = shared_prefix()
    thinker.gradient_checkpointing = True
    assert_same_gradients(shared_prefix(), plain)
    logp, _ = thinker([prompt] * 2, completions)
    assert_same_gradients(gradients(thinker, logp[mask].sum()), plain)


def test_head_in_chunks_equals_the_whole():
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(VOCAB, 16, requires_grad=True)
    targets = torch.randint(9, VOCAB, (50,))
    suppressed = torch.tensor(MEDIA)
    arguments = (hidden, weight, targets, suppressed, 0.8)
    logp, entropy = token_logprobs(*arguments, chunk=7)
    whole_logp, whole_entropy = token_logprobs(*arguments, chunk=50)
    assert (logp < 0).all()
    assert (whole_logp < 0).all()
    assert not entropy.requires_grad
    assert not whole_entropy.requires_grad
    torch.testing.assert_close(logp, whole_logp)
    torch.testing.assert_close(entropy, whole_entropy)
    leaves = (hidden, weight)
    found = torch.autograd.grad(logp.sum(), leaves)
    expected = torch.autograd.grad(whole_logp.sum(), leaves)
    assert_close(found, expected, atol=1e-5)
    logits = head_logits(hidden, weight, suppressed) / 0.8
    probs = logits.softmax(-1)
    assert (probs[:, MEDIA] == 0).all()
    torch.testing.assert_close(chosen(probs, targets).log(), logp)


# ---- generation ------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature, top_p, top_k", [
    (0, 1.0, 0),
    (1.0, 1.0, 0),
    (1.3, 0.9, 20),
])
@torch.no_grad()
def test_generation_equals_full_forwards_in_a_ragged_batch(reference, thinker, temperature, top_p, top_k):
    prompts = prompts_of(thinker, reference, ["text", "video with sound", "image"])
    seeds = [5, 6, 7]
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    found = generate_ids(thinker, prompts, 3, 12, seeds=seeds, **options)
    for seed, prompt, group in zip(seeds, prompts, found):
        assert group == slow_generate(thinker, prompt, 3, 12, seed, **options)
    first, *others = found[0]
    all_equal = others == [first, first]
    assert all_equal == (temperature == 0)


@torch.no_grad()
def test_a_prompts_samples_do_not_depend_on_the_batch(reference, thinker, monkeypatch):
    prompts = prompts_of(thinker, reference)
    seeds = [3, 4, 5, 6, 7]
    together = generate_ids(thinker, prompts, 2, 20, seeds=seeds)
    monkeypatch.setattr(model_file, "PREFILL_TOKENS", 64)
    backwards = generate_ids(thinker, prompts[::-1], 2, 20, seeds=seeds[::-1])
    assert backwards[::-1] == together
    for prompt, seed, group in zip(prompts, seeds, together):
        alone = generate_ids(thinker, [prompt], 2, 20, seeds=[seed])
        assert alone == [group]


def test_padding_of_the_cache_changes_no_token(reference, thinker, monkeypatch):
    prompts = prompts_of(thinker, reference)
    seeds = [3, 4, 5, 6, 7]
    assert thinker.prefill(prompts, 2, 20).prefix.shape[4] % 64 == 0
    padded = generate_ids(thinker, prompts, 2, 20, seeds=seeds)
    monkeypatch.setattr(model_file, "PREFIX_MULTIPLE", 1)
    longest = max(len(prompt.ids) for prompt in prompts)
    assert thinker.prefill(prompts, 2, 20).prefix.shape[4] == longest - 1
    assert generate_ids(thinker, prompts, 2, 20, seeds=seeds) == padded


def test_prefill_batches_keep_the_limit(monkeypatch):
    monkeypatch.setattr(model_file, "PREFILL_TOKENS", 100)
    lengths = [50, 10, 120, 40, 50]
    assert prefill_batches(lengths) == [[1, 3], [0, 4], [2]]
    batches = in_batches(list("abcde"), lengths, 100)
    assert batches == [["a", "b"], ["c"], ["d", "e"]]


@torch.no_grad()
def test_decoding_is_as_exact_in_bf16_as_one_pass_of_attention():
    """Keys have a large common part, as those of large models: logits near 60.

    bf16 alone would round them by a quarter.
    """
    torch.manual_seed(0)
    config = read_config(TOY).text_config
    H = config.num_attention_heads
    K = config.num_key_value_heads
    d = config.hidden_size // H
    P = 40
    common = 60 / (3 * d ** 0.5)
    q = torch.randn(P + 1, H, d) + 3
    k = torch.randn(P + 1, K, d) + common
    v = torch.randn(P + 1, K, d)
    # Queries, keys and values in bf16; those of the prefix and those of the token after it; the same in fp32.
    tokens = [x.bfloat16() for x in (q, k, v)]
    prefix = [x[:P] for x in tokens]
    new = [x[P:] for x in tokens]
    exact = [x.float() for x in tokens]

    cache = Cache([P], 1, 4, config, like=tokens[0])
    Prefill(1, cache, torch.tensor([0])).attend(0, *prefix)
    cache.advance(0, recorded=False)
    decoded = cache.attend(0, *new).float()
    once = Rows(1).attend(0, *tokens)[P:].float()
    true = Rows(1).attend(0, *exact)[P:]
    error = (once - true).norm()
    assert (decoded - true).norm() < 1.5 * error + 1e-3 * true.norm()


class Traced(Recorded):
    """A recording without a GPU: the operations of one call.

    In it all but the arguments is a constant: a number as it was, and a tensor as the place where it lies.
    """
    made = []
    newest = None  # a weak reference to the newest recording

    def __init__(self, function, *arguments):
        assert self.newest is None or self.newest() is None, "the old recording is still there"
        Traced.newest = weakref.ref(self)
        self.arguments = [x.clone() for x in arguments]
        self.made.append(len(self.arguments[0]))
        trace = make_fx(partial(function, *self.arguments))()
        result = trace().clone()
        self.result = result

        def replay():
            result.copy_(trace())
        self.graph = SimpleNamespace(replay=replay)


@torch.no_grad()
def test_a_recorded_step_gives_the_same_tokens(reference, thinker, monkeypatch):
    prompts = prompts_of(thinker, reference, ["text", "video with sound", "image"])
    options = dict(ends=[EOS, 11, 12, 13], temperature=1.3, seeds=[5, 6, 7])
    wanted = generate_ids(thinker, prompts, 6, 40, **options)
    lengths = []
    for group in wanted:
        lengths += [len(row) for row in group]
    assert min(lengths) < 16 < max(lengths)

    monkeypatch.setattr(model_file, "SHORTEST_SPAN", 16)
    monkeypatch.setitem(model_file.RECORDERS, "cpu", Traced)
    Traced.made.clear()
    assert generate_ids(thinker, prompts, 6, 40, **options) == wanted
    rows = Traced.made
    assert len(rows) >= 3
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 18
    # Some have left.
    assert rows[-1] < 18


@torch.no_grad()
def test_what_is_sampled_is_what_is_scored(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["image"])
    group, = thinker.generate([prompt], 4, 30, eos_ids=set(), seeds=[1])
    completions = torch.stack(group)
    assert completions.shape == (4, 30)
    assert not torch.isin(completions, torch.tensor(MEDIA)).any()
    logp, entropy = thinker.logprobs(prompt, completions)
    assert logp.isfinite().all()
    assert (entropy > 0).all()
    # Averaged over samples, -logp estimates the entropy.
    assert abs(-logp.mean() - entropy.mean()) < 0.3


@torch.no_grad()
def test_generation_stops_at_an_end_token(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["text"])
    ((free,),) = generate_ids(thinker, [prompt], 1, 40, ends=(), temperature=0)
    ends = {free[9], free[20]}
    first = min(free.index(token) for token in ends)
    calls = []
    thinker.model.norm.register_forward_hook(lambda *_: calls.append(1))
    group, = thinker.generate([prompt], 1, 40, eos_ids=ends, temperature=0)
    assert group[0].tolist() == free[:first + 1]
    assert group[0].dtype == torch.int64
    # One prefill, then steps up to the next look at which rows have ended.
    assert len(calls) == 1 + 8 * (first // 8 + 1)


@torch.no_grad()
def test_media_ids_are_never_sampled(reference, thinker):
    # Without suppression these would win about every other step.
    thinker.lm_head.weight[MEDIA] *= 100
    prompt, = prompts_of(thinker, reference, ["text"])
    group, = generate_ids(thinker, [prompt], 16, 16, ends=(), temperature=2.0, seeds=[0])
    for row in group:
        assert len(row) == 16
        assert not set(row) & set(MEDIA)


@torch.no_grad()
def test_without_seeds_the_global_generator_draws(reference, thinker):
    prompt, = prompts_of(thinker, reference, ["text"])
    rows = []
    for _ in range(2):
        torch.manual_seed(8)
        rows += generate_ids(thinker, [prompt], 1, 16, ends=())
    assert rows[0] == rows[1]


def test_top_k_and_top_p():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    two = torch.tensor([[0, 0.4, 0, 0.3]])
    one = torch.tensor([[0, 0.4, 0, 0]])
    assert truncate(probs.clone(), 0, 1.0).equal(probs)
    assert truncate(probs, 2, 1.0).equal(two)
    # 0.4 alone falls short of 0.5.
    assert truncate(probs, 0, 0.5).equal(two)
    assert truncate(probs, 0, 1e-6).equal(one)
    # 0.7 of the kept 0.9 is more than 0.75.
    assert truncate(probs, 3, 0.75).equal(two)
    # A half is enough for a share of one half.
    probs = torch.tensor([[0.25, 0.5, 0.25]])
    half = torch.tensor([[0, 0.5, 0]])
    assert truncate(probs, 0, 0.5).equal(half)


@pytest.mark.parametrize("temperature, top_k, shares", [
    (1.0, 0, [0.1, 0.4, 0.2, 0.3]),
    # Squares of 0.4, 0.2 and 0.3.
    (0.5, 3, [0, 16 / 29, 4 / 29, 9 / 29]),
])
def test_tokens_are_drawn_by_their_probability(temperature, top_k, shares):
    n = 20000
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probs.log().expand(n, -1)
    generators = [torch.Generator().manual_seed(0)]
    alive = torch.arange(n)
    drawn = draw_tokens(logits, generators, n, alive, temperature, top_k, 1.0)
    found = drawn.bincount(minlength=4) / n
    assert_close(found, torch.tensor(shares), rtol=0, atol=0.015)


# ---- the towers on a GPU ---------------------------------------------------------------------------
def attend_by_window(q, k, v, ends, same_ends, longest, same_longest, scale):
    """What the kernel of a GPU computes: q, k, v (N, H, d) -> (N, H, d)."""
    assert ends is same_ends
    assert ends.dtype == torch.int32
    windows = list(zip(ends.tolist(), ends.tolist()[1:]))
    assert windows[-1][1] == len(q)
    assert max(end - start for start, end in windows) == longest == same_longest
    out = []
    for start, end in windows:
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(out)


def test_towers_give_the_same_in_one_call_a_layer(reference, thinker, monkeypatch):
    kinds = ["image", "video with sound"]
    wanted = prompts_of(thinker, reference, kinds)
    calls = []

    def attend(*arguments, **options):
        calls.append(1)
        return attend_by_window(*arguments, **options)

    monkeypatch.setattr(model_file, "varlen_attn", attend)
    thinker.visual.patch_embed.proj.register_forward_hook(lambda *_: pytest.fail("a convolution"))
    speed_up_towers(thinker, torch.float32)
    prompts_of(thinker, reference, kinds)
    assert not calls
    speed_up_towers(thinker, torch.bfloat16)
    found = prompts_of(thinker, reference, kinds)
    assert len(calls) == len(thinker.visual.blocks) + len(thinker.audio_tower.layers)
    for prompt, other in zip(found, wanted):
        assert_close(prompt.media, other.media, atol=1e-5)


# ---- adapters and shards ---------------------------------------------------------------------------
def test_adapters_begin_as_nothing_and_are_merged_in_the_end(reference, thinker, tmp_path):
    prompt, = prompts_of(thinker, reference, ["image"])
    completions, mask = ragged([9, 4])
    before = thinker.logprobs(prompt, completions)[0].detach()
    add_adapters(thinker, 3, seed=1)
    assert torch.equal(thinker.logprobs(prompt, completions)[0], before)
    trained = {name: p for name, p in thinker.named_parameters() if p.requires_grad}
    # Seven linear maps of a layer, two matrices each.
    assert len(trained) == 7 * 2 * len(thinker.model.layers)
    logp, _ = thinker.logprobs(prompt, completions)
    logp[mask].sum().backward()
    for name, p in trained.items():
        assert name.endswith((".up", ".down"))
        # `down` counts once `up` is not zero.
        assert p.grad.any() == name.endswith(".up")

    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape))
        with adapters_off(thinker):
            assert torch.equal(thinker.logprobs(prompt, completions)[0], before)
        after, _ = thinker.logprobs(prompt, completions)
        assert (after - before).abs().max() > 0.01
        thinker.save_pretrained(tmp_path, dict(whole_weights(thinker)))
        merged, _ = Thinker.from_pretrained(tmp_path).logprobs(prompt, completions)
        assert_close(merged, after)


def test_weights_are_sharded_where_they_are_told(monkeypatch):
    devices = []

    def fully_shard(module, *, mesh, **_):
        devices.append(mesh.device_type)

    monkeypatch.setattr(processes, "fully_shard", fully_shard)
    try:
        _, _, device = processes.start_processes("cpu")
        processes.shard(Thinker(tiny_config()), torch.float32, device)
    finally:
        dist.destroy_process_group()
    assert len(devices) > 1
    assert set(devices) == {"cpu"}


# ---- checkpoints -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_our_directory_loads_in_transformers(reference, thinker, tmp_path, size):
    thinker.save_pretrained(tmp_path, max_shard_size=size)
    theirs = assert_loads_in_transformers(tmp_path)
    _, example = inputs_of("video with sound", reference)
    wanted = reference(**example, use_cache=False).logits
    found = theirs(**example, use_cache=False).logits
    assert_close(found, wanted, rtol=0, atol=0)
    ours = Thinker.from_pretrained(tmp_path).state_dict()
    assert ours.keys() == thinker.state_dict().keys()
    for name, weight in thinker.state_dict().items():
        assert torch.equal(ours[name], weight)
    in_shards = (tmp_path / INDEX).is_file()
    assert in_shards == (size == "100KB")


def test_a_loaded_model_trains_only_its_language_model(thinker):
    trained = set()
    for name, weight in thinker.named_parameters():
        if weight.requires_grad:
            trained.add(name.split(".")[0])
    assert trained == {"model", "lm_head"}
    for _, buffer in thinker.named_buffers():
        assert not buffer.is_meta


def test_tied_embeddings_survive(tmp_path):
    thinker = Thinker(tiny_config(tie_word_embeddings=True))
    weights = {}
    for name, tensor in thinker.state_dict().items():
        weights[name] = tensor.clone()
    thinker.save_pretrained(tmp_path, weights)
    loaded = Thinker.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_loads_in_transformers(tmp_path)


def test_the_7b_has_the_same_weights_here_and_in_transformers():
    """On the meta device: names and shapes of every weight, at the size that users bring."""
    rope = dict(rope_theta=1e6, rope_type="default", mrope_section=[16, 24, 24])
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    config = Qwen2_5OmniThinkerConfig(text_config=dict(rope_parameters=rope), vision_config=vision)
    with torch.device("meta"):
        ours = Thinker(config).state_dict()
        theirs = Qwen2_5OmniThinkerForConditionalGeneration(config).state_dict()
    assert ours.keys() == theirs.keys()
    assert len(ours) > 1000
    trained = 0
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape
        if name.startswith(("model.", "lm_head.")):
            trained += weight.numel()
    assert trained == 7_615_616_512


# ---- the released layout ---------------------------------------------------------------------------
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def omni(thinker, tmp_path):
    """The released layout in miniature: nested config in its old spelling, prefixed weights in shards, a
    talker."""
    plain = tmp_path / "plain"
    thinker.save_pretrained(plain)
    path = tmp_path / "omni"
    path.mkdir()
    config = json.loads((plain / "config.json").read_text())
    text = config["text_config"]
    sections = text.pop("rope_parameters")["mrope_section"]
    text["rope_theta"] = 10000.0
    text["rope_scaling"] = dict(mrope_section=sections, rope_type="default", type="default")
    whole = dict(
        model_type="qwen2_5_omni", architectures=["Qwen2_5OmniModel"], thinker_config=config,
        talker_config=dict(model_type="qwen2_5_omni_talker"))
    (path / "config.json").write_text(json.dumps(whole))

    weights = load_file(plain / "model.safetensors")
    other = {"talker.x": torch.ones(2), "token2wav.y": torch.ones(2)}
    contents = [{}, {}, other]
    for i, name in enumerate(sorted(weights)):
        contents[i % 2][f"thinker.{name}"] = weights[name]
    weight_map = {}
    for file, content in zip(SHARDS, contents):
        save_file(content, path / file)
        weight_map |= dict.fromkeys(content, file)
    index = dict(metadata={}, weight_map=weight_map)
    (path / INDEX).write_text(json.dumps(index))
    return path


def test_the_released_layout_loads(reference, omni):
    loaded = Thinker.from_pretrained(omni)
    ours, theirs = inputs_of("video with sound", reference)
    logits = loaded.logits(*loaded.embed([ours]))
    assert_close(logits, reference(**theirs, use_cache=False).logits[0])


# Breakages: each takes the directory.
def cut_first_shard(start, end):
    """Leaves some of the bytes of the first shard."""
    def breakage(path):
        file = path / SHARDS[0]
        file.write_bytes(file.read_bytes()[start:end])
    return breakage


def replace_first_shard(path):
    (path / SHARDS[0]).write_bytes(b"garbage" * 99)


def reshape_one_weight(path):
    weights = load_file(path / SHARDS[0])
    weights["thinker.lm_head.weight"] = torch.ones(2, 3)
    save_file(weights, path / SHARDS[0])


def add_a_weight(path):
    save_file({"thinker.extra": torch.ones(1)}, path / SHARDS[2])


def drop_thinker_weights(path):
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = {"talker.x": SHARDS[2]}
    (path / INDEX).write_text(json.dumps(index))


def remove(name):
    def breakage(path):
        (path / name).unlink()
    return breakage


def write(name, text):
    def breakage(path):
        (path / name).write_text(text)
    return breakage


def thinker_config(text_config):
    """A config.json with this text_config."""
    thinker = dict(model_type="qwen2_5_omni_thinker", text_config=text_config)
    return json.dumps(dict(model_type="qwen2_5_omni", thinker_config=thinker))


BREAKAGES = [
    (cut_first_shard(0, 0), BadInput, "not a safetensors file: .*00001-of-00003"),
    (cut_first_shard(0, -100), BadInput, "not a safetensors file: .*00001-of-00003"),
    (cut_first_shard(0, 20), BadInput, "not a safetensors file: .*00001-of-00003"),
    (replace_first_shard, BadInput, "not a safetensors file: .*00001-of-00003"),
    (reshape_one_weight, BadInput, "00001-of-00003.* does not fit .*config.json .*size mismatch"),
    (add_a_weight, BadInput, "does not have: extra"),
    (drop_thinker_weights, BadInput,
     r"lacks \d+ of the Thinker's weights, the first is .*; expected .*hf download"),
    (remove(SHARDS[1]), FileNotFoundError, "00002-of-00003.*missing"),
    (remove(INDEX), FileNotFoundError, "holds no weights"),
    (remove("config.json"), FileNotFoundError, "no such file: .*config.json; expected .*hf download"),
    (shutil.rmtree, FileNotFoundError, "hf download Qwen/Qwen2.5-Omni-7B --local-dir"),
    (write("config.json", '{"model_type": "qwen2_5_omni_talker"}'), BadInput,
     "describes a qwen2_5_omni_talker model; expected qwen2_5_omni"),
    (write("config.json", '{"model_type": "qwen2_5_omni"}'), BadInput, "thinker_config"),
]
BAD_INDICES = [
    "",
    "[]",
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": null, "b": "c"}}',
]
BAD_CONFIGS = [
    "",
    "[1]",
    "{}",
    '{"model_type": "qwen2_5_omni", "thinker_config": []}',
    thinker_config([1]),
    thinker_config(dict(num_attention_heads=0)),
    thinker_config(dict(rope_parameters=dict(rope_theta=1))),
]
for text in BAD_INDICES:
    BREAKAGES.append((write(INDEX, text), BadInput, "index.json"))
for text in BAD_CONFIGS:
    BREAKAGES.append((write("config.json", text), BadInput, "config.json"))


@pytest.mark.parametrize("breakage, error, message", BREAKAGES)
def test_broken_directories_are_refused_in_one_line(omni, breakage, error, message):
    breakage(omni)
    with pytest.raises(error, match=message) as caught:
        Thinker.from_pretrained(omni)
    assert str(omni) in str(caught.value)
    assert "\n" not in str(caught.value)

"""Parts of a step by themselves, on one device: the same outputs first, then what they cost.

    python speed/parts.py decode towers --shape 7b --device cuda
    python speed/parts.py rows --shape small --device cpu --threads 1

A part prints a line of JSON for each thing that it finds, and ends with an error where outputs differ.
Weights are random. On a CPU times are the processor's: with one thread, other jobs change them little.

Letters as in model.py: B prompts, P prefix tokens, G (in generation n) rows of a prompt, C tokens of a
completion, H heads, K key/value heads, d width of a head.
"""
import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from model import RECORDERS, Cache, Decoder, Prompt, Rows, SharedPrefix, products
from run.plan import token_bytes
from speed.step import build, build_tracker, config_of, device_limits, in_single_precision, tower_home
from trust.options import at_least


class Different(Exception):
    """Two ways to the same result do not agree."""


@dataclass
class Setup:
    """What the parts are about."""
    shape: str
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def large(self) -> bool:
        """Whether sizes are those of real prompts."""
        return self.shape in ("3b", "7b")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @cached_property
    def text(self):
        return config_of(self.shape).text_config

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, K, d."""
        H = self.text.num_attention_heads
        return H, self.text.num_key_value_heads, self.text.hidden_size // H

    @cached_property
    def thinkers(self):
        """Ours and transformers', of the same weights."""
        ours, theirs = build(self.shape, self.dtype, self.device.type)
        return ours.requires_grad_(False), theirs.requires_grad_(False)

    @property
    def thinker(self):
        return self.thinkers[0]


# ---- measuring -------------------------------------------------------------------------------------
def say(what: str, **found) -> None:
    """A finding: what it is about, and numbers by name."""
    print(json.dumps({"what": what, **found}), flush=True)


def same(what: str, error: float, limit: float) -> None:
    """Tells by how much two ways differ. Raises Different where it is more than the limit."""
    say(what, difference=error, limit=limit)
    # Written so that NaN fails.
    if not error <= limit:
        raise Different(f"{what}: {error:.2g} is more than {limit:.2g}")


def distance(x: Tensor, y: Tensor) -> float:
    """Of x from y, relative to y's norm."""
    x = x.detach().float()
    y = y.detach().float()
    return float((x - y).norm() / y.norm())


def now(setup: Setup) -> float:
    """Seconds of the clock when a GPU is done, and of the processor on a CPU."""
    if not setup.on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(setup: Setup, call, repeats: int = 5) -> tuple[float, float]:
    """Of the first call, and the median of those after it."""
    times = []
    for _ in range(repeats + 1):
        start = now(setup)
        call()
        times.append(1e3 * (now(setup) - start))
    return round(times[0], 3), round(statistics.median(times[1:]), 3)


def peak_gb(setup: Setup, call) -> float | None:
    """Of a GPU's memory during a call, beyond what is in use before it."""
    if not setup.on_gpu:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)


def waits(call) -> int:
    """How often the host waits for the GPU in a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def attention_kernels(setup: Setup, call) -> list[str]:
    """Names of the kernels of attention that a call launches on a GPU."""
    if not setup.on_gpu:
        return []
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = set()
    for event in profiler.key_averages():
        if any(word in event.key.lower() for word in ("flash", "fmha", "cudnn", "softmax")):
            names.add(event.key[:70])
    return sorted(names)


def queries_keys_values(setup: Setup, tokens: int) -> list[Tensor]:
    """(tokens, H, d) and twice (tokens, K, d), random, with gradients."""
    H, K, d = setup.heads
    generator = torch.Generator(setup.device).manual_seed(0)
    made = []
    for heads in (H, K, K):
        x = torch.randn(tokens, heads, d, device=setup.device, generator=generator)
        made.append(x.to(setup.dtype).requires_grad_())
    return made


# ---- attention -------------------------------------------------------------------------------------
def attend(setup: Setup) -> None:
    """Training's attention over a shared prefix, against a causal pass of each row in float32."""
    P, G, C = (700, 3, 130) if setup.large else (70, 2, 13)
    tensors = queries_keys_values(setup, P + G * C)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    out = SharedPrefix(P, G).attend(0, *tensors)
    expected = rows_apart(P, G, C, *exact)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out.float() * weights).sum(), tensors)
    true = torch.autograd.grad((expected * weights).sum(), exact)
    rounding = 0.005 if setup.dtype == torch.bfloat16 else 1e-5
    same("attention: output", distance(out, expected), rounding)
    for name, gradient, true_gradient in zip("qkv", found, true):
        same(f"attention: gradient of {name}", distance(gradient, true_gradient), 2 * rounding)

    P, G, C = (4096, 8, 2048) if setup.large else (512, 8, 64)
    tensors = queries_keys_values(setup, P + G * C)

    def forward_and_backward():
        SharedPrefix(P, G).attend(0, *tensors).sum().backward()

    _, ms = milliseconds(setup, forward_and_backward)
    say(f"a layer's attention, forward and backward, P {P}, G {G}, C {C}", ms=ms,
        gb=peak_gb(setup, forward_and_backward), kernels=attention_kernels(setup, forward_and_backward))


def rows_apart(P, G, C, q, k, v) -> Tensor:
    """SharedPrefix.attend, slowly: every row with a prefix of its own."""
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for g in range(G):
            start = P + g * C
            row = [torch.cat([x[:P], x[start:start + C]]) for x in (q, k, v)]
            results.append(Rows(1).attend(0, *row))
    return torch.cat([results[0][:P]] + [result[P:] for result in results])


def plans(setup: Setup) -> None:
    """What a prompt of a new length costs, with cuDNN's attention (model.py turns it off) and without."""
    lengths = range(2001, 2007) if setup.large else range(201, 204)
    # The comparison comes last: it would plan, too.
    results = {}
    for on in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(on)
        for P in lengths:
            tensors = queries_keys_values(setup, P)
            forward = partial(Rows(1).attend, 0, *tensors)
            first, later = milliseconds(setup, forward, 3)
            out = forward()
            backward = partial(out.backward, torch.ones_like(out), retain_graph=True)
            first_back, later_back = milliseconds(setup, backward, 3)
            say(f"a new length, cuDNN's attention {'on' if on else 'off'}, P {P}", forward_first_ms=first,
                forward_later_ms=later, backward_first_ms=first_back, backward_later_ms=later_back)
            results.setdefault(P, []).append(out)
    torch.backends.cuda.enable_cudnn_sdp(False)
    for P, (with_cudnn, without) in results.items():
        same(f"cuDNN on and off, P {P}", distance(with_cudnn, without), 0.01)


@torch.no_grad()
def attention_step(setup: Setup) -> None:
    """Attention of a decode step in all layers: as it is, and with one kernel for the whole prefix."""
    n = 8
    H, K, d = setup.heads
    layers = setup.text.num_hidden_layers
    sizes = [(4095, 400), (4096, 400), (4095, 2000), (4096, 2000)] if setup.large else [(127, 40), (128, 40)]
    config = config_of(setup.shape).text_config
    config.num_hidden_layers = 1
    like = torch.empty(0, device=setup.device, dtype=setup.dtype)
    for P, length in sizes:
        cache = Cache([P], n, length + 48, config, like)
        cache.prefix.normal_()
        cache.own.normal_()
        for c in range(length + 1):
            cache.advance(c, recorded=True)
        q, k, v = (torch.randn(n, heads, d, device=setup.device, dtype=setup.dtype) for heads in (H, K, K))
        ways = dict(now=partial(cache.attend, 0, q, k, v), flash=partial(attend_by_flash, cache, P, q, k, v))
        what = f"attention of a step, P {P}, {length} own tokens, {n} rows"
        same(what, distance(ways["flash"](), ways["now"]()), 0.01)
        ms = {}
        for name, way in ways.items():
            _, ms[f"{name}_ms"] = milliseconds(setup, repeated(setup, way, layers), 10)
        say(f"{what}, {layers} layers", **ms)


def repeated(setup, call, times):
    """A call that makes `times` calls; a GPU replays their recording."""
    def calls():
        for _ in range(times):
            call()

    if not setup.on_gpu:
        return calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def attend_by_flash(cache, P, q, k, v) -> Tensor:
    """Cache.attend for one prompt of P tokens: flash attention for the prefix, merged with the row's own.

    Each side's part of the sum comes from its logsumexp. No scores of the prefix are in memory.
    """
    prefix_k, prefix_v = cache.prefix[0, ..., :P, :]  # (1, K, P, d)
    own = cache.own[0]                                # (2, 1, K, n, room, d)
    n = cache.n
    _, K, _, d = prefix_k.shape
    q = q.view(1, n, K, -1, d).transpose(1, 2)        # (1, K, n, r, d)
    new = torch.stack([k, v]).view(2, 1, n, K, 1, d)
    own.index_copy_(4, cache.length, new.transpose(2, 3))
    own_k, own_v = own[..., :cache.span, :]
    if q.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    on_prefix, prefix_sum = flash(q.flatten(2, 3), prefix_k, prefix_v)[:2]
    not_there = torch.arange(cache.span, device=q.device) > cache.length
    scores = (products(q, own_k) * d ** -0.5).masked_fill(not_there, -torch.inf)
    own_sum = scores.logsumexp(-1)                    # (1, K, n, r)
    on_own = (scores - own_sum[..., None]).exp().to(q.dtype) @ own_v
    share = (prefix_sum.view(own_sum.shape) - own_sum).sigmoid()[..., None]
    out = torch.lerp(on_own.float(), on_prefix.view(q.shape).float(), share).to(q.dtype)
    return out.transpose(1, 2).reshape(n, -1, d)


# ---- generation ------------------------------------------------------------------------------------
def text_prompt(setup: Setup, tokens: int, seed: int = 0) -> Prompt:
    """A prompt of so many random words."""
    ids = torch.randint(9, vocabulary(setup), (tokens,), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(setup.device)
    positions = torch.arange(tokens, device=setup.device).expand(3, -1)
    return Prompt(ids, positions, ids[:0], setup.thinker.no_features())


def vocabulary(setup: Setup) -> int:
    """Ids from 9 up to this one are words in every shape."""
    return min(setup.text.vocab_size, 100_000)


def some_ends(setup: Setup, once_in: int) -> set[int]:
    """End tokens such that a random row ends about once in so many tokens."""
    return set(range(9, vocabulary(setup), once_in))


def equal_share(found, expected) -> float:
    """The mean share of tokens before a row's first difference, of two rollouts."""
    shares = []
    for group, other in zip(found, expected):
        for row, other_row in zip(group, other):
            length = min(len(row), len(other_row))
            equal = (row[:length] == other_row[:length]).long().cumprod(0).sum()
            shares.append(float(equal) / max(len(row), len(other_row)))
    return statistics.mean(shares)


@torch.no_grad()
def decode(setup: Setup) -> None:
    """Recorded steps give the tokens of unrecorded ones and what training scores; what a step costs."""
    thinker = setup.thinker
    most = 300 if setup.large else 40
    prompts = [text_prompt(setup, P) for P in ((1002, 778) if setup.large else (32, 21))]
    for temperature in (0.0, 1.0):
        options = dict(eos_ids=some_ends(setup, 150), temperature=temperature, seeds=[1, 2])
        found = thinker.generate(prompts, 8, most, **options)
        # It looks at the same spans, so that sums are in the same order.
        with mock.patch.dict(RECORDERS, {setup.device.type: lambda function, *_: function}):
            expected = thinker.generate(prompts, 8, most, **options)
        same(f"tokens, recorded against not, temperature {temperature:g}", 1 - equal_share(found, expected),
             limit_of_tokens(setup))
    gap = rollout_gap(setup, prompts[0], 4, most)
    largest = 0.1 if setup.dtype == torch.bfloat16 else 1e-4
    same("log-probabilities of rollout and training, mean difference in nats", gap, largest)

    for P in (4096, 4095) if setup.large else (128, 127):
        ms = decode_step_ms(setup, [text_prompt(setup, P + 1)], 8, (16, 144) if setup.large else (8, 40))
        say(f"decode, prefix {P}, 8 rows", ms_a_step=ms, tokens_per_s=8e3 / ms, **bandwidth_share(setup, ms))
    if setup.on_gpu:
        count = waits(lambda: thinker.generate(prompts, 8, 64, eos_ids={-1}, seeds=[1, 2]))
        say("waits for the GPU in a rollout of 64 tokens (8 looks, and a few before)", waits=count)
        rollout = partial(thinker.generate, prompts, 8, 140, **options)
        say("memory after five more rollouts", **growth_mb(rollout))


def limit_of_tokens(setup: Setup) -> float:
    """In bf16 two ways round differently, and from the first other token a row goes another way."""
    return 0.9 if setup.dtype == torch.bfloat16 else 0.0


def rollout_gap(setup: Setup, prompt: Prompt, n: int, C: int) -> float:
    """Mean difference of log-probabilities, nats: of n sampled rows as decoded, and as trained."""
    thinker = setup.thinker
    [group] = thinker.generate([prompt], n, C, eos_ids={-1}, seeds=[3])
    rows = torch.stack(group).to(setup.device)  # (n, C)
    trained, _ = thinker.logprobs(prompt, rows)
    decoder = Decoder(thinker, [prompt], n, C)
    tokens = prompt.ids[-1].expand(1, n)
    gaps = []
    for c in range(C):
        logp = decoder.step(c, tokens).log_softmax(-1)  # (n, V)
        tokens = rows[None, :, c]
        gaps.append(logp.gather(-1, rows[:, c:c + 1])[:, 0] - trained[:, c])
    return float(torch.stack(gaps).abs().mean())


def decode_step_ms(setup: Setup, prompts, n: int, lengths) -> float:
    """Milliseconds of a step. On a GPU: what the longer of two rollouts takes more, by its steps."""
    if not setup.on_gpu:
        return step_shares(setup, prompts, n, lengths[1])["step_ms"]
    seeds = list(range(len(prompts)))
    times = []
    for C in lengths:
        rollout = partial(setup.thinker.generate, prompts, n, C, eos_ids={-1}, seeds=seeds)
        times.append(milliseconds(setup, rollout, 3)[1])
    short, long = lengths
    return round((times[1] - times[0]) / (long - short), 4)


def bandwidth_share(setup: Setup, ms: float) -> dict:
    """The time to read the weights once, as a share of a step."""
    limits = device_limits() if setup.on_gpu else None
    if limits is None:
        return {}
    return dict(bandwidth_share=token_bytes(setup.thinker) / limits[0] / (1e-3 * ms))


def growth_mb(call) -> dict:
    """What five calls leave of a GPU's memory."""
    before = torch.cuda.memory_allocated()
    before_reserved = torch.cuda.memory_reserved()
    for _ in range(5):
        call()
    gc.collect()
    return dict(
        allocated_mb=(torch.cuda.memory_allocated() - before) / 1e6,
        reserved_mb=(torch.cuda.memory_reserved() - before_reserved) / 1e6,
    )


# ---- towers and tracker ----------------------------------------------------------------------------
@torch.no_grad()
def towers(setup: Setup) -> None:
    """The vision tower as model.py uses it, against transformers' own."""
    ours, theirs = setup.thinkers
    theirs = tower_home(theirs).visual
    grids = dict(clip=[12, 16, 32], picture=[1, 44, 80]) if setup.large else dict(clip=[2, 8, 12])
    for name, grid in grids.items():
        grid = torch.tensor([grid], device=setup.device)
        values = 3 * 2 * setup.thinker.config.vision_config.patch_size ** 2
        patches = torch.randn(int(grid.prod()), values, device=setup.device, dtype=setup.dtype)
        what = f"vision tower, a {name} of {len(patches)} patches"
        ours_out = ours.visual(patches, grid_thw=grid).pooler_output
        theirs_out = theirs(patches, grid_thw=grid).pooler_output
        same(what, distance(ours_out, theirs_out), 0.1 if setup.dtype == torch.bfloat16 else 1e-5)
        _, ours_ms = milliseconds(setup, lambda: ours.visual(patches, grid_thw=grid), 3)
        _, theirs_ms = milliseconds(setup, lambda: theirs(patches, grid_thw=grid), 3)
        _, embed_ms = milliseconds(setup, lambda: ours.visual.patch_embed(patches), 3)
        _, conv_ms = milliseconds(setup, lambda: theirs.patch_embed(patches), 3)
        say(what, ours_ms=ours_ms, transformers_ms=theirs_ms, ours_embedding_ms=embed_ms,
            transformers_embedding_ms=conv_ms)


def tracker(setup: Setup) -> None:
    """SAM2 over several objects at once, against each alone; seconds and memory over their number."""
    track = build_tracker(setup.device.type)
    T = 24 if setup.on_gpu else 3
    frames = []
    for t in range(T):
        pixels = np.random.default_rng(t).integers(0, 256, (90, 160, 3), np.uint8)
        frames.append(Image.fromarray(pixels).resize((1280, 720) if setup.on_gpu else (320, 180)))
    with in_single_precision(setup.device.type):
        objects = some_objects(3, frames)
        together = track.track(frames[:6], objects)
        alone = np.concatenate([track.track(frames[:6], [boxes]) for boxes in objects])
    union = (together | alone).sum()
    same("masks of 3 objects at once against each alone, 1 - IoU", 1 - (together & alone).sum() / union, 0.01)
    for n in (1, 8, 32) if setup.on_gpu else (1, 4):
        unions = [list(range(n))] * 8
        call = partial(track.track, frames, some_objects(n, frames), unions)
        first, later = milliseconds(setup, call, 1)
        say(f"tracking {n} objects on {T} frames", first_s=first / 1e3, seconds=later / 1e3,
            gb=peak_gb(setup, call))
    if setup.on_gpu:
        say(f"waits for the GPU, {n} objects on 6 frames",
            waits=waits(lambda: track.track(frames[:6], some_objects(n, frames), unions)))


def some_objects(n: int, frames) -> list[dict]:
    """n boxes that differ, each on one of the first frames."""
    width, height = frames[0].size
    objects = []
    for i in range(n):
        box = (0.08 * width + i, 0.14 * height, 0.4 * width + i, 0.55 * height)
        objects.append({(3 * i) % min(6, len(frames)): box})
    return objects


# ---- rollouts over the number of rows --------------------------------------------------------------
@torch.no_grad()
def rows(setup: Setup) -> None:
    """Tokens a second over the rows of a prompt, of unequal prompts, where rows end; and the limits."""
    sizes = dict(tiny=(128, (8, 24)), small=(1024, (8, 40)))
    P, lengths = sizes.get(setup.shape, (2048, (16, 144)))
    say_limits(setup)
    prompt = text_prompt(setup, P)
    for n in (1, 2, 4, 8, 16, 32, 64):
        what = f"one prompt of {P} tokens, {n} rows"
        if setup.on_gpu:
            shares = dict(step_ms=decode_step_ms(setup, [prompt], n, lengths))
        else:
            shares = step_shares(setup, [prompt], n, lengths[1])
        say(what, tokens_per_s=1e3 * n / shares["step_ms"], **shares)
    rows_of_unequal_prompts(setup, P, lengths)
    rows_that_end(setup, prompt, 8 * lengths[0] + lengths[1])


def say_limits(setup: Setup) -> None:
    """How fast memory is read, and how fast matrices are multiplied, here and now."""
    megabytes = 1024 if setup.on_gpu else 256
    long = torch.ones(megabytes * 2 ** 18, device=setup.device)
    _, read = milliseconds(setup, long.sum)
    size = 8192 if setup.on_gpu else 1024
    matrix = torch.randn(size, size, device=setup.device, dtype=setup.dtype)
    _, product = milliseconds(setup, lambda: matrix @ matrix)
    weights = token_bytes(setup.thinker)
    operations = 2 * weights / setup.thinker.lm_head.weight.element_size()
    read_rate = 4 * long.numel() / (1e-3 * read)
    product_rate = 2 * size ** 3 / (1e-3 * product)
    say("limits", read_gb_per_s=read_rate / 1e9, gflop_per_s=product_rate / 1e9, weights_mb=weights / 1e6,
        ms_to_read_weights=1e3 * weights / read_rate, ms_of_a_rows_products=1e3 * operations / product_rate)


def step_shares(setup: Setup, prompts, n: int, C: int) -> dict:
    """Milliseconds of a step on a CPU, in all and by what they are spent on: medians of C - 2 steps."""
    step = Decoder.step
    marks = []
    with timed_parts() as totals:
        def marked(*arguments):
            marks.append(dict(totals, step=time.process_time()))
            return step(*arguments)

        with mock.patch.object(Decoder, "step", marked):
            setup.thinker.generate(prompts, n, C, eos_ids={-1}, seeds=list(range(len(prompts))))
    shares = {}
    for name in marks[-1]:
        times = [after[name] - before[name] for before, after in zip(marks[1:], marks[2:])]
        shares[f"{name}_ms"] = round(1e3 * statistics.median(times), 4)
    return shares


@contextmanager
def timed_parts():
    """Inside, seconds in linear maps, attention and draws are added up by name -> Counter.

    Norms, rotations and the rest of Python are in none of them.
    """
    totals = Counter()

    def timed(name, call):
        def measured(*arguments, **options):
            start = time.process_time()
            result = call(*arguments, **options)
            totals[name] += time.process_time() - start
            return result
        return measured

    with (
        mock.patch.object(F, "linear", timed("linear", F.linear)),
        mock.patch.object(Cache, "attend", timed("attention", Cache.attend)),
        mock.patch.object(model, "draw_tokens", timed("draw", model.draw_tokens)),
    ):
        yield totals


def rows_of_unequal_prompts(setup: Setup, P: int, lengths) -> None:
    """Prompts of P / 8 to P tokens with 8 rows each: in one batch, and one after the other."""
    n = 8
    prompts = [text_prompt(setup, P // k, seed=k) for k in (8, 4, 2, 1)]
    generate = partial(setup.thinker.generate, n=n, max_new_tokens=lengths[1], eos_ids={-1})
    together = generate(prompts, seeds=[1, 2, 3, 4])
    alone = []
    for prompt, seed in zip(prompts, (1, 2, 3, 4)):
        alone += generate([prompt], seeds=[seed])
    same("tokens of unequal prompts, in a batch against alone", 1 - equal_share(together, alone),
         limit_of_tokens(setup))
    ms = decode_step_ms(setup, prompts, n, lengths)
    apart = sum(decode_step_ms(setup, [prompt], n, lengths) for prompt in prompts)
    tokens = 1e3 * n * len(prompts)
    say(f"prompts of {P // 8} to {P} tokens, {n} rows each", ms_a_step=ms, tokens_per_s=tokens / ms,
        tokens_per_s_one_after_the_other=tokens / apart)


def rows_that_end(setup: Setup, prompt: Prompt, C: int) -> None:
    """What it saves that ended rows leave, where rows end about once in C / 4 tokens."""
    def keep_all(ended):
        return rows_to_keep(ended) if ended.all() else None

    rows_to_keep = model.rows_to_keep
    for n in (8, 64):
        options = dict(eos_ids=some_ends(setup, C // 4), seeds=[1])
        generate = partial(setup.thinker.generate, [prompt], n, C, **options)
        [group] = generate()
        with mock.patch.object(model, "rows_to_keep", keep_all):
            same(f"{n} rows that end, tokens where they leave and stay", 1 - equal_share(generate(), [group]),
                 limit_of_tokens(setup))
            _, staying = milliseconds(setup, generate, 3)
        _, leaving = milliseconds(setup, generate, 3)
        counts = [len(row) for row in group]
        say(f"{n} rows that end after {statistics.mean(counts):.0f} tokens, the longest after {max(counts)}",
            tokens_per_s=1e3 * sum(counts) / leaving, tokens_per_s_if_none_leaves=1e3 * sum(counts) / staying)


# ---- the program -----------------------------------------------------------------------------------
PARTS = dict(attend=attend, plans=plans, attention_step=attention_step, decode=decode, towers=towers,
             tracker=tracker, rows=rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shape", choices=["tiny", "small", "3b", "7b"], default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: as torch decides")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    setup = Setup(options.shape, torch.device(options.device))
    for name in options.parts:
        try:
            PARTS[name](setup)
        except Different as error:
            sys.exit(f"{name}: outputs differ, so nothing is measured: {error}")


if __name__ == "__main__":
    main()

"""The Thinker of Qwen2.5-Omni: towers, language model, generation, log-probabilities, checkpoints.

Both towers come from transformers and stay frozen. The language model is written out here and works on flat
tokens: every layer sees one matrix of N tokens, and a *layout* decides which of them attend to which.

    Rows          B right-padded rows, each causal                           supervised training, tests
    Prefill       the same; the prompts' keys and values go into a Cache     before generation
    Cache         one new token per row against its prompt and its past      generation
    SharedPrefix  one prompt, computed once, and the G rows that share it    log-probabilities, training

A *row* is one sequence of tokens. A prompt's last token opens every row that continues it. The tokens before
it are the *prefix*. The row [last prompt token, c_0 … c_(C-2)] predicts exactly c_0 … c_(C-1), so generation
and training feed the same rows.

Nothing here knows of processes: run/ shards the layers from outside.

Letters: B prompts, P prefix tokens, G (in generation n) rows of a prompt, m of them still alive, R rows alive
in all, C tokens of a completion, S tokens of a padded row, N flat tokens, M media tokens, D width, H heads,
K key/value heads, r = H / K, d width of a head, L layers, V vocabulary.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniVisionEncoder,
)

from data import Inputs, sound_tokens
from trust.errors import BadInput, reading
from trust.files import POLICY_EXPECTED
from trust.policy import check_thinker, read_policy_config
from trust.weights import read_shards

# torch 2.11 prefers cuDNN's attention on an H100 or H200: it plans every new length anew, up to half a second
# each, and is known to err with few key/value heads.
torch.backends.cuda.enable_cudnn_sdp(False)

# Patches that the vision tower sees at once. Bounds its activations: 0.9 GB for an MLP of the 7B.
VISION_PATCHES = 65536
# Padded prompt tokens computed at once before generation. Bounds its activations.
PREFILL_TOKENS = 32768
# Tokens whose logits exist at once: 512 x 152064 x 4 B = 311 MB.
HEAD_TOKENS = 512
# Names in config.json of the tokens that only a prompt may hold: media placeholders and their brackets.
PROMPT_ONLY = (
    "image_token_index",
    "video_token_index",
    "audio_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
    "audio_start_token_id",
    "audio_end_token_id",
)
# Decode steps between two looks at which rows have ended. Each look waits for the device.
FINISH_CHECK = 8
# The prefix in a cache is padded to a multiple of so many tokens.
PREFIX_MULTIPLE = 64
# Own tokens that a recorded decode step looks at. Doubled whenever they are full.
SHORTEST_SPAN = 128


@dataclass
class Prompt:
    """One prompt on the model's device.

    The towers are frozen, so their features are kept. Token embeddings are trained and looked up anew.
    """
    ids: Tensor        # (P + 1,) int64; the last one opens every row
    positions: Tensor  # (3, P + 1) int64: time, height, width
    slots: Tensor      # (M,) int64: which tokens are media tokens
    media: Tensor      # (M, D): the towers' features for them

    def row_positions(self, count):
        """Positions (3, count) of a row: the last prompt token, then text that counts on from the largest."""
        text = torch.arange(count - 1, device=self.positions.device)
        text = self.positions.max() + 1 + text
        return torch.cat([self.positions[:, -1:], text.expand(3, -1)], dim=1)


# ---- who attends to whom ---------------------------------------------------------------------------
def split_rows(x, count):
    """Flat tokens (count S, H, d) as attention wants them: (count, H, S, d)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def join_rows(x):
    """The inverse of split_rows: (count, H, S, d) to (count S, H, d)."""
    return x.transpose(1, 2).flatten(0, 1)


@dataclass
class Rows:
    """B rows of equal padded length. Padding stands at the end, so the causal mask alone hides it."""
    count: int

    def attend(self, layer, q, k, v):
        """q (B S, H, d), k and v (B S, K, d) -> (B S, H, d)."""
        q = split_rows(q, self.count)  # (B, H, S, d)
        k = split_rows(k, self.count)  # (B, K, S, d)
        v = split_rows(v, self.count)
        return join_rows(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@dataclass
class SharedPrefix:
    """P prefix tokens, then G rows of C tokens. A row sees the prefix and itself, the prefix only itself.

    The backward pass adds up the gradients of all rows in the prefix, through the expand.
    """
    prefix: int
    group: int

    def attend(self, layer, q, k, v):
        """q (P + G C, H, d), k and v (P + G C, K, d) -> (P + G C, H, d)."""
        P = self.prefix
        prefix = Rows(1).attend(layer, q[:P], k[:P], v[:P])  # (P, H, d)
        q = split_rows(q[P:], self.group)                    # (G, H, C, d)
        k = self.prefix_and_own(k)                           # (G, K, P + C, d)
        v = self.prefix_and_own(v)
        mask = causal_lower_right(q.shape[2], k.shape[2])
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return torch.cat([prefix, join_rows(own)])

    def prefix_and_own(self, x):
        """Keys or values (P + G C, K, d) -> what each row sees, (G, K, P + C, d)."""
        prefix = split_rows(x[:self.prefix], 1).expand(self.group, -1, -1, -1)
        own = split_rows(x[self.prefix:], self.group)
        return torch.cat([prefix, own], dim=2)


class Cache:
    """Keys and values for n rows of each of B prompts. A prompt's prefix is kept once, whatever n is.

    What changes at every token (length, hidden) is kept in tensors, so that a step can be recorded.
    """

    def __init__(self, lengths, n, room, config, like):
        """lengths: prefix tokens of each prompt. room: most tokens of a row. config: the language model's.

        like: any tensor of the dtype and device wanted.
        """
        self.n = n
        self.span = 0  # own tokens that a step looks at
        B = len(lengths)
        # Rows that begin at aligned addresses let a GPU use its fast kernels.
        P = -(-max(lengths) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
        L = config.num_hidden_layers
        K = config.num_key_value_heads
        d = config.hidden_size // config.num_attention_heads
        # Zeros, not empty: what lies beyond a prompt's end gets weight 0, and 0 times a stray NaN is NaN.
        self.prefix = like.new_zeros(L, 2, B, K, P, d)
        self.own = like.new_zeros(L, 2, B, K, n, room, d)
        # How many tokens each row has.
        self.length = like.new_zeros(1, dtype=torch.int64)
        # Which places hold nothing: beyond a prompt's end, and what a row has not reached yet.
        hidden = torch.ones(B, P + room, dtype=torch.bool)
        hidden[:, :P] = torch.arange(P) >= torch.tensor(lengths)[:, None]
        self.hidden = hidden.to(like.device)[:, None, None, None]  # (B, 1, 1, 1, P + room)

    def advance(self, length, recorded):
        """Makes room for one more token after `length`.

        The span covers exactly the places in use. Where steps are recorded, each new span costs a recording,
        so there it grows to the next power of two.
        """
        self.length.fill_(length)
        # A slice: one element would be copied from the host, which waits for the device at every token.
        place = self.prefix.shape[4] + length
        self.hidden[..., place:place + 1] = False
        if length < self.span:
            return
        if recorded:
            power = 1 << length.bit_length()
            self.span = min(self.own.shape[5], max(SHORTEST_SPAN, power))
        else:
            self.span = length + 1

    def keep(self, staying):
        """Forgets all rows of each prompt but `staying` (B, m)."""
        self.n = staying.shape[1]
        # The axes of `own`: L, 2, B, K, n, room, d. take_along_dim would write the index out, 8 bytes for 2.
        index = staying[None, None, :, None, :, None, None]
        self.own = self.own.gather(4, index.expand_as(self.own[..., :self.n, :, :]))

    def attend(self, layer, q, k, v):
        """One new token per row: q (B n, H, d), k and v (B n, K, d) -> (B n, H, d)."""
        prefix_k, prefix_v = self.prefix[layer]  # (B, K, P, d)
        own = self.own[layer]                    # (2, B, K, n, room, d)
        B, K, P, d = prefix_k.shape
        q = q.view(B, self.n, K, -1, d).transpose(1, 2)  # (B, K, n, r, d)
        new = torch.stack([k, v]).view(2, B, self.n, K, 1, d)
        own.index_copy_(4, self.length, new.transpose(2, 3))  # the cache grows
        own_k, own_v = own[..., :self.span, :]                # (B, K, n, span, d)

        # The queries of all n rows are folded into one matrix: the prefix is read once, not n times.
        to_prefix = products(q.flatten(2, 3), prefix_k)   # (B, K, n r, P)
        to_prefix = to_prefix.unflatten(2, (self.n, -1))  # (B, K, n, r, P)
        to_own = products(q, own_k)                       # (B, K, n, r, span)
        scores = torch.cat([to_prefix, to_own], dim=-1) * d ** -0.5
        scores = scores.masked_fill_(self.hidden[..., :P + self.span], -torch.inf)
        weights = scores.softmax(-1).to(q.dtype)
        on_prefix, on_own = weights.split([P, self.span], dim=-1)
        from_prefix = on_prefix.flatten(2, 3) @ prefix_v     # (B, K, n r, d)
        out = from_prefix.view(q.shape) + on_own @ own_v     # (B, K, n, r, d)
        return out.transpose(1, 2).reshape(B * self.n, -1, d)


def products(q, k):
    """Dot products (…, a, b), fp32, of q (…, a, d) and k (…, b, d).

    A plain matmul would round them to bf16, by up to 1/256 of themselves. Then the policy that samples would
    not be the policy that is trained.
    """
    if q.is_cuda:
        product = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT, out_dtype=torch.float32)
        return product.view(*q.shape[:-1], -1)
    return q.float() @ k.float().mT


@dataclass
class Prefill(Rows):
    """Rows that leave their keys and values in a cache, for the prompts at `index`."""
    cache: Cache
    index: Tensor  # (B,) int64

    def attend(self, layer, q, k, v):
        """As Rows.attend."""
        for part, x in enumerate((k, v)):
            x = split_rows(x, self.count)  # (B, K, S, d)
            self.cache.prefix[layer, part][self.index, :, :x.shape[2]] = x
        return super().attend(layer, q, k, v)


# ---- the language model ----------------------------------------------------------------------------
class Attention(nn.Module):
    """Grouped-query attention with rotary positions. The layout decides who attends to whom."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.head_width = D // config.num_attention_heads
        key_width = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, key_width)
        self.v_proj = nn.Linear(D, key_width)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, rope, layout, layer):
        q = self.q_proj(x).unflatten(1, (-1, self.head_width))  # (N, H, d)
        k = self.k_proj(x).unflatten(1, (-1, self.head_width))  # (N, K, d)
        v = self.v_proj(x).unflatten(1, (-1, self.head_width))
        turned = rotate(torch.cat([q, k], dim=1), rope)
        q, k = turned.split([q.shape[1], k.shape[1]], dim=1)
        out = layout.attend(layer, q, k, v)  # (N, H, d)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        # RMSNorm computes in fp32 inside.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, layout, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions, layout, recompute=False):
        """Embeddings x (N, D), positions (3, N) -> hidden states (N, D).

        recompute: keep only each layer's input for the backward pass.
        """
        rope = rotations(positions, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            if isinstance(layout, Cache):
                # Not layer(...): the weights are gathered by now, and FSDP's hooks cost more than a layer.
                x = layer.forward(x, rope, layout, i)
            elif recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, layout, i, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, layout, i)
        return self.norm(x)


def rotations(positions, config, dtype):
    """TMRoPE: cosines and sines (N, 1, d/2) of positions (3, N).

    Each of the d/2 frequencies belongs to one axis: the first section to time, the second to height, the
    third to width.
    """
    d = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    exponents = torch.arange(0, d, 2, device=positions.device) / d
    frequencies = rope["rope_theta"] ** -exponents  # (d/2,)
    sections = frequencies.split(rope["mrope_section"])
    angles = [axis[:, None] * section for axis, section in zip(positions, sections)]
    angles = torch.cat(angles, dim=-1)  # (N, d/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x, rope):
    """Turns the pairs (x_i, x_(i + d/2)) of x (N, H, d)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---- low-rank adapters -----------------------------------------------------------------------------
class Adapted(nn.Linear):
    """A frozen linear map with a trained one of low rank beside it (LoRA, arXiv 2106.09685).

        y = W x + b + 2 U D x

    U starts as zeros, so the sum starts as W. The factor 2 comes from the usual alpha, twice the rank. U and
    D are float32.
    """

    def __init__(self, linear, rank, generator):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.on = True
        down = torch.randn(rank, self.in_features, generator=generator) * self.in_features ** -0.5
        self.down = nn.Parameter(down.to(self.weight.device))
        self.up = nn.Parameter(self.weight.new_zeros(self.out_features, rank, dtype=torch.float32))

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        low = F.linear(x, self.down.to(x.dtype))  # (N, rank)
        return torch.addmm(y, low, self.up.to(x.dtype).T, alpha=2)

    def merged(self) -> Tensor:
        """The weight of one plain linear map with the same output."""
        return (self.weight + 2 * self.up @ self.down).to(self.weight.dtype)


def add_adapters(thinker: "Thinker", rank: int, seed: int) -> None:
    """Freezes a Thinker and gives every linear map of its layers an adapter, the same on every process."""
    thinker.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in thinker.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, Adapted(linear, rank, generator))


@contextmanager
def adapters_off(thinker: "Thinker"):
    """Inside, the Thinker is what it was before training."""
    adapters = [module for module in thinker.modules() if isinstance(module, Adapted)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


# ---- from hidden states to tokens ------------------------------------------------------------------
def head_logits(hidden, head_weight, suppressed):
    """hidden (N, D) -> logits (N, V) in fp32. Suppressed ids get -inf and so drop out of every softmax."""
    logits = F.linear(hidden, head_weight).float()
    return logits.index_fill(-1, suppressed, -torch.inf)


def token_logprobs(hidden, head_weight, targets, suppressed, temperature=1.0, chunk=HEAD_TOKENS):
    """Log-probabilities of N tokens, and entropies of their distributions (no gradient), in nats.

    hidden (N, D), targets (N,) -> (N,), (N,). Logits exist for one chunk at a time, and the backward pass
    computes them again.
    """
    def chunk_logprobs(hidden, targets):
        logits = head_logits(hidden, head_weight, suppressed) / temperature
        logp = logits.log_softmax(-1)  # (chunk, V)
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy

    parts = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk)):
        parts.append(checkpoint(chunk_logprobs, h, t, use_reentrant=False, preserve_rng_state=False))
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies)


def truncate(probs, top_k, top_p):
    """Keeps the top_k likeliest tokens (0: all), and of these the fewest with a share of at least top_p."""
    if top_k == 0 and top_p == 1.0:
        return probs
    ranked, order = probs.sort(dim=-1, descending=True)
    if top_k:
        ranked[:, top_k:] = 0
    # For each token, the mass of all likelier ones.
    likelier = ranked.cumsum(-1) - ranked
    ranked[likelier >= top_p * ranked.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter(-1, order, ranked)


def draw_tokens(logits, generators, n, alive, temperature, top_k, top_p):
    """One token for each alive row: logits (R, V) -> (R,).

    alive: (R,) numbers of these rows among all B n. Each prompt's generator draws for all n rows of its
    prompt, so a row's token does not depend on which others are alive.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = truncate((logits / temperature).softmax(-1), top_k, top_p)
    # A race: token i arrives at the time Exp(1) / p_i, and is the first with probability p_i. Unlike a
    # multinomial draw, this does not make the CPU wait for the device.
    races = [probs.new_empty(n, probs.shape[1]).exponential_(generator=g) for g in generators]
    return (probs / torch.cat(races)[alive]).argmax(-1)


def first_end(completion, eos_ids):
    """Length of a completion up to and including its first end token."""
    for i, token in enumerate(completion):
        if token in eos_ids:
            return i + 1
    return len(completion)


def rows_to_keep(ended):
    """Which of the alive rows stay alive, (B, left), given which have `ended`, (B, m). None: all stay.

    Every prompt keeps equally many, and ended rows are dropped only where that halves the rows.
    """
    # The most rows that a prompt has left. While tokens are drawn, the CPU waits for the device only here.
    left = int((~ended).sum(1).max())
    if left > ended.shape[1] // 2:
        return None
    return ended.int().argsort(dim=1, stable=True)[:, :left]


# ---- a decode step ---------------------------------------------------------------------------------
class Recorded:
    """A function of tensors whose kernels are recorded (a CUDA graph) and then launched all at once.

    One by one, the kernels for a token of the 7B take longer to launch than to run. Values that are not
    tensors stay as they were at the recording.
    """

    def __init__(self, function, *arguments):
        self.arguments = [x.clone() for x in arguments]
        self.graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads (NCCL's) may go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = function(*self.arguments)

    def __call__(self, *arguments):
        for place, x in zip(self.arguments, arguments):
            place.copy_(x)
        self.graph.replay()
        return self.result


# By type of device. On others a step is simply computed.
RECORDERS = {"cuda": Recorded}


class Decoder:
    """Generates: a step takes the newest token of every alive row and returns the logits of the next one.

    Where the device has a recorder, a step is replayed. A recording is for one size of the cache: the rows
    of a prompt, and the span of own tokens.
    """

    def __init__(self, thinker, prompts, n, room):
        self.thinker = thinker
        self.cache = thinker.prefill(prompts, n, room)
        self.positions = torch.stack([p.row_positions(room) for p in prompts], dim=1)  # (3, B, C)
        self.suppressed = thinker.suppressed
        self.recorder = RECORDERS.get(thinker.device.type)
        self.recording = None
        self.recorded_size = None

    def step(self, c, tokens):
        """Token c of every alive row, (B, m) -> logits (R, V) of the token after it."""
        cache = self.cache
        cache.advance(c, recorded=self.recorder is not None)
        size = (cache.n, cache.span)
        positions = self.positions[:, :, c].repeat_interleave(cache.n, dim=1)  # (3, R)
        tokens = tokens.flatten()
        # The first step is not recorded, because libraries initialise themselves in it.
        if self.recorder and c > 0 and size != self.recorded_size:
            # The old recording goes first. Newer torch frees memory with it that the new one would use.
            self.recording = None
            self.recording = self.recorder(self.compute, tokens, positions)
            self.recorded_size = size
        run = self.recording or self.compute
        return run(tokens, positions)

    def compute(self, tokens, positions):
        thinker = self.thinker
        x = thinker.model.embed_tokens(tokens)  # (R, D)
        hidden = thinker.model(x, positions, self.cache)
        return head_logits(hidden, thinker.lm_head.weight, self.suppressed)


# ---- the towers on a GPU ---------------------------------------------------------------------------
def attend_windows(module, q, k, v, *, scaling, cu_seq_lens_q, max_length_q, **_):
    """Attention within all windows of a tower at once: q, k, v (1, H, N, d) -> (1, N, H, d).

    transformers calls its default once for each window, thousands of times a picture. It gives these
    arguments to an attention with "flash" in its name. cu_seq_lens_q: int32, where windows begin, and N.
    """
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (N, H, d)
    ends = cu_seq_lens_q
    out = varlen_attn(q, k, v, ends, ends, max_length_q, max_length_q, scale=scaling)
    return out[None], None


AttentionInterface.register("flash_windows", attend_windows)


def speed_up_towers(thinker: "Thinker", dtype: torch.dtype) -> None:
    """Computes the towers as a GPU likes it, with the same results up to rounding."""
    embed = thinker.visual.patch_embed
    # A convolution whose windows do not overlap. cuDNN is slow at it.
    embed.forward = lambda x: F.linear(x.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    # The kernel takes no float32.
    if dtype == torch.bfloat16:
        for tower in (thinker.visual, thinker.audio_tower):
            tower.config._attn_implementation = "flash_windows"


# ---- the whole -------------------------------------------------------------------------------------
class Thinker(nn.Module):
    """Two frozen towers, the language model and its head, under the names of the released checkpoints.

    gradient_checkpointing: the backward pass computes each layer again instead of keeping its activations.
    """

    def __init__(self, config: Qwen2_5OmniThinkerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.audio_tower = Qwen2_5OmniAudioEncoder(config.audio_config).requires_grad_(False)
        self.visual = Qwen2_5OmniVisionEncoder(config.vision_config).requires_grad_(False)
        text = config.text_config
        self.model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.train()

    def train(self, mode=True):
        """As in any module, but the towers stay in evaluation mode."""
        super().train(mode)
        self.audio_tower.eval()
        self.visual.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The towers' device. The language model may be elsewhere."""
        return next(self.visual.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def suppressed(self) -> Tensor:
        """Ids of PROMPT_ONLY. If one were sampled, the next forward would look for media in vain."""
        ids = []
        for name in PROMPT_ONLY:
            token = getattr(self.config, name, None)  # not every configuration has all
            if token is not None and token < self.config.text_config.vocab_size:
                ids.append(token)
        return torch.tensor(ids, device=self.device)

    # -- prompts -----------------------------------------------------------------------------------
    def embed(self, inputs: list[Inputs]) -> list[Prompt]:
        """Runs each tower once over all prompts, without gradient where the towers are frozen.

        Raises ValueError where placeholders and media disagree in number or a prompt does not end with a text
        token.
        """
        config = self.config
        seen = self.see(inputs)
        heard = self.hear(inputs)
        prompts = []
        for i, item in enumerate(inputs):
            ids = item.ids.to(self.device)
            is_sound = ids == config.audio_token_index
            is_image = (ids == config.image_token_index) | (ids == config.video_token_index)
            is_media = is_image | is_sound
            check_count(i, "image or video", is_image, seen[i])
            check_count(i, "sound", is_sound, heard[i])
            if is_media[-1]:
                raise ValueError(f"prompt {i} ends with a media placeholder; it must end with a text token")
            slots = is_media.nonzero()[:, 0]  # (M,)
            media = seen[i].new_empty(len(slots), config.text_config.hidden_size)
            media[is_image[slots]] = seen[i]
            media[is_sound[slots]] = heard[i]
            prompts.append(Prompt(ids, item.positions.to(self.device), slots, media))
        return prompts

    def see(self, inputs: list[Inputs]) -> list[Tensor]:
        """Vision features of each prompt, [(tokens, D)]. Patches merge by squares, frames by pairs.

        Prompts that share their patches share the features.
        """
        patches_per_token = self.config.vision_config.spatial_merge_size ** 2
        distinct = {id(item.patches): item for item in inputs if item.patches is not None}
        items = list(distinct.values())
        features = {id(None): self.no_features()}  # of a prompt without patches
        sizes = [len(item.patches) for item in items]
        for batch in in_batches(items, sizes, VISION_PATCHES):
            patches = torch.cat([item.patches for item in batch]).to(self.device, self.dtype)
            grid = torch.cat([item.grid for item in batch]).to(self.device)
            tokens = self.visual(patches, grid_thw=grid).pooler_output
            counts = [len(item.patches) // patches_per_token for item in batch]
            for item, own in zip(batch, tokens.split(counts)):
                features[id(item.patches)] = own
        return [features[id(item.patches)] for item in inputs]

    def hear(self, inputs: list[Inputs]) -> list[Tensor]:
        """Sound features of each prompt, [(tokens, D)]: one token for four mel frames."""
        mels = [item.mel for item in inputs if item.mel is not None]
        if not mels:
            return [self.no_features()] * len(inputs)
        frames = torch.tensor([mel.shape[1] for mel in mels], device=self.device)
        mel = torch.cat(mels, dim=1).to(self.device, self.dtype)  # (bins, frames of all)
        halved = (frames + 1) // 2
        tokens = self.audio_tower(mel, feature_lens=frames, aftercnn_lens=halved).last_hidden_state
        counts = [sound_tokens(item.mel) for item in inputs]
        return tokens.split(counts)

    def no_features(self):
        return torch.empty(0, self.config.text_config.hidden_size, dtype=self.dtype, device=self.device)

    def look_up(self, prompt):
        """Embeddings (P + 1, D) of a prompt: trained ones of text, the towers' features of media."""
        x = self.model.embed_tokens(prompt.ids)
        return x.index_copy(0, prompt.slots, prompt.media.to(x.dtype))

    def run_rows(self, x, positions, layout):
        """Pads and runs B rows: x [(S_b, D)], positions [(3, S_b)] -> hidden states (B, S, D)."""
        x = pad_sequence(x, batch_first=True)  # (B, S, D)
        positions = pad_sequence([p.T for p in positions], batch_first=True)  # (B, S, 3)
        positions = positions.flatten(0, 1).T  # (3, B S)
        hidden = self.model(x.flatten(0, 1), positions, layout, self.gradient_checkpointing)
        return hidden.unflatten(0, (len(x), -1))

    # -- log-probabilities -------------------------------------------------------------------------
    def logits(self, prompt: Prompt) -> Tensor:
        """Logits (P + 1, V) at every position of one prompt, nothing suppressed: for tests and inspection."""
        hidden = self.run_rows([self.look_up(prompt)], [prompt.positions], Rows(1))
        return F.linear(hidden[0], self.lm_head.weight)

    def forward(
        self,
        prompts: list[Prompt],
        completions: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (B, C), nats, of one completion for each of B prompts.

        For supervised training. completions: (B, C) int64, right-padded with any ordinary id. The padding is
        computed too; the caller masks it.
        """
        B, C = completions.shape
        completions = completions.to(self.device)
        text = self.model.embed_tokens(completions[:, :-1])  # (B, C - 1, D)
        x = []
        positions = []
        for prompt, own in zip(prompts, text):
            x.append(torch.cat([self.look_up(prompt), own]))
            positions.append(torch.cat([prompt.positions[:, :-1], prompt.row_positions(C)], dim=1))
        rows = self.run_rows(x, positions, Rows(B))  # (B, S, D)
        hidden = [row[len(p.ids) - 1:][:C] for row, p in zip(rows, prompts)]
        return self.score(torch.stack(hidden), completions, temperature)  # of (B, C, D)

    def logprobs(
        self,
        prompt: Prompt,
        completions: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (G, C), nats, of G completions of one prompt.

        The prefix is computed once. completions: (G, C) int64, right-padded as in forward.
        """
        G, C = completions.shape
        P = len(prompt.ids) - 1
        completions = completions.to(self.device)
        prefix = self.look_up(prompt)[:-1]  # (P, D)
        opening = prompt.ids[-1:].expand(G, 1)
        ids = torch.cat([opening, completions[:, :-1]], dim=1)
        own = self.model.embed_tokens(ids)  # (G, C, D)
        x = torch.cat([prefix, own.flatten(0, 1)])  # (P + G C, D)
        own_positions = prompt.row_positions(C).repeat(1, G)
        positions = torch.cat([prompt.positions[:, :-1], own_positions], dim=1)
        hidden = self.model(x, positions, SharedPrefix(P, G), self.gradient_checkpointing)
        hidden = hidden[P:].unflatten(0, (G, C))  # (G, C, D)
        return self.score(hidden, completions, temperature)

    def score(self, hidden, targets, temperature):
        """token_logprobs for hidden (B, C, D) and targets (B, C)."""
        hidden = hidden.flatten(0, 1)
        head = self.lm_head.weight
        logp, entropy = token_logprobs(hidden, head, targets.flatten(), self.suppressed, temperature)
        return logp.view(targets.shape), entropy.view(targets.shape)

    # -- generation --------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], n: int, max_new_tokens: int, *,
        eos_ids: set[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: list[int] | None = None,
    ) -> list[list[Tensor]]:
        """Samples n completions of each of B prompts.

        Returns B lists of n int64 tensors on the CPU, each up to and including its first token of eos_ids.
        temperature 0 takes the likeliest token. seeds: one per prompt; a prompt's samples depend on nothing
        else in the batch. None draws them from torch's global generator.
        """
        if seeds is None:
            seeds = torch.randint(2 ** 62, (len(prompts),)).tolist()
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        eos = torch.tensor(sorted(eos_ids), device=self.device)
        decoder = Decoder(self, prompts, n, max_new_tokens)

        # Of the alive rows, (B, m) each: their numbers, newest tokens, and whether they have ended.
        alive = torch.arange(len(prompts) * n, device=self.device).view(-1, n)
        tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].expand_as(alive)
        ended = torch.zeros_like(alive, dtype=torch.bool)
        drawn = alive.new_zeros(alive.numel(), max_new_tokens)  # (B n, C)
        for c in range(max_new_tokens):
            numbers = alive.flatten()  # (R,)
            tokens = draw_tokens(
                decoder.step(c, tokens),  # logits (R, V)
                generators, n, numbers, temperature, top_k, top_p,
            )
            drawn[:, c].index_copy_(0, numbers, tokens)
            tokens = tokens.view_as(alive)
            ended |= torch.isin(tokens, eos)
            if (c + 1) % FINISH_CHECK:
                continue
            staying = rows_to_keep(ended)
            if staying is None:
                continue
            if staying.numel() == 0:
                break
            decoder.cache.keep(staying)
            alive = alive.gather(1, staying)
            tokens = tokens.gather(1, staying)
            ended = ended.gather(1, staying)
        completions = []
        for group in drawn[:, :c + 1].cpu().split(n):
            completions.append([row[:first_end(row.tolist(), eos_ids)] for row in group])
        return completions

    def prefill(self, prompts, n, room):
        """Computes every prompt's prefix once, similar lengths together."""
        lengths = [len(p.ids) - 1 for p in prompts]
        cache = Cache(lengths, n, room, self.config.text_config, like=self.look_up(prompts[0]))
        for index in prefill_batches(lengths):
            x = [self.look_up(prompts[i])[:-1] for i in index]
            positions = [prompts[i].positions[:, :-1] for i in index]
            places = torch.tensor(index, device=self.device)
            self.run_rows(x, positions, Prefill(len(index), cache, places))
        return cache

    # -- checkpoints -------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ) -> "Thinker":
        """Reads a Qwen2.5-Omni directory (of which the Thinker is taken) or a Thinker-only one.

        Every tensor is copied directly to its place, so two copies of the model never exist at once. Raises
        FileNotFoundError or BadInput, naming the path and what was expected there.
        """
        path = Path(path)
        config = read_config(path)
        with reading(path / "config.json"), torch.device("meta"):
            model = cls(config)
        # Two buffers are computed, not stored. On the device "meta" they are empty, so they are made again.
        rotary = type(model.visual.rotary_pos_emb)
        model.visual.rotary_pos_emb = rotary(model.visual.config).to(device)
        sinusoids = model.audio_tower.positional_embedding
        sinusoids = type(sinusoids)(sinusoids.length, sinusoids.channels)
        model.audio_tower.positional_embedding = sinusoids.to(device)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for shard in read_shards(path, shapes, dtype, device):
            model.load_state_dict(shard, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise BadInput(f"{path} lacks {len(missing)} of the Thinker's weights, "
                           f"the first is {missing[0]}; {POLICY_EXPECTED}")
        if torch.device(device).type == "cuda":
            speed_up_towers(model, dtype)
        return model

    def save_pretrained(
        self,
        path: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size="5GB",
    ) -> None:
        """Writes a Thinker-only directory that from_pretrained, here and in transformers, reads.

        state_dict: whole tensors, where the model's own are sharded.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        Path(path).mkdir(parents=True, exist_ok=True)
        self.config.architectures = ["Qwen2_5OmniThinkerForConditionalGeneration"]
        self.config.save_pretrained(path)
        save_torch_state_dict(state, path, max_shard_size=max_shard_size)


def check_count(i, name, places, features):
    """Raises ValueError unless prompt i has as many placeholders as features."""
    if places.sum() != len(features):
        raise ValueError(f"prompt {i}: {places.sum()} {name} placeholders, "
                         f"but {len(features)} {name} features")


def in_batches(items, sizes, most):
    """Consecutive items in batches whose sizes add up to at most `most` (a larger item stands alone)."""
    batches = []
    total = 0
    for item, size in zip(items, sizes):
        if batches and total + size <= most:
            batches[-1].append(item)
            total += size
        else:
            batches.append([item])
            total = size
    return batches


def prefill_batches(lengths):
    """Groups prompts by length into padded batches of at most PREFILL_TOKENS (longer ones stand alone)."""
    batches = []
    # Ascending, so prompt i is the longest of its batch.
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= PREFILL_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def read_config(path: Path) -> Qwen2_5OmniThinkerConfig:
    """The Thinker's part of config.json. transformers translates old spellings of the rotary settings.

    Raises FileNotFoundError or BadInput, naming the path and what was expected there.
    """
    _, thinker = read_policy_config(path)
    file = path / "config.json"
    with reading(file):
        config = Qwen2_5OmniThinkerConfig.from_dict(thinker)
        check_thinker(config, PROMPT_ONLY, file)
    return config

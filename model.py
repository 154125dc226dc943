"""The Thinker of Qwen2.5-Omni: towers, language model, generation, log-probabilities, checkpoints.

Both towers come from transformers and stay frozen. The language model is written out here and works on flat tokens:
every layer sees one matrix of N tokens, and a *layout* decides which of them attend to which. There are four:

    Rows          B right-padded sequences, each causal                               supervised training, tests
    Prefill       the same, and the keys and values of the prompts go into a Cache    before generation
    Cache         one new token per row against prompt and own past                   generation
    SharedPrefix  one prompt, computed once, and the G completions that share it      log-probabilities, training

A prompt's last token opens every row that continues it: the *prefix* is what stands before that token, and the row
[last prompt token, c_0 … c_(C-2)] predicts exactly c_0 … c_(C-1). So generation and training feed the same rows.

Letters: B prompts, P prefix tokens, G (in generation n) completions of a prompt, C tokens of a completion,
S tokens of a padded row, N flat tokens, M media tokens, D width, H heads, K key/value heads, r = H / K,
d width of a head, L layers, V vocabulary.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniVisionEncoder,
)

from data import POLICY_EXPECTED, BadInput, check_policy_folder, one_line, read_json, reading

VISION_PATCHES = 65536  # patches that the vision tower sees at once: bounds its activations (0.9 GB for an MLP of the 7B)
PREFILL_TOKENS = 32768  # padded prompt tokens computed at once before generation: bounds its activations
HEAD_TOKENS = 512  # tokens whose logits exist at once: 512 x 152064 x 4 B = 311 MB
FINISH_CHECK = 8  # decode steps between two looks at which rows have ended
SHORTEST_SPAN = 128  # own tokens that a recorded step looks at, doubled whenever they are full


@dataclass
class Prompt:
    """One prompt on the model's device. The towers are frozen, so their features are kept; token embeddings are
    trained, so they are looked up anew in every forward."""
    ids: Tensor  # (P + 1,) int64, the last one opens every completion
    positions: Tensor  # (3, P + 1) int64: time, height, width
    slots: Tensor  # (M,) int64: which tokens are media tokens
    media: Tensor  # (M, D): what the towers saw and heard there

    def row_positions(self, count: int) -> Tensor:
        """Positions (3, count) of a row: the last prompt token, then text that counts on from the largest so far."""
        text = self.positions.max() + 1 + torch.arange(count - 1, device=self.positions.device)
        return torch.cat([self.positions[:, -1:], text.expand(3, -1)], dim=1)


# ---- who attends to whom ---------------------------------------------------------------------------------------

def rows(x: Tensor, count: int) -> Tensor:
    """Flat tokens (count S, H, d) as attention wants them: (count, H, S, d)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """The way back: (count, H, S, d) to (count S, H, d)."""
    return x.transpose(1, 2).flatten(0, 1)


@dataclass
class Rows:
    """B sequences of equal padded length. The padding stands at the end, where causality alone hides it."""
    count: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B S, H, d), k and v (B S, K, d) -> (B S, H, d)."""
        q, k, v = (rows(x, self.count) for x in (q, k, v))  # (B, H, S, d), (B, K, S, d)
        return flat(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@dataclass
class SharedPrefix:
    """P prefix tokens, then G rows of C tokens: each row sees the prefix and itself, the prefix only itself.
    Gradients of all rows meet in the prefix through the expand."""
    prefix: int
    group: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (P + G C, H, d), k and v (P + G C, K, d) -> (P + G C, H, d)."""
        P, G = self.prefix, self.group
        prefix = Rows(1).attend(layer, q[:P], k[:P], v[:P])  # (P, H, d)
        q = rows(q[P:], G)  # (G, H, C, d)
        k, v = (torch.cat([rows(x[:P], 1).expand(G, -1, -1, -1), rows(x[P:], G)], dim=2) for x in (k, v))
        mask = causal_lower_right(q.shape[2], k.shape[2])  # keys (G, K, P + C, d)
        own = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return torch.cat([prefix, flat(own)])


class Cache:
    """Keys and values for n rows of each of B prompts. A prompt's prefix is kept once, whatever n is. What changes at every token
    is told by tensors (length, ahead), so that a step can be recorded."""

    def __init__(self, lengths: list[int], n: int, room: int, config, like: Tensor):
        """lengths: prefix tokens of each prompt; room: tokens a row may grow to; config: the language model's; like:
        any tensor of the dtype and device wanted."""
        self.n, self.span = n, 0
        B, P, L, K = len(lengths), max(lengths), config.num_hidden_layers, config.num_key_value_heads
        d = config.hidden_size // config.num_attention_heads
        # Zeros, not empty: what lies beyond a prompt's end gets weight 0, and 0 times a stray NaN would be NaN.
        self.prefix = like.new_zeros(L, 2, B, K, P, d)
        self.own = like.new_zeros(L, 2, B, K, n, room, d)
        self.length = torch.zeros(1, dtype=torch.int64, device=like.device)  # tokens of every row
        self.ahead = torch.ones(room, dtype=torch.bool, device=like.device)  # places of a row that are still empty
        beyond = torch.arange(P) >= torch.tensor(lengths)[:, None]  # (B, P)
        self.beyond = beyond.to(like.device)[:, None, None]  # (B, 1, 1, P)

    def advance(self, length: int, recorded: bool) -> bool:
        """Makes place for one more token after `length`. Returns whether more places are looked at than before: just those
        that are full, or where steps are recorded, and each change costs a recording, the next power of two."""
        self.length.fill_(length)
        self.ahead[length] = False
        before, needed = self.span, length + 1
        if needed > before:
            self.span = min(len(self.ahead), max(SHORTEST_SPAN, 1 << length.bit_length())) if recorded else needed
        return self.span > before

    def keep(self, rows: Tensor) -> None:
        """Forgets all but the rows (B, m) of each prompt."""
        self.n = rows.shape[1]
        self.own = self.own.take_along_dim(rows[None, None, :, None, :, None, None], dim=4)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token per row: q (B n, H, d), k and v (B n, K, d) -> (B n, H, d)."""
        (prefix_k, prefix_v), own = self.prefix[layer], self.own[layer]  # (B, K, P, d), (2, B, K, n, room, d)
        B, K, P, d = prefix_k.shape
        q = q.view(B, self.n, K, -1, d).transpose(1, 2)  # (B, K, n, r, d)
        new = torch.stack([k, v]).view(2, B, self.n, K, 1, d).transpose(2, 3)  # (2, B, K, n, 1, d)
        own.index_copy_(4, self.length, new)  # the cache grows
        own_k, own_v = own[:, :, :, :, :self.span]  # (B, K, n, c, d)

        # The queries of all n rows are folded into one matrix, so that the prefix is read once and not n times.
        to_prefix = similarity(q.flatten(2, 3), prefix_k)  # (B, K, n r, P)
        to_prefix = to_prefix.masked_fill_(self.beyond, -torch.inf).unflatten(2, (self.n, -1))  # (B, K, n, r, P)
        to_own = similarity(q, own_k).masked_fill_(self.ahead[:self.span], -torch.inf)  # (B, K, n, r, c)
        weights = torch.cat([to_prefix, to_own], dim=-1).softmax(-1).to(q.dtype)
        on_prefix, on_own = weights.split([P, self.span], dim=-1)
        out = (on_prefix.flatten(2, 3) @ prefix_v).view(q.shape) + on_own @ own_v  # (B, K, n, r, d)
        return out.transpose(1, 2).reshape(B * self.n, -1, d)


def similarity(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products (…, a, b), fp32, of q (…, a, d) and k (…, b, d). Rounded to bf16, as those of a plain matmul, they would
    be off by up to 1/256 of themselves, and what is sampled would not be what is trained."""
    if q.is_cuda:
        product = torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT, out_dtype=torch.float32).view(*q.shape[:-1], -1)
    else:
        product = q.float() @ k.float().mT
    return product * q.shape[-1] ** -0.5


@dataclass
class Prefill(Rows):
    """Rows that leave their keys and values in a cache, for the prompts named by index."""
    cache: Cache
    index: list[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for part, x in enumerate((k, v)):
            x = rows(x, self.count)  # (B, K, S, d)
            self.cache.prefix[layer, part, self.index, :, :x.shape[2]] = x
        return super().attend(layer, q, k, v)


# ---- the language model ----------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the layout does the attending."""

    def __init__(self, config):
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_width = D // H
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, K * self.head_width)
        self.v_proj = nn.Linear(D, K * self.head_width)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout, layer: int) -> Tensor:
        q, k, v = (f(x).unflatten(1, (-1, self.head_width)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(torch.cat([q, k], dim=1), rope).split([q.shape[1], k.shape[1]], dim=1)
        out = layout.attend(layer, q, k, v)  # (N, H, d)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)  # computes in fp32 inside
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, layout, recompute: bool = False) -> Tensor:
        """Embeddings x (N, D), positions (3, N) -> hidden states (N, D). recompute: keep only each layer's input for
        the backward pass."""
        rope = rotations(positions, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            if isinstance(layout, Cache):  # the prefill has gathered the weights: FSDP's hooks would cost more than the layer
                x = layer.forward(x, rope, layout, i)
            elif recompute:
                x = checkpoint(layer, x, rope, layout, i, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, layout, i)
        return self.norm(x)


def rotations(positions: Tensor, config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """TMRoPE: cosines and sines (N, 1, d/2) of positions (3, N). Each of the d/2 frequencies turns with one axis: the
    first section with time, the second with height, the third with width."""
    d = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    frequencies = rope["rope_theta"] ** -(torch.arange(0, d, 2, device=positions.device) / d)  # (d/2,)
    sections = zip(positions, frequencies.split(rope["mrope_section"]))
    angles = torch.cat([axis[:, None] * part for axis, part in sections], dim=-1)  # (N, d/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_i, x_(i + d/2)) of x (N, H, d)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---- low-rank adapters, and weights that are not always whole ---------------------------------------------------

class Adapted(nn.Linear):
    """A frozen linear map with a trained one of low rank beside it (LoRA, arXiv 2106.09685): y = W x + b + 2 U D x. U begins as
    zeros, so the whole begins as W; the factor 2 is the usual alpha of twice the rank. U and D are float32."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.on = linear.weight, linear.bias, True
        down = torch.randn(rank, self.in_features, generator=generator) * self.in_features ** -0.5
        self.down = nn.Parameter(down.to(self.weight.device))  # (rank, in)
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))  # (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 2 * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) if self.on else y

    def merged(self) -> Tensor:
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


@contextmanager
def gathered(thinker: "Thinker"):
    """Inside, weights that are sharded (FSDP) are whole on every process; all have to enter together."""
    parts = [module for module in thinker.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


# ---- from hidden states to tokens ------------------------------------------------------------------------------

def head_logits(hidden: Tensor, head_weight: Tensor, suppressed: Tensor) -> Tensor:
    """hidden (N, D) -> logits (N, V) in fp32; suppressed ids get -inf and so drop out of every softmax."""
    return F.linear(hidden, head_weight).float().index_fill(-1, suppressed, -torch.inf)


def token_logprobs(hidden: Tensor, head_weight: Tensor, targets: Tensor, suppressed: Tensor,
                   temperature: float = 1.0, chunk: int = HEAD_TOKENS) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats, without gradient) of N tokens: hidden (N, D), targets (N,) -> (N,), (N,).

    Logits exist for one chunk at a time, in the backward pass too, where they are computed again.
    """
    def part(hidden, targets):
        logp = (head_logits(hidden, head_weight, suppressed) / temperature).log_softmax(-1)  # (chunk, V)
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        return logp.gather(-1, targets[:, None])[:, 0], entropy

    parts = [checkpoint(part, h, t, use_reentrant=False, preserve_rng_state=False)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keeps the top_k likeliest tokens (0: all), of these the fewest that hold a share of at least top_p."""
    if top_k == 0 and top_p == 1.0:
        return probs
    ranked, order = probs.sort(dim=-1, descending=True)
    if top_k:
        ranked[:, top_k:] = 0
    likelier = ranked.cumsum(-1) - ranked  # mass in front of each token
    ranked[likelier >= top_p * ranked.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter(-1, order, ranked)


def sample(logits: Tensor, generators: list[torch.Generator], n: int, rows: Tensor, temperature: float, top_k: int,
           top_p: float) -> Tensor:
    """One token for each row of logits (R, V) -> (R,). Each of B prompts' generators draws for all its n rows, of which
    `rows` (R,) are left: what they draw does not depend on who has left."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = truncate((logits / temperature).softmax(-1), top_k, top_p)
    # A race: token i arrives after Exp(1) / p_i, and is the first with probability p_i. Unlike a multinomial draw it
    # needs no look at the numbers from the CPU.
    races = [probs.new_empty(n, probs.shape[1]).exponential_(generator=g) for g in generators]
    return (probs / torch.cat(races)[rows]).argmax(-1)


class Recorded:
    """A function of tensors whose kernels are recorded (a CUDA graph) and then launched all at once: one by one, the launches
    for a token of the 7B take longer than the work. What is no tensor stays as it was at the recording."""

    def __init__(self, function, *arguments: Tensor):
        self.arguments, self.graph = [x.clone() for x in arguments], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads, NCCL's, may go on
            self.result = function(*self.arguments)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for place, x in zip(self.arguments, arguments):
            place.copy_(x)
        self.graph.replay()
        return self.result


RECORDERS = {"cuda": Recorded}  # by kind of device; on others a step is simply computed


# ---- the whole -------------------------------------------------------------------------------------------------

class Thinker(nn.Module):
    """Two frozen towers, the language model and its head, under the names of the released checkpoints.

    gradient_checkpointing: compute each layer again in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: Qwen2_5OmniThinkerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.audio_tower = Qwen2_5OmniAudioEncoder(config.audio_config).requires_grad_(False)
        self.visual = Qwen2_5OmniVisionEncoder(config.vision_config).requires_grad_(False)
        self.model = LanguageModel(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        self.audio_tower.eval()
        self.visual.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.visual.parameters()).device  # the language model may rest elsewhere

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def suppressed(self) -> Tensor:
        """Ids that only a prompt may hold: media placeholders and their brackets. Were they sampled, the next forward
        would look for media that is not there."""
        names = ("image_token_index", "video_token_index", "audio_token_index", "vision_start_token_id",
                 "vision_end_token_id", "audio_start_token_id", "audio_end_token_id")
        ids = {getattr(self.config, name, None) for name in names} - {None}
        return torch.tensor([i for i in ids if i < self.config.text_config.vocab_size], device=self.device)

    def embed(self, inputs: list) -> list[Prompt]:
        """Runs each tower once over everything in a list of data.Inputs; without gradient, as the towers are frozen.

        Raises ValueError where placeholders and media disagree in number or a prompt does not end with a text token.
        """
        seen, heard = self.see(inputs), self.hear(inputs)
        prompts = []
        for i, (item, seen, heard) in enumerate(zip(inputs, seen, heard)):
            ids = item.ids.to(self.device)
            is_sound = ids == self.config.audio_token_index
            is_image = (ids == self.config.image_token_index) | (ids == self.config.video_token_index)
            slots = (is_image | is_sound).nonzero()[:, 0]  # (M,)
            for name, mask, found in (("image or video", is_image, seen), ("sound", is_sound, heard)):
                if mask.sum() != len(found):
                    raise ValueError(f"prompt {i}: {mask.sum()} {name} placeholders, but {len(found)} {name} features")
            if (is_image | is_sound)[-1]:
                raise ValueError(f"prompt {i} ends with a media placeholder; it must end with a text token")
            media = seen.new_empty(len(slots), self.config.text_config.hidden_size)
            media[is_image[slots]], media[is_sound[slots]] = seen, heard
            prompts.append(Prompt(ids, item.positions.to(self.device), slots, media))
        return prompts

    def see(self, inputs: list) -> list[Tensor]:
        """Vision features of each prompt, [(tokens, D)]; patches merge by squares, frames by pairs. Prompts that share their
        patches share the features."""
        merged = self.config.vision_config.spatial_merge_size ** 2
        features = {id(None): torch.empty(0, self.config.text_config.hidden_size, dtype=self.dtype, device=self.device)}
        given = list({id(x.patches): x for x in inputs if x.patches is not None}.values())
        for part in in_batches(given, [len(x.patches) for x in given], VISION_PATCHES):
            patches = torch.cat([x.patches for x in part]).to(self.device, self.dtype)
            grid = torch.cat([x.grid for x in part]).to(self.device)
            seen = self.visual(patches, grid_thw=grid).pooler_output.split([len(x.patches) // merged for x in part])
            features |= {id(x.patches): feature for x, feature in zip(part, seen)}
        return [features[id(x.patches)] for x in inputs]

    def hear(self, inputs: list) -> list[Tensor]:
        """Sound features of each prompt, [(tokens, D)]; a convolution and a pooling halve the mel frames each."""
        given = [x.mel for x in inputs if x.mel is not None]
        halved = [0 if x.mel is None else (x.mel.shape[1] + 1) // 2 for x in inputs]
        features = torch.empty(0, self.config.text_config.hidden_size, dtype=self.dtype, device=self.device)
        if given:
            frames = torch.tensor([mel.shape[1] for mel in given], device=self.device)
            mel = torch.cat(given, dim=1).to(self.device, self.dtype)  # (bins, frames of all)
            features = self.audio_tower(mel, feature_lens=frames, aftercnn_lens=(frames + 1) // 2).last_hidden_state
        return features.split([count // 2 for count in halved])

    def look_up(self, prompt: Prompt) -> Tensor:
        """Embeddings (P + 1, D) of a prompt: trained where there is text, tower features elsewhere."""
        x = self.model.embed_tokens(prompt.ids)
        return x.index_copy(0, prompt.slots, prompt.media.to(x.dtype))

    def run_rows(self, x: list[Tensor], positions: list[Tensor], layout: Rows) -> Tensor:
        """Right-pads B sequences, x [(S_b, D)] and positions [(3, S_b)], and runs them -> hidden states (B, S, D)."""
        x = pad_sequence(x, batch_first=True)  # (B, S, D)
        positions = pad_sequence([p.T for p in positions], batch_first=True)  # (B, S, 3)
        hidden = self.model(x.flatten(0, 1), positions.flatten(0, 1).T, layout, self.recompute)
        return hidden.unflatten(0, (len(x), -1))

    @property
    def recompute(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    # -- three uses ----------------------------------------------------------------------------------------------

    def logits(self, prompt: Prompt) -> Tensor:
        """Logits (P + 1, V) at every position of one prompt, nothing suppressed: for tests and inspection."""
        return F.linear(self.run_rows([self.look_up(prompt)], [prompt.positions], Rows(1))[0], self.lm_head.weight)

    def forward(self, prompts: list[Prompt], completions: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (B, C), nats, of one completion for each of B prompts: supervised training.

        completions: (B, C) int64, right-padded with any ordinary id; what stands there is computed and is yours to
        mask.
        """
        B, C = completions.shape
        completions = completions.to(self.device)
        text = self.model.embed_tokens(completions[:, :-1])  # (B, C - 1, D)
        x = [torch.cat([self.look_up(p), t]) for p, t in zip(prompts, text)]
        positions = [torch.cat([p.positions[:, :-1], p.row_positions(C)], dim=1) for p in prompts]
        hidden = self.run_rows(x, positions, Rows(B))  # (B, S, D)
        hidden = torch.stack([h[len(p.ids) - 1:][:C] for h, p in zip(hidden, prompts)])  # (B, C, D)
        return self.score(hidden, completions, temperature)

    def logprobs(self, prompt: Prompt, completions: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (G, C), nats, of G completions of one prompt, whose prefix is computed once.

        completions: (G, C) int64, right-padded as in forward.
        """
        (G, C), P = completions.shape, len(prompt.ids) - 1
        completions = completions.to(self.device)
        prefix = self.look_up(prompt)[:-1]  # (P, D)
        own = self.model.embed_tokens(torch.cat([prompt.ids[-1:].expand(G, 1), completions[:, :-1]], dim=1))
        x = torch.cat([prefix, own.flatten(0, 1)])  # (P + G C, D)
        positions = torch.cat([prompt.positions[:, :-1], prompt.row_positions(C).repeat(1, G)], dim=1)
        hidden = self.model(x, positions, SharedPrefix(P, G), self.recompute)
        return self.score(hidden[P:].unflatten(0, (G, C)), completions, temperature)

    def score(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """token_logprobs for hidden (B, C, D) and targets (B, C)."""
        logp, entropy = token_logprobs(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.suppressed,
                                       temperature)
        return logp.view(targets.shape), entropy.view(targets.shape)

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], n: int, max_new_tokens: int, *, eos_ids: set[int],
                 temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
                 seeds: list[int] | None = None) -> list[list[Tensor]]:
        """Samples n completions of each of B prompts: B lists of n int64 tensors on the CPU, each up to and including
        its first token of eos_ids, where it has one.

        temperature 0 takes the likeliest token. seeds: one per prompt; a prompt's samples depend on nothing else in
        the batch. None draws them from torch's global generator.
        """
        seeds = torch.randint(2 ** 62, (len(prompts),)).tolist() if seeds is None else seeds
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        suppressed, eos = self.suppressed, torch.tensor(sorted(eos_ids), device=self.device)
        cache, recorder = self.prefill(prompts, n, max_new_tokens), RECORDERS.get(self.device.type)

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            """The next token of R rows, (R,), and its positions (3, R) -> logits (R, V) of the one after it."""
            hidden = self.model(self.model.embed_tokens(tokens), positions, cache)  # (R, D)
            return head_logits(hidden, self.lm_head.weight, suppressed)

        positions = torch.stack([p.row_positions(max_new_tokens) for p in prompts], dim=1)  # (3, B, C)
        rows = torch.arange(len(prompts) * n, device=self.device).view(-1, n)  # (B, m): those not yet left, R = B m
        tokens = torch.stack([p.ids[-1] for p in prompts])[:, None].expand_as(rows)  # (B, m)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        drawn = rows.new_zeros(rows.numel(), max_new_tokens)  # (B n, C)
        run, stale = step, True
        for c in range(max_new_tokens):
            stale |= cache.advance(c, recorder is not None)
            now = tokens.flatten(), positions[:, :, c].repeat_interleave(cache.n, dim=1)
            if recorder and stale and c:  # the first step goes unrecorded: libraries set themselves up in it
                run, stale = recorder(step, *now), False
            tokens = sample(run(*now), generators, n, rows.flatten(), temperature, top_k, top_p).view_as(rows)
            drawn[:, c].index_copy_(0, rows.flatten(), tokens.flatten())
            ended |= torch.isin(tokens, eos)
            if (c + 1) % FINISH_CHECK:
                continue
            left = int((~ended).sum(1).max())  # the only wait for the device in this loop
            if left == 0:
                break
            if left <= cache.n // 2:  # ended rows leave, as far as all prompts can keep equally many
                staying = ended.int().argsort(dim=1, stable=True)[:, :left]  # (B, left)
                cache.keep(staying)
                rows, tokens, ended = (x.gather(1, staying) for x in (rows, tokens, ended))
                stale = True
        completions = [row[:first_end(row.tolist(), eos_ids)] for row in drawn[:, :c + 1].cpu()]
        return [completions[i:i + n] for i in range(0, len(completions), n)]

    def prefill(self, prompts: list[Prompt], n: int, room: int) -> Cache:
        """Computes every prompt's prefix once, similar lengths together."""
        lengths = [len(p.ids) - 1 for p in prompts]
        cache = Cache(lengths, n, room, self.config.text_config, like=self.look_up(prompts[0]))
        for index in prefill_batches(lengths):
            x = [self.look_up(prompts[i])[:-1] for i in index]
            positions = [prompts[i].positions[:, :-1] for i in index]
            self.run_rows(x, positions, Prefill(len(index), cache, index))
        return cache

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what a plain checkpoint holds, one after the other: sharded weights gathered, adapters merged."""
        adapted = {name: module for name, module in self.named_modules() if isinstance(module, Adapted)}
        for name, tensor in self.state_dict().items():
            owner, _, kind = name.rpartition(".")
            if owner not in adapted or kind == "bias":
                yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            elif kind == "weight":
                yield name, adapted[owner].merged()

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> "Thinker":
        """Reads a Qwen2.5-Omni directory (of which the Thinker is taken) or a Thinker-only one.

        Every tensor is copied straight to its place, so at no time do two copies of the model exist.
        Raises FileNotFoundError or BadInput naming the path and what was expected there.
        """
        path = Path(path)
        config = read_config(path)
        with reading(path / "config.json"), torch.device("meta"):
            model = cls(config)
            rotations(torch.zeros(3, 1), config.text_config, dtype)  # a rotary setting that is missing shows here
        # Two buffers are computed, not stored: made of nothing above, they are built again for real.
        rotary, sinusoids = model.visual.rotary_pos_emb, model.audio_tower.positional_embedding
        model.visual.rotary_pos_emb = type(rotary)(model.visual.config).to(device)
        model.audio_tower.positional_embedding = type(sinusoids)(sinusoids.length, sinusoids.channels).to(device)
        for file, shard in read_shards(path, dtype, device):
            try:
                unexpected = model.load_state_dict(shard, strict=False, assign=True).unexpected_keys
            except RuntimeError as error:  # shapes
                raise BadInput(f"{file} does not fit {path / 'config.json'} ({one_line(error)})") from None
            if unexpected:
                raise BadInput(f"{file} holds a weight that a Thinker does not have: {unexpected[0]}")
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise BadInput(f"{path} lacks {len(missing)} of the Thinker's weights, the first is {missing[0]}; {POLICY_EXPECTED}")
        return model

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None,
                        max_shard_size: str = "5GB") -> None:
        """Writes a Thinker-only directory that from_pretrained, here and in transformers, reads.
        state_dict: whole tensors, where the model's own are sharded."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        Path(path).mkdir(parents=True, exist_ok=True)
        self.config.architectures = ["Qwen2_5OmniThinkerForConditionalGeneration"]
        self.config.save_pretrained(path)
        save_torch_state_dict(state, path, max_shard_size=max_shard_size)


def first_end(row: list[int], eos_ids: set[int]) -> int:
    """Length of a completion up to and including its first end token."""
    return next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))


def in_batches(items: list, sizes: list[int], most: int) -> list[list]:
    """Consecutive items in batches whose sizes add up to at most `most` (a single larger item may exceed it)."""
    batches, total = [], 0
    for item, size in zip(items, sizes):
        if batches and total + size <= most:
            batches[-1].append(item)
            total += size
        else:
            batches.append([item])
            total = size
    return batches


def prefill_batches(lengths: list[int]) -> list[list[int]]:
    """Groups prompts by length, so that no padded batch exceeds PREFILL_TOKENS (a single longer prompt may)."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # ascending: i is the longest of its batch
        if batches and lengths[i] * (len(batches[-1]) + 1) <= PREFILL_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def read_config(path: Path) -> Qwen2_5OmniThinkerConfig:
    """The Thinker's part of config.json; old spellings of the rotary settings are translated by transformers."""
    check_policy_folder(path)
    whole = read_json(path / "config.json")
    config = whole.get("thinker_config", whole)
    if not isinstance(config, dict) or config.get("model_type") != "qwen2_5_omni_thinker":
        raise BadInput(f"{path}/config.json describes a {whole.get('model_type')} model; expected qwen2_5_omni with "
                       f"a thinker_config, or qwen2_5_omni_thinker")
    with reading(path / "config.json"):
        return Qwen2_5OmniThinkerConfig.from_dict(config)


def read_shards(path: Path, dtype: torch.dtype, device) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """(file, the Thinker's weights in it), file by file, without the prefix "thinker."; the full model's other parts are
    left out."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not index.is_file() and not single.is_file():
        raise FileNotFoundError(f"{path} holds no weights; expected {single.name}, or {index.name} and its shards")
    files = [single]
    if index.is_file():
        named = read_json(index)
        with reading(index):
            files = [path / name for name in sorted(set(named["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though {index.name} names it: incomplete download?")
        try:
            with safe_open(file, framework="pt") as shard:  # maps the file; copy=True lets go of the mapping
                weights = {name.removeprefix("thinker."): shard.get_tensor(name).to(device, dtype, copy=True)
                           for name in shard.keys() if not name.startswith(("talker.", "token2wav."))}
        except SafetensorError as error:
            raise BadInput(f"not a safetensors file: {file} ({one_line(error)}); incomplete download?") from None
        yield file, weights

"""Group relative policy optimisation (GRPO) through two systems, written out.

One step, numbered as in the README; `collect` does 2 to 7, `accumulate_gradients` does 8, train.py calls them:

    1 draw clips                      5 SAM2 tracks the boxes
    2 roll out G completions each     6 reward terms, then one number
    3 read keyframes, descriptions    7 advantages within the group
    4 System 2 grounds them           8 loss over tokens, backward

Letters: B clips, G completions of a group, C tokens of the longest completion, T frames, H W pixels.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import answer_text, is_null
from model import gathered
from rewards import avs_reward, combine, format_reward, image_rewards, length_bonus, mask_box, question_reward, vos_rewards
from segment import frames_to_ground, ground, track_groups


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm: advantages, divergence, loss
# ---------------------------------------------------------------------------------------------------------------------
def group_advantages(rewards, group_size, scale=True, epsilon=1e-4):
    """(B * G,) rewards, group after group -> (B * G,) advantages: (r - mean) / (std + epsilon) within each group, with the
    unbiased std. `scale=False` leaves the std out (Dr. GRPO, arXiv 2503.20783).

    Raises ValueError for a group of one, whose std does not exist, and where the groups do not fill up.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not groups of {group_size}, or a group is smaller than 2")
    groups = torch.as_tensor(rewards, dtype=torch.float64).view(-1, group_size)     # (B, G); the mean of equals is exact enough
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + epsilon) if scale else centred).flatten().float()


def kl_divergence(logp, reference_logp, kind="k3"):
    """Per-token estimates of KL(policy || reference) from tokens the policy drew; any shape.
    k1 = logp - ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1 (method.md, 2). Not clamped: that would stop the gradient just
    where the policy has drifted farthest."""
    k1 = logp - reference_logp
    if kind == "k1":
        return k1
    return k1 ** 2 / 2 if kind == "k2" else torch.exp(-k1) + k1 - 1


def policy_loss(logp, advantages, mask, old_logp=None, reference_logp=None, *, beta=0.04, kl="k3", clip_low=0.2, clip_high=0.2,
                ratio="token", average="completion", longest=None, totals=None):
    """The loss (a scalar with gradient) of one group, and its sums for the log.

    logp, old_logp, reference_logp (G, C); advantages (G,); mask (G, C), 1 on a completion's tokens to its first end token.
    old_logp     log-probabilities at rollout; None: the policy has not moved since, the ratio is 1 and carries the gradient.
    beta         weight of the KL term; 0 needs no reference_logp.
    clip_low/high  the ratio counts between 1 - clip_low and 1 + clip_high (clip-higher, DAPO: a larger clip_high).
    ratio        "token", or "sequence": one ratio a completion, the geometric mean of its tokens' (GSPO, arXiv 2507.18071).
    average      "completion": mean over a completion's tokens, then over completions (as published); "token": mean over all
                 tokens (DAPO, arXiv 2503.14476); "constant": sum over tokens / (completions * longest) (Dr. GRPO).
    totals       (completions, tokens) of the whole batch, of which this group is a part; None: the group is all of it.
    """
    if old_logp is None:
        old_logp = logp.detach()
    lengths = mask.sum(1)                                                                       # (G,)
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)          # padding may hold anything: infinity times 0 is NaN
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(logp)
    ratios, A = log_ratio.exp(), advantages[:, None]
    gain = torch.minimum(ratios * A, ratios.clamp(1 - clip_low, 1 + clip_high) * A)             # (G, C)
    divergence = torch.zeros_like(logp)
    if reference_logp is not None:
        divergence = kl_divergence(*(torch.where(mask > 0, x, 0.0) for x in (logp, reference_logp)), kl)
    per_token = -(gain - beta * divergence) * mask
    completions, tokens = totals if totals is not None else (len(logp), int(mask.sum()))
    weights = {"completion": lambda: 1 / (lengths * completions), "token": lambda: torch.full_like(lengths, 1 / tokens),
               "constant": lambda: torch.full_like(lengths, 1 / (completions * longest))}[average]()      # (G,)
    with torch.no_grad():
        sums = dict(kl=(divergence * mask).sum(), clipped_low=((ratios < 1 - clip_low) & (A < 0) & (mask > 0)).sum(),
                    clipped_high=((ratios > 1 + clip_high) & (A > 0) & (mask > 0)).sum())
    return (per_token * weights[:, None]).sum(), sums


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Systems:
    """Who works together. The reference is the frozen copy of the policy and, as that, System 2. Its towers are always there; for
    all else it is asked `with bring(reference)`: between, its weights may rest elsewhere, or be the policy's."""
    policy: torch.nn.Module
    reference: torch.nn.Module
    processor: object
    tracker: object
    bring: Callable = gathered


@dataclass
class Group:
    """One clip's G completions, and what became of them."""
    prompt: object                # model.Prompt
    completions: Tensor           # (G, C) token ids, right-padded
    mask: Tensor                  # (G, C) float, 1 on tokens
    texts: list                   # G
    terms: list                   # G dicts of reward terms
    rewards: np.ndarray           # (G,)
    advantages: Tensor            # (G,)
    reference_logp: Tensor | None           # (G, C); None at beta 0
    fault: str = ""               # why the clip could not be read: then a blank one stands in, and nothing of this counts
    old_logp: Tensor | None = None          # (G, C) at rollout; set when the batch is used more than once

    @property
    def size(self):
        """(completions, tokens) that count in the loss."""
        return len(self.completions), int(self.mask.sum())


@dataclass
class Stopwatch:
    """Seconds spent in each phase; `lap` books the time since the last lap."""
    seconds: dict = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase):
        if torch.cuda.is_available():
            torch.cuda.synchronize()         # a handful of waits a step, so that phases are not booked on one another
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def collect(systems, clips, inputs, seeds, settings, watch):
    """Steps 2 to 7 for B clips -> B Groups. inputs: their prompts; seeds: one whole number per clip, from which its samples
    follow, whatever else is in the batch."""
    # 2. roll out G completions for each clip
    prompts = systems.reference.embed(inputs)        # the frozen towers run once, for rollout, policy and reference alike
    watch.lap("towers")
    with gathered(systems.policy):
        drawn = systems.policy.generate(prompts, settings.group, settings.max_new_tokens, eos_ids=systems.processor.eos_ids,
                                        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, seeds=seeds)
    completions = [pad_sequence(rows, batch_first=True) for rows in drawn]                          # (G, C) each
    texts = [[systems.processor.decode(ids) for ids in group] for group in drawn]
    watch.lap("rollout")

    # 3. read the keyframes and descriptions of every completion: {frame: description}
    chosen = [[frames_to_ground(clip, text) for text in group] for clip, group in zip(clips, texts)]

    # 4. System 2 grounds them: {frame: boxes}; as the reference it also says how likely it finds the completions, for step 8
    with systems.bring(systems.reference):
        boxes = ground(systems.reference, systems.processor, clips, chosen)
        watch.lap("grounding")
        with torch.no_grad():
            reference_logp = [systems.reference.logprobs(prompt, ids, settings.temperature)[0] if settings.beta else None
                              for prompt, ids in zip(prompts, completions)]                         # (G, C) each
    watch.lap("reference")

    # 5. SAM2 tracks all boxes at once; a batch is of one task
    tracked = [[None] * settings.group for _ in clips]              # of what nothing looks at
    if settings.consistency and clips[0].task == "vos":
        tracked = track_groups(systems.tracker, clips, boxes)
    watch.lap("masks")

    # 6. reward terms, then one number; 7. advantages within the group
    groups = []
    for i, (clip, x) in enumerate(zip(clips, inputs)):
        terms = [reward_terms(clip, x.scale, *answer) for answer in zip(texts[i], boxes[i], tracked[i])]
        lengths = torch.tensor([len(row) for row in drawn[i]])
        rewards = total_rewards(terms, lengths.tolist(), settings)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()                    # (G, C)
        advantages = group_advantages(rewards, settings.group, scale=settings.scale_by_std)
        groups.append(Group(prompts[i], completions[i], mask, texts[i], terms, rewards, advantages, reference_logp[i],
                            clip.fault))
    watch.lap("rewards")
    return groups


def reward_terms(clip, scale, text, boxes, tracked):
    """Every reward term of one completion by name, and whether it could not be used at all (`malformed`).
    scale: source pixels per pixel of the picture that the completion's own boxes are in, (x, y)."""
    answer = answer_text(text)
    if clip.task == "vos":
        terms, readable = vos_rewards(text, clip.masks, boxes, tracked, clip.fps), is_null(answer) or bool(boxes)
    elif clip.task == "avs":
        terms, readable = dict(first_box=first_frame_reward(answer, boxes, clip.masks)), bool(answer)
    elif clip.task == "image":
        box, points = (np.asarray(clip.truth[k]) / np.resize(scale, n) for k, n in (("box", 4), ("points", (2, 2))))
        terms = image_rewards(text, tuple(box), points)
        terms["strict"] = terms.pop("format")                    # the answer's own form, beside that of the whole text
        readable = terms["strict"] > 0
    else:
        terms, readable = dict(accuracy=question_reward(clip.truth["type"], text, clip.truth["solution"])), bool(answer)
    return terms | dict(format=format_reward(text), malformed=float(not readable))


def first_frame_reward(answer, boxes, masks):
    """Reward of Ref-AVS (method.md, 3): IoU of the first box found on frame 0 with the true one; where nothing is to be found
    (ours), 1 for saying so. masks bool [O, T, H, W]."""
    true = mask_box(masks[:, 0].any(0))
    if true is None:
        return float(is_null(answer))
    return avs_reward(next(iter(boxes.get(0, ())), None), true)


def total_rewards(terms, lengths, settings):
    """(G,) rewards of a group from its terms: format + the accuracy terms, weighted for masks (+ length control)."""
    weights = dict(keyframe=settings.keyframe, saliency=settings.saliency, alignment=settings.alignment,
                   consistency=settings.consistency)
    accuracy = np.array([combine(t, weights, settings.clip_reward) if "base" in t
                         else sum(v for k, v in t.items() if k not in ("format", "malformed")) for t in terms])
    bonus = length_bonus(accuracy, lengths) if settings.length_control else 0.0
    return np.array([t["format"] for t in terms]) + accuracy + bonus


def left_out(group, settings):
    """Whether a group is no part of the loss."""
    return bool(group.fault) or (settings.skip_equal and equal_rewards(group))


def equal_rewards(group):
    """Whether a group teaches nothing: its completions all earned the same."""
    return float(np.ptp(group.rewards)) < 1e-8


def accumulate_gradients(systems, group, settings, totals, scale, first, keep):
    """Step 8 for one group: its share of the batch's loss, backward. Returns sums for the log.

    totals  (completions, tokens) of the whole batch over all processes. scale: factor on the loss, so that gradients
    averaged over processes become the sum. first: the batch's first update, from which the ratio of later ones starts
    (keep says that there will be some).
    """
    device = group.prompt.ids.device
    mask, advantages = group.mask.to(device), group.advantages.to(device)
    logp, entropy = systems.policy.logprobs(group.prompt, group.completions, settings.temperature)       # (G, C) each
    loss, sums = policy_loss(logp, advantages, mask, group.old_logp, group.reference_logp, beta=settings.beta, kl=settings.kl,
                             clip_low=settings.clip_low, clip_high=settings.clip_high, ratio=settings.ratio,
                             average=settings.average, longest=settings.max_new_tokens, totals=totals)
    if left_out(group, settings):
        loss = loss.nan_to_num() * 0.0       # still a backward pass, so that all processes run the same collectives
    (loss * scale).backward()
    if first and keep:
        group.old_logp = logp.detach()
    sums |= dict(loss=loss.detach(), entropy=(entropy * mask).sum(), tokens=mask.sum())
    return {k: v * (not group.fault) for k, v in sums.items()}

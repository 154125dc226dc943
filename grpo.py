"""Group relative policy optimisation (GRPO) through two systems.

GRPO in five sentences. For each prompt the policy draws a group of G completions. Each gets one number, its
reward. Its advantage is how far that lies above the mean of its own group, in units of the group's standard
deviation: no value network is needed. The loss makes the tokens of completions with a positive advantage
likelier and the others less likely, and holds the policy near a frozen reference by a KL term. Where a batch
is used more than once, the ratio to the policy that drew it is clipped, as in PPO.

What differs from the published recipe (arXiv 2505.20256, appendix), and why:

* Sampling is neutral (top_p is 1, not 0.95). Otherwise one distribution is sampled and another is trained.
* The log-ratio in the KL term is not clamped. A clamp has no gradient where the policy has drifted farthest.
* A group whose clip could not be read goes through the step with a blank clip and counts for nothing, because
  all processes must take part in every step.
* Settings offer variants: the mean over all tokens, clip-higher, and no groups of equal rewards (DAPO, arXiv
  2503.14476); no std, and a constant length (Dr. GRPO, arXiv 2503.20783); one ratio for each sequence (GSPO,
  arXiv 2507.18071). And a second turn, in which the policy also learns to ground (ReVSeg, arXiv 2512.02835).

The step, numbered as in the README. `collect` does 2 to 7, `accumulate_gradients` does 8:

    1 draw clips                      5 SAM2 tracks the boxes
    2 roll out G completions each     6 reward terms, then one number
    3 read keyframes, descriptions    7 advantages within the group
    4 System 2 grounds them           8 loss over tokens, backward

Letters: B clips, G completions of a group, C tokens of the longest completion, T frames, H W pixels.
"""
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import TASKS, Clip, Inputs, Processor, frames_to_ground, prompt_inputs
from model import Prompt, Thinker
from rewards import reward_terms, total_rewards
from segment import GROUNDING_TOKENS, System2, Tracker, ground, track_similarity


# ---- the algorithm: advantages, divergence, loss ---------------------------------------------------
def group_advantages(rewards, group_size: int, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Rewards (B G,), group after group -> advantages (B G,): (r - mean) / (std + epsilon) within each group.

    The std is the unbiased one; scale=False leaves it out (Dr. GRPO). Raises ValueError for a group of one,
    whose std does not exist, and where the groups do not fill up.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not groups of {group_size}, "
                         f"or a group is smaller than 2")
    # float64: the mean of equal rewards is exact enough to leave no advantage.
    groups = torch.as_tensor(rewards, dtype=torch.float64).view(-1, group_size)    # (B, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + epsilon)
    return advantages.flatten().float()


def kl_divergence(logp: Tensor, reference_logp: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens that the policy drew; any shape.

    k1 = logp - ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1 (published). Raises ValueError for another kind.
    """
    k1 = logp - reference_logp
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1 ** 2 / 2
    if kind == "k3":
        return torch.exp(-k1) + k1 - 1
    raise ValueError(f"unknown estimate of the KL divergence: {kind}")


def policy_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Ratios (G, C) of the policy to the one that drew the tokens: of each token, or of each sequence.

    A sequence's ratio is the geometric mean of its tokens' (GSPO). Raises ValueError for another kind.
    """
    # Padding may hold anything, and infinity times 0 is NaN.
    log_ratio = torch.where(mask > 0, logp - old_logp, 0.0)
    if kind == "token":
        return log_ratio.exp()
    if kind == "sequence":
        mean = log_ratio.sum(1) / mask.sum(1)
        return mean[:, None].expand_as(logp).exp()
    raise ValueError(f"unknown ratio: {kind}")


def token_weights(mask: Tensor, average: str, completions: int, tokens: int, longest: int | None) -> Tensor:
    """Weight (G,) in the loss of each token of a completion.

    completions, tokens: numbers of them in the whole batch. longest: the most tokens a completion can have,
    needed for "constant". Raises ValueError for another average.
    """
    lengths = mask.sum(1)
    if average == "completion":
        # As published: the mean over a completion's tokens, then over completions.
        return 1 / (lengths * completions)
    if average == "token":
        # DAPO: the mean over all tokens.
        return torch.full_like(lengths, 1 / tokens)
    if average == "constant":
        # Dr. GRPO: the sum over tokens, divided by a constant length, then the mean over completions.
        return torch.full_like(lengths, 1 / (completions * longest))
    raise ValueError(f"unknown average: {average}")


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logp: Tensor | None = None,
    reference_logp: Tensor | None = None,
    *,
    beta: float = 0.04,
    kl: str = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: str = "token",
    average: str = "completion",
    longest: int | None = None,
    totals: tuple[float, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one group, a scalar with gradient, and its sums for the log.

    logp, old_logp, reference_logp (G, C); advantages (G,); mask (G, C), 1 up to the first end token.
    old_logp   log-probabilities at rollout. None: the policy has not moved since, the ratio is 1 and carries
               the gradient.
    beta       weight of the KL term; 0 needs no reference_logp.
    kl         its estimate: k1, k2 or k3.
    clip_low   the ratio is clipped at 1 - clip_low from below
    clip_high  and at 1 + clip_high from above (DAPO: a larger one).
    ratio      "token" or "sequence".
    average    "completion", "token" or "constant"; the last divides by `longest` tokens a completion.
    totals     (completions, tokens) of the whole batch, of which this group is a part. None: it is all of it.
    """
    if old_logp is None:
        old_logp = logp.detach()
    ratios = policy_ratio(logp, old_logp, mask, ratio)    # (G, C)
    A = advantages[:, None]    # (G, 1)
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratios * A, clipped * A)    # (G, C)
    divergence = torch.zeros_like(logp)
    if reference_logp is not None:
        policy_part = torch.where(mask > 0, logp, 0.0)
        reference_part = torch.where(mask > 0, reference_logp, 0.0)
        divergence = kl_divergence(policy_part, reference_part, kl)
    per_token = -(gain - beta * divergence) * mask
    completions, tokens = totals or (len(logp), int(mask.sum()))
    weights = token_weights(mask, average, completions, tokens, longest)
    with torch.no_grad():
        low = (ratios < 1 - clip_low) & (A < 0) & (mask > 0)
        high = (ratios > 1 + clip_high) & (A > 0) & (mask > 0)
        sums = dict(kl=(divergence * mask).sum(), clipped_low=low.sum(), clipped_high=high.sum())
    return (per_token * weights[:, None]).sum(), sums


# ---- the models, and a group -----------------------------------------------------------------------
@dataclass
class Systems:
    """Policy (System 1), frozen reference, System 2 and SAM2.

    The reference's towers are always on the device, and the policy shares them. Inside
    `with policy_whole():` or `with reference_awake():` all weights of that model are on the device. Outside,
    the language model may be sharded over processes, rest in host memory, or, with adapters, be the policy's.
    """
    policy: Thinker
    reference: Thinker
    system2: System2
    processor: Processor
    tracker: Tracker
    policy_whole: Callable = nullcontext
    reference_awake: Callable = nullcontext


@dataclass
class Group:
    """One clip's G completions and what they earned."""
    prompt: Prompt
    completions: Tensor              # (G, C) token ids, right-padded
    mask: Tensor                     # (G, C) float, 1 on tokens
    texts: list[str]                 # G
    terms: list[dict]                # G dicts of reward terms
    rewards: np.ndarray              # (G,)
    advantages: Tensor               # (G,)
    reference_logp: Tensor | None    # (G, C); None at beta 0
    longest: int                     # most tokens that a completion may have
    # For people to look at; the loss needs none of it.
    clip: Clip | None                # None once it was looked at, or where nobody will
    boxes: list[dict]                # G dicts {frame: boxes in source pixels}
    seed: int                        # of the rollout
    fault: str = ""                  # why the clip could not be read; then nothing of the group counts
    old_logp: Tensor | None = None   # (G, C) at rollout; set where a batch has several updates
    weight: float = 1.0              # of its loss
    second: "Group | None" = None    # of the second turn, if there is one

    @property
    def size(self) -> tuple[int, int]:
        """(completions, tokens) that count in the loss."""
        return len(self.completions), int(self.mask.sum())


# ---- the step --------------------------------------------------------------------------------------
def roll_out(systems: Systems, prompts: list[Prompt], n: int, temperature: float, seeds: list[int], settings):
    """Step 2: n completions of each of B prompts -> (B lists of n tensors of tokens, B lists of n texts).

    seeds: one whole number per prompt. A prompt's samples depend on its seed, not on the rest of the batch.
    """
    with systems.policy_whole():
        drawn = systems.policy.generate(
            prompts, n, settings.max_new_tokens, eos_ids=systems.processor.eos_ids, temperature=temperature,
            top_p=settings.top_p, top_k=settings.top_k, seeds=seeds)
    texts = []
    for rows in drawn:
        texts.append([systems.processor.decode(ids) for ids in rows])
    return drawn, texts


def read_keyframes(clips: list[Clip], texts: list[list[str]]) -> list[list[dict[int, str]]]:
    """Step 3: {frame: description} of every completion."""
    chosen = []
    for clip, group in zip(clips, texts):
        chosen.append([frames_to_ground(clip, text) for text in group])
    return chosen


def judge(systems: Systems, clips: list[Clip], inputs: list[Inputs], texts, boxes, settings, watch):
    """Steps 5 and 6: B lists of reward terms, one dict for each completion.

    texts and boxes: B lists over completions; boxes are {frame: boxes in source pixels}.
    """
    # 5. SAM2 tracks all boxes at once, if the reward looks at masks: at their J [T], no more. All clips of a
    # batch have the same task.
    watch.begin("masks")
    if settings.consistency and TASKS[clips[0].task].tracked:
        similarity = track_similarity(systems.tracker, clips, boxes)
    else:
        similarity = [[None] * len(group) for group in texts]

    # 6. Reward terms.
    watch.begin("rewards")
    terms = []
    for i, clip in enumerate(clips):
        scale = inputs[i].scale
        answers = zip(texts[i], boxes[i], similarity[i])
        terms.append([reward_terms(clip, scale, *answer) for answer in answers])
    return terms


def collect(systems: Systems, clips: list[Clip], inputs: list[Inputs], seeds: list[int], settings, watch):
    """Steps 2 to 7 for B clips and their prompts -> B Groups. seeds: as in roll_out. watch: run.log.Watch."""
    # The frozen towers run once, for rollout, policy and reference alike.
    watch.begin("towers")
    prompts = systems.reference.embed(inputs)

    # 2. Roll out G completions for each clip.
    watch.begin("rollout")
    drawn, texts = roll_out(systems, prompts, settings.group, settings.temperature, seeds, settings)
    completions = [pad_sequence(rows, batch_first=True) for rows in drawn]    # (G, C) each

    # 3. Read the keyframes and descriptions of every completion.
    watch.begin("grounding")
    chosen = read_keyframes(clips, texts)

    # 4. System 2 grounds them. The reference is awake only once in a turn, so it also gives its
    # log-probabilities of the completions here.
    reference_logp = [None] * len(clips)
    with systems.reference_awake():
        boxes = ground(systems.system2, clips, chosen)
        watch.begin("reference")
        if settings.beta:
            with torch.no_grad():
                for i, prompt in enumerate(prompts):
                    logp, _ = systems.reference.logprobs(prompt, completions[i], settings.temperature)
                    reference_logp[i] = logp    # (G, C)

    # 5 and 6. Masks and reward terms.
    terms = judge(systems, clips, inputs, texts, boxes, settings, watch)

    # 6 and 7. One reward for each completion, and advantages within the group.
    groups = []
    for i, clip in enumerate(clips):
        lengths = torch.tensor([len(row) for row in drawn[i]])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()    # (G, C)
        rewards = total_rewards(terms[i], lengths.tolist(), settings)
        advantages = group_advantages(rewards, settings.group, scale=settings.scale_by_std)
        groups.append(Group(prompts[i], completions[i], mask, texts[i], terms[i], rewards, advantages,
                            reference_logp[i], settings.max_new_tokens, clip, boxes[i], seeds[i],
                            clip.fault))
    watch.end()
    if settings.ground_weight and TASKS[clips[0].task].tracked:
        collect_grounding(systems, groups, chosen, settings, watch)
    return groups


def collect_grounding(systems: Systems, groups: list[Group], chosen, settings, watch):
    """The second turn: the policy itself answers one request of each group. Its answers are a group, too.

    These are steps 2 to 7 once more, for a picture and a description. chosen: as read_keyframes gives it.
    """
    clips = [draw_request(group, requests) for group, requests in zip(groups, chosen)]
    inputs = [prompt_inputs(systems.processor, clip) for clip in clips]
    # Other random numbers than the first turn's.
    seeds = [group.seed + 1 for group in groups]
    settings = replace(settings, max_new_tokens=GROUNDING_TOKENS)
    answers = collect(systems, clips, inputs, seeds, settings, watch)
    for group, second in zip(groups, answers):
        second.weight = settings.ground_weight
        # Nobody looks at it, and it would keep the whole clip in memory.
        second.clip = None
        group.second = second


def draw_request(group: Group, chosen: list[dict]) -> Clip:
    """One of the distinct (frame, description) that a group asks System 2 for, as a clip of that frame.

    Where it asks for nothing: frame 0, and the query itself.
    """
    clip = group.clip
    requests = sorted(set().union(*map(dict.items, chosen))) or [(0, clip.query)]
    t, description = requests[np.random.default_rng([group.seed, 2]).integers(len(requests))]
    return replace(clip, frames=clip.frames.pick([t]), masks=clip.masks[:, [t]], query=description,
                   task="grounding", truth={})


def turns_of(groups: list[Group]) -> list[list[Group]]:
    """The groups of each turn. All clips of a step have the same task, and so as many turns."""
    second = [group.second for group in groups if group.second]
    return [groups, second] if second else [groups]


def remember_policy(systems: Systems, groups: list[Group], settings):
    """Sets old_logp of the groups of all turns, before updates on parts of them move the policy."""
    with torch.no_grad():
        for turn in turns_of(groups):
            for group in turn:
                group.old_logp, _ = systems.policy.logprobs(
                    group.prompt, group.completions, settings.temperature)


def left_out(group: Group, settings) -> bool:
    """Whether a group does not count in the loss."""
    return bool(group.fault) or (settings.skip_equal and equal_rewards(group))


def equal_rewards(group: Group) -> bool:
    """Whether a group teaches nothing: its completions all earned the same."""
    return float(np.ptp(group.rewards)) < 1e-8


def accumulate_gradients(
    systems: Systems,
    group: Group,
    settings,
    totals: tuple[float, float],
    scale: float,
) -> dict[str, Tensor]:
    """Step 8 for one group: its share of the batch's loss, and the backward pass. Returns sums for the log.

    totals  (completions, tokens) of the whole batch in this turn, over all processes.
    scale   factor on the loss: the number of processes, because their gradients are averaged, not added.
    """
    device = group.prompt.ids.device
    mask = group.mask.to(device)
    # (G, C) each
    logp, entropy = systems.policy.logprobs(group.prompt, group.completions, settings.temperature)
    loss, sums = policy_loss(
        logp, group.advantages.to(device), mask, group.old_logp, group.reference_logp,
        beta=settings.beta, kl=settings.kl, clip_low=settings.clip_low, clip_high=settings.clip_high,
        ratio=settings.ratio, average=settings.average, longest=group.longest, totals=totals)
    if left_out(group, settings):
        # The backward pass still runs, so that all processes run the same collectives.
        loss = loss.nan_to_num() * 0.0
    (loss * (scale * group.weight)).backward()
    # The ratios of later updates need it.
    if settings.updates > 1 and group.old_logp is None:
        group.old_logp = logp.detach()
    sums |= dict(loss=loss.detach(), entropy=(entropy * mask).sum(), tokens=mask.sum())
    if group.fault:
        sums = {name: torch.zeros_like(value) for name, value in sums.items()}
    return sums

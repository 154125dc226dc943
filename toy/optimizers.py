"""Muon and AdamW for small models on a CPU, and a schedule of the learning rate."""
import torch
import torch.distributed as dist
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices.

    torch.optim.Muon does the same in bfloat16. CPUs emulate that: it takes longer than the rest of a step.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                self.step_shape(same, group["lr"], group["momentum"], group["weight_decay"])

    def step_shape(self, parameters, lr, momentum, weight_decay):
        """One step of all matrices of one shape, together."""
        directions = []
        for p in parameters:
            speed = self.state[p].setdefault("speed", torch.zeros_like(p))
            speed.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(speed, momentum))
        updates = orthogonal(torch.stack(directions))
        for p, update in zip(parameters, updates):
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)


def orthogonal(x):
    """Nearest half-orthogonal matrices to x (n, rows, columns), roughly: five Newton-Schulz iterations."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizers:
    """Muon for the matrices, AdamW for embeddings, head, convolutions and vectors."""

    def __init__(self, module):
        self.module = module
        matrices = []
        others = []
        for name, p in module.named_parameters():
            if p.ndim == 2 and "embed" not in name and "lm_head" not in name:
                matrices.append(p)
            else:
                others.append(p)
        adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        self.both = [Muon(matrices, lr=0.02), adam]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.both]

    def step(self, loss, scale):
        """One step down the gradient of a loss, with the learning rates times `scale`."""
        for optimizer, rate in zip(self.both, self.rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        loss.backward()
        share_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.both:
            optimizer.step()
            optimizer.zero_grad()


def share_gradients(module):
    """Averages gradients over the processes of torchrun, if there are several."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    mean = flat / dist.get_world_size()
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def ramp(step, steps, warmup, decay):
    """Share of the learning rate: up over `warmup` steps, hold, down to zero over the last share `decay`."""
    return min(1, (step + 1) / warmup, (steps - step) / (decay * steps))

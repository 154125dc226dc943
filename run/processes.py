"""Processes that train together: start, sharded weights, weights in host memory."""
import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from model import Thinker


def start_processes(device: str, minutes: float = 30.0) -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, or starts a group of one -> (rank, number of processes, own device).

    Collectives time out after 2 x minutes, and on several nodes those of FSDP after NCCL's own 10 minutes.
    `guard` reports first, because it knows the phase.
    """
    backend = "gloo"
    own = None
    if device == "cuda":
        backend = "nccl"
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    if "RANK" in os.environ:
        timeout = timedelta(minutes=2 * minutes)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun on one node keeps its store when it starts killed processes again. Without a name of its
        # own the new start could read the addresses of dead processes there.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=own)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=own)
    return dist.get_rank(), dist.get_world_size(), own or torch.device(device)


def sums_over_processes(values: dict, device: torch.device) -> dict[str, float]:
    """{name: number}, each added up over all processes, which must give the same names."""
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return dict(zip(values, numbers.tolist()))


def gather(value) -> list:
    """The values that all processes give, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- where weights rest ----------------------------------------------------------------------------
def shard(thinker: Thinker, dtype: torch.dtype, device: torch.device, hybrid: bool = True) -> None:
    """Shards the language model's weights over all processes (FSDP2).

    They are float32 at rest and `dtype` in computation. The frozen towers are left out and stay whole on
    every process: one whose clip has no sound does not run the audio tower, and no other must wait for it.
    hybrid: on several nodes each node holds all shards, and only gradients pass between nodes.
    """
    towers = {*thinker.visual.parameters(), *thinker.audio_tower.parameters()}
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Without the device's type, the mesh would take GPUs wherever there are any.
    if hybrid and 1 < local < world:
        mesh = init_device_mesh(device.type, (world // local, local), mesh_dim_names=("nodes", "local"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("local",))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = dict(mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for layer in thinker.model.layers:
        fully_shard(layer, **options)
    fully_shard(thinker, ignored_params=towers, **options)
    for method in ("generate", "logprobs"):
        register_fsdp_forward_method(thinker, method)


@contextmanager
def gathered(thinker: Thinker):
    """Inside, weights that are sharded are whole on every process. All processes have to enter together."""
    parts = [module for module in thinker.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def rest_on_host(thinker: Thinker, device: torch.device) -> Callable:
    """Moves a language model's weights to host memory -> awake.

    Inside `with awake():` they are on the device.
    """
    # dict.fromkeys: tied weights are moved once.
    weights = list(dict.fromkeys([*thinker.model.parameters(), *thinker.lm_head.parameters()]))
    sizes = [p.numel() for p in weights]
    memory = torch.empty(sum(sizes), dtype=thinker.dtype, pin_memory=device.type == "cuda")
    at_rest = [part.view_as(p).copy_(p) for p, part in zip(weights, memory.split(sizes))]

    def rest():
        for p, copy in zip(weights, at_rest):
            p.data = copy

    @contextmanager
    def awake():
        for p, copy in zip(weights, at_rest):
            p.data = copy.to(device, non_blocking=True)
        try:
            yield
        finally:
            rest()

    rest()
    return awake

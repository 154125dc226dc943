"""A pretend device: its tensors say that they are elsewhere, and compute on the CPU with real values.

Two faults of code for a GPU stay hidden from tests on a CPU: a tensor of the CPU among the device's, which is
an error there, and a place where the host waits for the device, which costs time at every token or frame.
Here the first one raises. The second one is counted under the place in the code that causes it.

    with pretend_device() as device:
        thinker = Thinker.from_pretrained(folder, device=DEVICE)
        device.allowed = {"model.py:rows_to_keep"}    # from here on, a wait anywhere else raises
        thinker.generate(...)
    device.waits    # {"model.py:rows_to_keep": 3, ...}

A wait is what would be one on CUDA:

* the host reads a value, or copies a tensor;
* the shape of a result depends on values, as that of nonzero or of x[mask];
* a tensor of the CPU is copied to the device. That is also what becomes of torch.tensor(..., device=...), of
  a list as index, and of x[i] = number.
"""
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._lazy.ts_backend
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# torch's device of lazy tensors, of which there are none here. It needs no driver, nothing else uses it, and
# autograd runs its backward pass in the calling thread. Its backend is started once a process.
DEVICE = torch.device("lazy:0")
torch._lazy.ts_backend.init()

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Their results, or the shapes of them, have to be known on the host.
VALUES_NEEDED = {
    aten.bincount, aten.equal, aten.masked_select, aten.multinomial, aten.nonzero, aten._local_scalar_dense,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}


# ---- tensors ---------------------------------------------------------------------------------------
class Elsewhere(torch.Tensor):
    """A tensor of the pretend device. Its values are in `inner`, a tensor of the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, is_number=False):
        # A view, made in inference mode, of a tensor from outside must be like that one.
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=DEVICE)
        tensor.inner = inner
        # Whether it is made of a Python number. Then CUDA has a tensor of the CPU in its place.
        tensor.is_number = is_number
        return tensor

    def tolist(self):
        # torch's own refuses subclasses.
        return self.cpu().tolist()

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the pretend device, outside of pretend_device()")


def inside(x):
    """Of an argument: what the CPU computes with."""
    if isinstance(x, Elsewhere):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x == DEVICE else x


def each(function, x):
    """A function of what is in lists, tuples and dictionaries. torch's tree_map takes twice as long."""
    if isinstance(x, dict):
        return {name: each(function, value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([each(function, value) for value in x])
    return function(x)


# ---- the device ------------------------------------------------------------------------------------
class PretendDevice(TorchDispatchMode):
    """Computes everything inside, and looks for faults.

    waits: {place: count}, where a place is "file.py:function" of the innermost frame of the repository.
    lines: {(place, "file.py:line operation"): count}. allowed: the places that may wait; None: all may.
    """

    def __init__(self):
        super().__init__()
        self.allowed = None
        self.waits = Counter()
        self.lines = Counter()

    @classmethod
    def _should_skip_dynamo(cls):
        # Nothing is compiled here, and importing the compiler takes seconds.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In inference mode this one comes whole, and the CPU has a kernel for it.
        if func is not aten.scaled_dot_product_attention.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = []

        def take(x):
            if isinstance(x, torch.Tensor):
                tensors.append(x)
            return inside(x)

        inner_args = each(take, args)
        inner_kwargs = each(take, kwargs)
        outer = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}
        device = kwargs.get("device")
        on_device = bool(outer) if device is None else device == DEVICE
        if outer or on_device:
            check_devices(func, tensors)
            if waits(func, args, kwargs, on_device):
                self.count_wait(func)
        result = func(*inner_args, **inner_kwargs)

        def outside(x):
            if not isinstance(x, torch.Tensor) or not on_device:
                return x
            if id(x) not in outer:
                return Elsewhere(x, func is aten.scalar_tensor.default)
            assert outer[id(x)].shape == x.shape, f"{func} changes a shape in place"
            return outer[id(x)]
        return each(outside, result)

    def count_wait(self, func):
        place, line = nearest_place()
        if self.allowed is not None and place not in self.allowed:
            raise RuntimeError(f"{line}: the host waits for the device, by {func}")
        self.waits[place] += 1
        self.lines[place, f"{line} {func}"] += 1


def check_devices(func, tensors):
    """Raises RuntimeError where tensors of the CPU meet those of the device.

    Single numbers may. So may copies, and indices, which are copied.
    """
    if func.overloadpacket is aten.copy_ or func.overloadpacket in INDEXING:
        return
    here = [x for x in tensors if x.ndim and not isinstance(x, Elsewhere)]
    if here and any(isinstance(x, Elsewhere) for x in tensors):
        raise RuntimeError(f"{nearest_place()[1]}: {func} gets tensors of the device, and one of the CPU, "
                           f"{here[0].dtype} {tuple(here[0].shape)}")


def waits(func, args, kwargs, on_device) -> bool:
    """Whether the host would wait for the device in an operation that concerns it."""
    operation = func.overloadpacket
    if operation is aten._to_copy:
        crosses = isinstance(args[0], Elsewhere) != on_device
        return crosses and not kwargs.get("non_blocking")
    if operation is aten.copy_:
        target, source, *non_blocking = args
        crosses = isinstance(target, Elsewhere) != isinstance(source, Elsewhere)
        return (crosses or getattr(source, "is_number", False)) and not any(non_blocking)
    if operation in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if not all(isinstance(x, Elsewhere) for x in indices):
            return True
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        # x[mask] = number needs no list of places. For x[places] = number the number is copied.
        number = len(args) > 2 and getattr(args[2], "is_number", False)
        return masks != number
    if operation is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return operation in VALUES_NEEDED


def nearest_place() -> tuple[str, str]:
    """("file.py:function", "file.py:line") of the innermost frame of the repository outside this file."""
    frame = sys._getframe(1)
    line = None
    while frame:
        path = Path(frame.f_code.co_filename)
        own = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv")
        if own and path != Path(__file__):
            file = path.relative_to(ROOT)
            line = line or f"{file}:{frame.f_lineno}"
            # A comprehension is a frame of its own before Python 3.12.
            if not frame.f_code.co_name.startswith("<"):
                return f"{file}:{frame.f_code.co_name}", line
        frame = frame.f_back
    return "elsewhere", line or "elsewhere"


def counted(function, counts, key):
    """A function that counts its calls in `counts`. Its frame is none of those that may be to blame."""
    @wraps(function)
    def call(*arguments, **options):
        counts[key] += 1
        return function(*arguments, **options)
    return call


# ---- what torch would ask the device's driver --------------------------------------------------------
class Generator(torch.Generator):
    """Of the pretend device: one of the CPU, so that both draw the same."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, inside(torch.device(device)))


def asked_of_cpu(function):
    """A function that takes a type of device, with the CPU's in place of the pretend device's."""
    def cpu_for_device(x):
        return "cpu" if x == DEVICE.type else x

    def call(*arguments, **options):
        return function(*map(cpu_for_device, arguments), **each(cpu_for_device, options))
    return call


def new_causal_bias(cls, *shape):
    """A CausalBias, made where no mode sees it: its class must be the first to hold the tensor."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls, *shape)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention by the kernel that the CPU chooses."""
    options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    values = [inside(x) for x in (q, k, v)]
    choice = torch._fused_sdp_choice(*values, **each(inside, options), enable_gqa=enable_gqa)
    if choice != SDPBackend.FLASH_ATTENTION.value:
        return aten._scaled_dot_product_attention_math(q, k, v, **options, enable_gqa=enable_gqa)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.zeros_like(attn_mask, dtype=q.dtype)
        options["attn_mask"] = scores.masked_fill_(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]


# For tensors of the pretend device only, and as long as the process lives.
ATTENTION = torch.library.Library("aten", "IMPL")
ATTENTION.impl("scaled_dot_product_attention", attention, "AutogradLazy")


@contextmanager
def pretend_device():
    """Inside, DEVICE is there. Yields the PretendDevice."""
    # torch.utils.checkpoint looks for a module of the device's name.
    stand_ins = dict(Generator=Generator, lazy=SimpleNamespace())
    for name in ("autocast", "is_autocast_enabled"):
        stand_ins[name] = asked_of_cpu(getattr(torch, name))
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch, name, stand_in, create=True))
        stack.enter_context(patch.object(CausalBias, "__new__", new_causal_bias, create=True))
        # The copy to the device inside torch.tensor(..., device=...) is not hidden from modes.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(PretendDevice())

"""A device without hardware: tensors on `DEVICE` hold no numbers, those of the CPU are real, and what makes the host wait is seen.

PyTorch's fake tensors know shapes, types and devices, so an operation that mixes devices raises `FakeTensorDeviceMismatchError`
as it would on a GPU. What makes the host wait, a number that is read or a copy that blocks, is noted in
[`FakeDevice.waits`]; the numbers that are read are ones.

The registration is a private name of PyTorch and changes the process for good: this file alone has it, and nothing imports this
file but tests that run in processes of their own ([`own_process.in_own_process`]).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


aten = torch.ops.aten


class _Backend:
    """What PyTorch asks of `torch.fakegpu`."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend("fakegpu", backend_module=_Backend())
DEVICE = torch.device("fakegpu", 0)

# CUDA's rules of autocast, for the operations that these models have
LOW_PRECISION = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
FLOAT32 = ("layer_norm", "group_norm", "cosine_similarity", "cdist", "mse_loss")
_rules = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_others.fallback(torch.library.fallthrough_kernel)


def _cast_rule(operation, dtype):
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value):
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        return value.to(dtype or torch.get_autocast_dtype("fakegpu"))

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return run


for _names, _dtype in ((LOW_PRECISION, None), (FLOAT32, torch.float32)):
    for _name in _names:
        _rules.impl(_name, _cast_rule(getattr(aten, _name).default, _dtype))


class Wait(NamedTuple):
    """What makes the host wait, and the file and function that did it: the innermost outside of PyTorch."""

    kind: str
    place: str


class _Literals(TorchFunctionMode):
    """Sends `torch.tensor(..., device=DEVICE)` by way of the CPU, as PyTorch does itself where no mode sees it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            device = kwargs.pop("device")
            return func(*args, **kwargs, device="cpu").to(device)
        return func(*args, **kwargs)


class FakeDevice(FakeTensorMode):
    """Within it `DEVICE` exists. `waits` are the stops so far; several of the same place in a row are one."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []

    def note(self, kind):
        frame = sys._getframe(2)
        while frame.f_back and any(part in frame.f_code.co_filename for part in ("/torch/", "<", __file__)):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        wait = Wait(kind, f"{path.parent.name}/{path.name}:{frame.f_code.co_name}")
        if self.waits[-1:] != [wait]:
            self.waits.append(wait)

    def taken(self) -> list[Wait]:
        """The stops since the last call."""
        waits, self.waits = self.waits, []
        return waits

    def new(self, shape, stride, dtype):
        """A tensor of the device, made below autograd."""
        options = {"dtype": dtype, "device": DEVICE}
        return super().dispatch(aten.empty_strided.default, (), (shape, stride), options)

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_device = any(isinstance(value, FakeTensor) for value in pytree.tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        if not on_device and target != DEVICE and target != torch.device("fakegpu"):
            return func(*args, **kwargs)
        if func in (aten.is_nonzero.default, aten.equal.default):
            self.note("read")
            return True
        if func is aten._local_scalar_dense.default:
            self.note("read")
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.nonzero.default:  # of one entry, the first
            self.note("read")
            return self.new((1, args[0].ndim), (args[0].ndim, 1), torch.long)
        if func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or args[0].dtype
            if not on_device:
                if not kwargs.get("non_blocking"):
                    self.note("copy to the device")
                return self.new(args[0].shape, args[0].stride(), dtype)
            if target is not None and target.type == "cpu":
                self.note("copy to the host")
                return torch.ones(args[0].shape, dtype=dtype)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.note("copy to the host")
            return args[0].fill_(1)
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor):
            if not (args[2:] and args[2]) and not kwargs.get("non_blocking"):
                self.note("copy to the device")
            return args[0]
        return super().dispatch(func, types, args, kwargs)


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    with _Literals(), FakeDevice() as device:
        yield device

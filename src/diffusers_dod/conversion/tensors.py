"""The tensors of somebody else's checkpoint: found where they are nested, checked, and each taken once."""

from collections.abc import Mapping
from typing import Any

import torch


# Where training scripts keep the weights, those to sample with first; `model_ema1` is JiT's
NESTS = ("ema", "model_ema1", "model", "state_dict")
# What data parallelism, compilation, FSDP and activation checkpointing put into names, wherever they wrap
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrap_names(tensors: Mapping[str, Any], anchors: tuple[str, ...]) -> dict[str, Any]:
    """Names without what wrappers put into them and without the name of the module that holds the model.

    Args:
        tensors (`dict`): a state dict.
        anchors (`tuple` of `str`): names of which a model has one; what stands before it there is taken from every name.

    Raises:
        ValueError: if two names become one, or there are several such models.
    """
    names = {name: ".".join(part for part in str(name).split(".") if part not in WRAPPERS) for name in tensors}
    prefixes = {
        name.removesuffix(anchor)
        for name in names.values()
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    if len(prefixes) > 1:
        raise ValueError(
            f"the checkpoint holds the model more than once, under {', '.join(map(repr, sorted(prefixes)))}: save one of "
            "them alone."
        )
    prefix = prefixes.pop() if prefixes else ""
    unwrapped = {names[name].removeprefix(prefix): value for name, value in tensors.items()}
    if len(unwrapped) < len(names):
        raise ValueError("the checkpoint has names that are the same without their wrappers: save one model alone.")
    return unwrapped


def find_state_dict(
    checkpoint: Mapping[str, Any], anchors: tuple[str, ...] = (), ignored: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The state dict within a checkpoint of a training run.

    Args:
        checkpoint (`dict`):
            A state dict, or a dict that holds one under `"ema"` (preferred, the weights to sample with), `"model_ema1"`,
            `"model"` or `"state_dict"`, however deep; empty ones are passed over.
        anchors (`tuple` of `str`): as for [`unwrap_names`].
        ignored (`tuple` of `str`): beginnings of the names to leave out.

    Returns:
        the state dict, its names as [`unwrap_names`] has them, and the keys that led there, joined by dots (`None` if it
        was not nested). Batch norm's counters of batches are left out.

    Raises:
        ValueError: if there is anything but finite tensors in it, or more than one model.
    """
    path = []
    while isinstance(checkpoint, Mapping):
        key = next((key for key in NESTS if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]), None)
        if key is None:
            break
        checkpoint = checkpoint[key]
        path.append(key)
    if not isinstance(checkpoint, Mapping) or not any(map(torch.is_tensor, checkpoint.values())):
        raise ValueError("the checkpoint holds no state dict.")
    tensors = unwrap_names(checkpoint, anchors)
    tensors = {
        name: value
        for name, value in tensors.items()
        if not name.startswith(ignored) and not name.endswith(".num_batches_tracked")
    }
    others = [name for name, value in tensors.items() if not torch.is_tensor(value) or not value.is_floating_point()]
    if others:
        raise ValueError(f"the checkpoint holds other things than floating-point tensors: {', '.join(others[:10])}.")
    # As float32, because float8 has no `isfinite`
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ValueError(f"the checkpoint has NaN or infinite values in {', '.join(broken[:10])}.")
    return tensors, ".".join(path) or None


class CheckpointTensors:
    """The tensors of a checkpoint, each to be taken once with the shape it must have; collects what is wrong."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.left = dict(tensors)
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def shape(self, name: str, ndim: int) -> torch.Size:
        """Shape of a tensor that the model's size follows from."""
        if name not in self.left:
            raise ValueError(f"the checkpoint has no tensor {name}, so it is of another source or incomplete.")
        shape = self.left[name].shape
        if len(shape) != ndim:
            raise ValueError(f"{name} is {tuple(shape)} but must have {ndim} dimensions.")
        return shape

    def count_blocks(self, prefix: str) -> int:
        indices = {name.split(".")[1] for name in self.left if name.startswith(f"{prefix}.")}
        return 1 + max((int(index) for index in indices if index.isdigit()), default=-1)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A float32 copy; where the tensor is missing or misshapen, a placeholder that only has the shape."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            self.missing.append(name)
        elif tensor.shape != shape:
            self.misshapen.append(f"{name} is {tuple(tensor.shape)}, not {shape}")
        else:
            return tensor.detach().to("cpu", torch.float32, copy=True)
        return torch.empty(shape, device="meta")

    def take_linear(self, source: str, rows: int, columns: int, target: str) -> dict[str, torch.Tensor]:
        return {
            f"{target}.weight": self.take(f"{source}.weight", rows, columns),
            f"{target}.bias": self.take(f"{source}.bias", rows),
        }

    def check(self, description: str) -> None:
        """Raises a ValueError that lists all that was missing, misshapen or never taken."""
        problems = [
            f"{what}: {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            for what, names in (
                ("missing", self.missing),
                ("left over", list(self.left)),
                ("of the wrong shape", self.misshapen),
            )
            if names
        ]
        if problems:
            raise ValueError(f"the checkpoint was read as {description}, but it has tensors {'; '.join(problems)}.")

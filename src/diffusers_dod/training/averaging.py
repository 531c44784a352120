"""Averages of the weights in training, with one or several decays, sharded or not."""

import json
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU copies of tensors that FSDP2 may have sharded; every process must call this."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


def fill_tensors(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Writes full values into tensors that FSDP2 may have sharded; every process must call this.

    Raises:
        ValueError: if the names are not the same.
    """
    if tensors.keys() != values.keys():
        raise ValueError(f"The weights do not fit, for instance {min(tensors.keys() ^ values.keys())}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = values[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)


class WeightAverages:
    """Exponential moving averages of the same parameters with several decays.

    Build it after FSDP2 has sharded the parameters: the averages are then sharded likewise.

    Args:
        parameters (`dict` of `str` to `torch.nn.Parameter`): what is averaged, by name.
        decays (`list` of `float`): of the averages, each reached gradually as in `diffusers.training_utils.EMAModel`.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decays: list[float]):
        self.parameters = parameters
        self.averages = {decay: EMAModel(parameters.values(), decay=decay, foreach=True) for decay in decays}

    def step(self) -> None:
        """Moves every average towards the parameters."""
        for average in self.averages.values():
            average.step(self.parameters.values())

    def tensors(self, decay: float) -> dict[str, torch.Tensor]:
        """The average of one decay, by the parameters' names."""
        return dict(zip(self.parameters, self.averages[decay].shadow_params))

    def save_steps(self, path: Path) -> None:
        """Writes how many steps the averages have made."""
        path.write_text(json.dumps({decay: average.optimization_step for decay, average in self.averages.items()}))

    def load_steps(self, path: Path) -> None:
        """Reads what [`~WeightAverages.save_steps`] wrote."""
        steps = json.loads(path.read_text())
        for decay, average in self.averages.items():
            average.optimization_step = steps[str(decay)]

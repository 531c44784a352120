"""How a training run went: losses and quality by step. Needs tensorboard and matplotlib."""

import os
import re
from pathlib import Path


def read_scalars(logs: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
    """Reads the scalars that `diffusers-dod train` logged.

    Args:
        logs (`str` or `os.PathLike`): the run's `logs` folder; it is searched for TensorBoard's files.

    Returns:
        pairs of step and value by name, by rising step. Of a step that a resumed run took again, the last value.

    Raises:
        FileNotFoundError: if there are none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Several runs of the script write several files, which are read in the order of time.
    files = sorted(Path(logs).rglob("events.out.tfevents.*"), key=lambda file: (file.name, str(file)))
    if not files:
        raise FileNotFoundError(
            f"{logs} holds no TensorBoard file: pass the `logs` folder of a run of `diffusers-dod train`."
        )
    scalars: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            scalars.setdefault(name, {}).update((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(values.items()) for name, values in scalars.items()}


def plot_curves(scalars: dict[str, list[tuple[int, float]]], path: str | os.PathLike) -> None:
    """Writes one picture: a panel of the losses, and one per metric with a line for each stage.

    Args:
        scalars (`dict` of `str` to pairs): as [`read_scalars`] returns them; other names are left out.
        path (`str` or `os.PathLike`): of the picture; its suffix sets the format.

    Raises:
        ValueError: if there is neither a loss nor a metric.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and chooses a display

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, values in scalars.items():
        if match := re.fullmatch(r"loss_(with|without)_prior", name):
            panels.setdefault("loss", {})[f"{match[1]} prior"] = values
        elif match := re.fullmatch(r"evaluation/(.+)_stage_(\d+)", name):
            panels.setdefault(match[1], {})[f"stage {match[2]}"] = values
    if not panels:
        raise ValueError("There is neither a loss nor a metric among the scalars.")

    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, values in sorted(lines.items()):
            axes.plot(*zip(*values), label=name, marker="o" if len(values) == 1 else None)
        axes.set(title=title, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)

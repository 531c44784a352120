"""Writes docs/api.md from the docstrings of the public modules: `python docs/make_api.py`."""

import importlib
import inspect
from pathlib import Path


TARGET = Path(__file__).parent / "api.md"
MODULES = {
    "diffusers_dod": ["DoDPipeline", "DoDPipelineOutput", "DoDTransformer2DModel", "DoDLatentEmbedder"]
    + ["DoDLatentEmbedderOutput", "DoDStages"],
    "diffusers_dod.training": None,
    "diffusers_dod.presets": None,
    "diffusers_dod.conversion": ["convert_backbone", "convert_checkpoint"],
    "diffusers_dod.hub": ["check_folder", "push_folder", "push_pipeline", "BackgroundPush"],
    "diffusers_dod.autoencoding": None,
    "diffusers_dod.data": None,
    "diffusers_dod.evaluation": None,
    "diffusers_dod.viz": None,
}


def public_names(module) -> list[str]:
    """What a module defines or exports under a name without an underscore, in the order of its source."""
    if hasattr(module, "__all__"):
        return [
            name
            for name in module.__all__
            if inspect.isclass(getattr(module, name)) or callable(getattr(module, name))
        ]
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return sorted(names, key=lambda name: inspect.getsourcelines(getattr(module, name))[1])


def signature(name: str, value) -> str:
    """A signature as the source spells it."""
    source = inspect.getsource(value)
    start = source.index(f"def {value.__name__}(") + len(f"def {value.__name__}")
    depth = 0
    for end in range(start, len(source)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(source[end], 0)
        if depth == 0 and source[end] == ":":
            break
    lines = [line.split("  # ")[0].rstrip() for line in source[start:end].splitlines()]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return inspect.cleandoc("\n".join([f"{name}{lines[0]}", *lines[1:]]))


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    lines, section = [], None
    for line in inspect.cleandoc(docstring).splitlines():
        if line in ("Args:", "Parameters:", "Returns:", "Raises:"):
            section = line
            lines += [f"**{line[:-1]}**", ""]
        elif section and line.startswith("    "):
            is_item = section != "Returns:" and line[4] != " "
            lines.append(
                f"- {line[4:]}" if is_item else f"  {line.strip()}" if section != "Returns:" else line.strip()
            )
        else:
            section = section if not line else None
            lines.append(line)
    return "\n".join(lines)


def document(name: str, value, level: int) -> list[str]:
    """Heading, signature and docstring of a function or class, then of a class's own documented methods."""
    parts = [f"{'#' * level} {name}"]
    is_class = inspect.isclass(value)
    function = inspect.unwrap(vars(value).get("__init__") if is_class else value)
    if inspect.isfunction(function) and function.__code__.co_filename == inspect.getsourcefile(value):
        parts.append(f"```text\n{signature(name, function)}\n```")
    own = vars(value).get("__doc__") if is_class else value.__doc__
    if own and not own.startswith(f"{value.__name__}("):  # a NamedTuple's and a dataclass's own
        parts.append(markdown(own))
    if is_class:
        for method_name, method in vars(value).items():
            function = inspect.unwrap(getattr(method, "__func__", getattr(method, "fget", method)))
            if inspect.isfunction(function) and function.__doc__ and not method_name.startswith("_"):
                parts += document(f"{name}.{method_name}", function, level + 1)
        call = vars(value).get("__call__")
        if call is not None and call.__doc__:
            parts += document(f"{name}.__call__", inspect.unwrap(call), level + 1)
    return parts


def make_api() -> str:
    """The whole page."""
    parts = ["# API reference", "Made of the docstrings by `docs/make_api.py`; do not edit."]
    for module_name, names in MODULES.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}")
        if module_name != "diffusers_dod":
            parts.append(markdown(module.__doc__))
        for name in names or public_names(module):
            parts += document(name, getattr(module, name), 3)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(make_api(), encoding="utf-8")

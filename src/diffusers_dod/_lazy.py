"""Packages whose names are imported when they are first used, so that `--help` of a command need not wait for torch."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, names: dict[str, list[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """The `__getattr__` and `__all__` of a package's `__init__`.

    Args:
        package (`str`): its `__name__`.
        names (`dict` of `str` to `list` of `str`): module to the public names that it defines.
    """
    modules = {name: module for module, listed in names.items() for name in listed}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return load, [*modules]

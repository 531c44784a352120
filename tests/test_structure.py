"""How the package hangs together: no circle of imports, none upwards, and the method readable alone."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import diffusers_dod


PACKAGE = Path(diffusers_dod.__file__).parent
# From the ground up; a package stands for all of its modules.
LEVELS = [
    ["layers", "autoencoding", "pictures", "presets", "randomness", "files", "cli", "processes", "arguments", "_lazy"],
    [
        "transformer_dod",
        "latent_embedder_dod",
        "models_dod",
        "labels",
        "guidance",
        "adapters",
        "tensor_files",
    ],
    ["compatibility", "priors"],
    ["denoising"],
    ["repository"],
    ["hub"],
    ["pipeline_dod", "modular_dod"],
    ["__init__"],
    ["data"],
    ["evaluation", "viz"],
    ["training"],
    ["conversion", "demo"],
    ["__main__"],
]
# What a reader of the method needs
METHOD = [name for names in LEVELS[:7] for name in names]
METHOD = sorted({*METHOD} - {"randomness", "files", "tensor_files", "cli", "processes", "_lazy", "hub"})


def package_modules() -> dict[str, Path]:
    """Files by module, with dots from the package on; a package's own module ends in `__init__`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported_modules(module: str, modules: dict[str, Path]) -> set[str]:
    """What a module imports of the package anywhere in it: also within functions, for checkers only, and by a string."""
    tree, package, found = ast.parse(modules[module].read_text(encoding="utf-8")), module.split(".")[:-1], set()

    def add(names: list[str]) -> None:
        name = ".".join(names)
        package_module = f"{name}.__init__" if name else "__init__"
        found.update({name, package_module} & modules.keys())

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".") if node.module else []
            if node.level:
                source = package[: len(package) - node.level + 1] + source
            elif source[0] == "diffusers_dod":
                source = source[1:]
            else:
                continue
            add(source)
            for alias in node.names:
                add([*source, alias.name])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "diffusers_dod":
                    add(alias.name.split(".")[1:])
    names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(tree)}
    if names & {"import_module", "lazy_names"}:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
                add([*package, *node.value.split(".")])
    return found - {module}


def import_graph() -> dict[str, set[str]]:
    modules = package_modules()
    return {module: imported_modules(module, modules) for module in modules}


def level(module: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if module.partition(".")[0] in names)


def test_the_graph_sees_every_kind_of_import():
    graph = import_graph()
    assert len(graph) > 50
    assert "layers" in graph["transformer_dod"] and "data.cache" in graph["data.cache_writing"]
    assert "__init__" in graph["evaluation.sampling"]  # `from .. import __version__`
    assert "evaluation.sampling" in graph["evaluation.sample"]  # within a function
    assert "pipeline_dod" in graph["__init__"] and "viz.grids" in graph["viz.__init__"]  # when a name is first used
    assert "training.__main__" in graph["__main__"] and "models_dod" in graph["repository"]  # by a string
    assert "hub.push" in graph["pipeline_dod"]  # by the package's full name


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_module_imports_from_a_higher_level():
    upwards = {
        f"{module} imports {other}"
        for module, imported in import_graph().items()
        for other in imported
        if level(other) > level(module)
    }
    assert not upwards


def test_extras_are_imported_only_where_they_are_used():
    """Else training would need what evaluation alone does."""
    extras = {"torchmetrics", "torch_fidelity", "tensorboard", "matplotlib", "mlxtend", "gradio"}
    at_once = {
        (module, name.partition(".")[0])
        for module, path in package_modules().items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    found = {(module, name) for module, name in at_once if name in extras}
    assert {module.partition(".")[0] for module, _ in found} <= {"demo", "viz"}, found


def test_the_method_is_readable_alone():
    """Its files import each other only; the pipeline's push is the one way out."""
    graph = import_graph()
    outside = {(module, other) for module in METHOD for other in graph[module] if other not in METHOD}
    assert outside == {("pipeline_dod", "hub.push")}
    top = ast.parse((PACKAGE / "pipeline_dod.py").read_text()).body
    assert not [node for node in top if isinstance(node, ast.ImportFrom) and "hub" in (node.module or "")]

"""Pushes a saved DoD pipeline to the Hub, and says beforehand what is wrong with it.

    python -m diffusers_dod.hub check outputs/mine --license apache-2.0
    python -m diffusers_dod.hub push outputs/mine user/my-model --license apache-2.0 --private

Data flows as: folder -> `check_folder` -> `collect_upload` (configs, weights, code, card) -> one commit. A push that was
cut off leaves the repository as it was; the next one uploads only the large files that did not arrive.
"""

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from safetensors import SafetensorError, safe_open

from ..compatibility import check_components, check_scheduler
from ..latent_embedder_dod import DoDLatentEmbedder
from ..repository import INDEX_NAME, carried_code, index_with_code, resolve_index
from ..transformer_dod import DoDTransformer2DModel
from .card import LORA_NAME, build_card, build_lora_card


logger = logging.get_logger(__name__)
PACKAGE = __name__.partition(".")[0]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Beside the components' folders and the card, these go up where they are.
ROOT_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "evaluation.json", LORA_NAME)


def _component_class(entry: list[str]) -> Any:
    own = {cls.__name__: cls for cls in (DoDTransformer2DModel, DoDLatentEmbedder)}
    return own.get(entry[1]) or getattr(diffusers, entry[1])


def _components(folder: Path) -> dict[str, Any]:
    """The classes of the components that the folder's index names."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index = resolve_index(index, ["DoDPipeline"], PACKAGE, str(folder))
    return {
        name: _component_class(entry)
        for name, entry in index.items()
        if isinstance(entry, list) and not name.startswith("_") and entry[0] is not None
    }


def _is_model(cls: type) -> bool:
    return issubclass(cls, torch.nn.Module)


def _check_model_weights(name: str, folder: Path, expected: dict[str, torch.Size]) -> list[str]:
    """What is wrong with the weights of one model, each of its variants by itself."""
    problems = []
    by_variant: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variant = file.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0]
        by_variant.setdefault(variant, []).append(file)
    if "" not in by_variant:
        problems.append(f"{name}: no safetensors weights (its default variant)")
    for files in by_variant.values():
        found = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as weights:
                    for key in weights.keys():
                        tensor = weights.get_tensor(key)
                        found[key] = tensor.shape
                        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                            problems.append(f"{name}/{file.name}: {key} holds NaN or infinite values")
            except (SafetensorError, OSError) as error:
                problems.append(f"{name}/{file.name}: cannot be read ({error})")
        readable = not any(f"{name}/{file.name}: cannot" in problem for file in files for problem in problems)
        if readable and found != expected:
            wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            problems.append(
                f"{name}/{files[0].name}: the weights are not those of its config.json, for instance {wrong[0]} "
                f"({len(wrong)} of {len(expected)} differ)"
            )
    return problems


def check_folder(folder: str | Path, license: str | None = None) -> list[str]:
    """What must be put right before a saved pipeline, or a folder with a LoRA, is pushed; empty if all is well.

    Looks for: unreadable or missing parts, weights that do not load or hold NaN, configs that contradict each other,
    components of foreign modules, pickled files, a missing licence.

    Args:
        folder (`str` or `Path`): the pipeline's folder.
        license (`str`, *optional*): identifier of the Hub (`"apache-2.0"`), where the folder's card names none.
    """
    folder = Path(folder)
    problems = []
    card = folder / "README.md"
    try:
        card_license = ModelCard.load(card).data.license if card.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"README.md: its head is not valid YAML ({' '.join(str(error).split())})")
        card_license = None
    if license is None and card_license is None:
        problems.append("no licence: pass `--license`, or write `license:` into the head of README.md")
    if (folder / LORA_NAME).is_file() and not (folder / INDEX_NAME).is_file():
        return problems + _check_lora(folder / LORA_NAME)
    try:
        components = _components(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [*problems, f"{INDEX_NAME}: {error}"]

    pickled = [path for part in (folder, *(folder / name for name in components)) for path in part.glob("*")]
    for path in sorted(path for path in pickled if path.suffix in PICKLED):
        problems.append(f"{path.relative_to(folder)}: a pickled file can run code; save safetensors and delete it")

    loaded: dict[str, Any] = {}
    for name, cls in components.items():
        try:
            config = cls.load_config(folder / name)
            # Not accelerate's `init_empty_weights`, which would reach the models that other threads build. Schedulers move
            # their tensors to the CPU, which those of no content cannot do.
            with torch.device("meta" if _is_model(cls) else "cpu"):
                loaded[name] = cls.from_config(config)
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[0]}")
            continue
        if _is_model(cls):
            expected = {key: tensor.shape for key, tensor in loaded[name].state_dict().items()}
            problems += _check_model_weights(name, folder / name, expected)
    missing = {"transformer", "latent_embedder", "scheduler"} - set(components)
    problems += [f"{INDEX_NAME}: no {name}" for name in sorted(missing)]
    if set(loaded) == set(components) and not missing:
        try:
            check_components(loaded["transformer"].config, loaded["latent_embedder"].config, loaded.get("vae"))
            scheduler = loaded["scheduler"]
            check_scheduler(type(scheduler), scheduler.config, loaded["transformer"].config)
        except ValueError as error:
            problems.append(f"configs: {error}")
    return problems


def _check_lora(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            keys = list(weights.keys())
            broken = [key for key in keys if not torch.isfinite(weights.get_tensor(key)).all()]
    except (SafetensorError, OSError) as error:
        return [f"{file.name}: cannot be read ({error})"]
    problems = [f"{file.name}: {key} holds NaN or infinite values" for key in broken]
    foreign = [key for key in keys if not key.startswith("transformer.") or "lora" not in key]
    if foreign or not keys:
        problems.append(f"{file.name}: not a LoRA of the transformer as `save_lora_weights` writes it ({foreign[:1]})")
    return problems


def _without_origin(text: str) -> bytes:
    """A config without the folder that it was loaded from, which is nobody else's business."""
    config = json.loads(text)
    config.pop("_name_or_path", None)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def write_variant(folder: Path, variant: str, target: Path) -> None:
    """Writes the models of a pipeline once more, in half precision, as a variant.

    Args:
        folder (`Path`): the saved pipeline.
        variant (`str`): `"fp16"` or `"bf16"`.
        target (`Path`): where the variant's files go, one folder a component.
    """
    for name, cls in _components(folder).items():
        if _is_model(cls):
            model = cls.from_pretrained(folder / name, torch_dtype=VARIANTS[variant], use_safetensors=True)
            model.save_pretrained(target / name, variant=variant)


def collect_upload(folder: str | Path, card: str, include_code: bool = True) -> dict[str, Path | bytes]:
    """What a push uploads, by its path in the repository.

    Args:
        folder (`str` or `Path`): a saved pipeline or a LoRA's folder.
        card (`str`): text of the model card.
        include_code (`bool`, defaults to `True`): whether to carry the code that diffusers alone needs.
    """
    folder = Path(folder)
    upload: dict[str, Path | bytes] = {"README.md": card.encode()}
    upload |= {name: folder / name for name in ROOT_FILES if (folder / name).is_file()}
    if not (folder / INDEX_NAME).is_file():
        return upload
    for name in _components(folder):
        for path in sorted((folder / name).iterdir()):
            if path.suffix == ".json":
                upload[f"{name}/{path.name}"] = _without_origin(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                upload[f"{name}/{path.name}"] = path
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    if include_code:
        upload |= {path: text.encode() for path, text in carried_code().items()}
        index = index_with_code(index)
    else:
        index = resolve_index(index, ["DoDPipeline"], PACKAGE, str(folder))
    upload[INDEX_NAME] = _without_origin(json.dumps(index))
    grid = find_stage_grid(folder)
    if grid is not None:
        upload["stages.png"] = grid
    return upload


def find_stage_grid(folder: Path) -> Path | None:
    """The picture of all stages for the card: `stages.png`, or the last one that the training drew."""
    drawn = sorted((folder / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)
    return folder / "stages.png" if (folder / "stages.png").is_file() else drawn[-1] if drawn else None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    include_code: bool = True,
    dry_run: bool = False,
    commit_message: str = "Upload DoDPipeline",
    token: str | None = None,
) -> str | None:
    """Pushes a saved pipeline, or a LoRA, to the Hub in one commit.

    Files of an earlier push that no longer belong to the model are deleted by the same commit; others are left alone. A
    `README.md` in the folder is taken as the card; without one it is written from what the folder holds.

    Args:
        folder (`str` or `Path`): what `save_pretrained`, `train_dod.py` or `save_lora_weights` wrote.
        repo_id (`str`): repository, made if need be.
        license (`str`, *optional*): identifier of the Hub, needed where the folder has no card.
        datasets (`list` of `str`, *optional*): datasets of the Hub that it was trained on, for the card.
        base_model (`str`, *optional*): repository that it was converted or adapted from; needed for a LoRA.
        private (`bool`, *optional*): whether a new repository is private.
        revision (`str`, *optional*): branch, made if need be; `main` by default.
        create_pr (`bool`, defaults to `False`): whether to open a pull request instead.
        variant (`str`, *optional*): `"fp16"` or `"bf16"`, to upload the weights in that precision as well.
        include_code (`bool`, defaults to `True`): whether the repository carries the code that diffusers alone needs.
        dry_run (`bool`, defaults to `False`): whether to print what would go up and stop there.
        commit_message (`str`): message of the commit.
        token (`str`, *optional*): the Hub's token; that of `hf auth login` by default.

    Returns:
        `str`: address of the commit or the pull request, `None` for a dry run.

    Raises:
        ValueError: for what [`check_folder`] finds.
    """
    folder = Path(folder)
    problems = check_folder(folder, license)
    is_lora = not (folder / INDEX_NAME).is_file()
    if is_lora and base_model is None and not (folder / "README.md").is_file():
        problems.append("a LoRA needs the model that it adapts: pass `--base_model`")
    if problems:
        raise ValueError("\n  ".join([f"{folder} was not pushed:", *problems]))

    with tempfile.TemporaryDirectory() as scratch:
        # 1. What goes up
        about: dict[str, Any] = {
            "repo_id": repo_id,
            "license": license,
            "datasets": datasets,
            "base_model": base_model,
        }
        if (folder / "README.md").is_file():
            card = (folder / "README.md").read_text(encoding="utf-8")
        elif is_lora:
            card = build_lora_card(**about)
        else:
            card = build_card(folder, has_picture=find_stage_grid(folder) is not None, has_code=include_code, **about)
        upload = collect_upload(folder, card, include_code)
        if variant is not None and not is_lora:
            write_variant(folder, variant, Path(scratch))
            for path in Path(scratch).glob("*/*"):
                if path.name != "config.json":
                    upload[path.relative_to(scratch).as_posix()] = path
        if dry_run:
            sizes = {path: len(x) if isinstance(x, bytes) else x.stat().st_size for path, x in upload.items()}
            for name, size in sorted(sizes.items()):
                print(f"{size:>14,}  {name}")
            print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files would go to {repo_id}")
            return None

        # 2. Where it goes
        api = HfApi(token=token, library_name="diffusers-dod")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)

        # 3. One commit
        owned = {path.partition("/")[0] for path in upload if "/" in path}
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [
            path
            for path in present
            if path not in upload and (path.partition("/")[0] in owned or path == "pipeline.py") and not is_lora
        ]
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in upload.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return commit.pr_url or commit.commit_url


def push_pipeline(pipeline: DiffusionPipeline, repo_id: str, **kwargs: Any) -> str | None:
    """Saves a pipeline and pushes it; `kwargs` are [`push_folder`]'s."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        return push_folder(folder, repo_id, **kwargs)


class BackgroundPush:
    """Pushes a model beside a training that goes on; a push that fails is logged and does nothing else.

        push = BackgroundPush("user/model", license="mit")
        push.submit(pipeline.save_pretrained)  # in the loop: saves now, uploads in a thread
        push.finish("outputs/mine")            # at the end: waits for that, then pushes the finished folder

    Args:
        repo_id (`str`): repository; one that cannot be made is told at once, not after the training.
        kwargs: arguments of [`push_folder`].
    """

    def __init__(self, repo_id: str, **kwargs: Any):
        self.repo_id, self.arguments = repo_id, kwargs
        self.threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self.running: Future | None = None
        try:
            HfApi(token=kwargs.get("token")).create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
        except Exception as error:  # whatever the network or the server did, the training is worth more
            logger.warning(f"{repo_id} cannot be made on the Hub, so pushes will fail: {error}")

    def submit(self, save: Callable[[str], Any]) -> None:
        """Saves the model by `save(folder)` and pushes the folder; does neither while an earlier push still runs."""
        if self.running is not None and not self.running.done():
            logger.warning(f"The push to {self.repo_id} before this one still runs, so this one is left out.")
            return
        scratch = tempfile.TemporaryDirectory()

        def push() -> None:
            with scratch as folder:
                self._push(folder)

        try:
            save(scratch.name)
        except OSError as error:  # a full disk
            scratch.cleanup()
            logger.warning(f"The model could not be saved for a push to {self.repo_id}: {error}")
            return
        self.running = self.threads.submit(push)

    def finish(self, folder: str | Path) -> str | None:
        """Waits for the push that runs, then pushes a folder; returns the commit's address, `None` if it failed."""
        self.threads.shutdown(wait=True)
        address = self._push(folder)
        if address is None:
            logger.warning(f"`python -m diffusers_dod.hub push {folder} {self.repo_id}` tries again.")
        return address

    def _push(self, folder: str | Path) -> str | None:
        try:
            return push_folder(folder, self.repo_id, **self.arguments)
        except Exception as error:
            logger.warning(f"The push to {self.repo_id} failed: {error}")
            return None

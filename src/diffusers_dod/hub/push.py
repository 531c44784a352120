"""A saved model's way to the Hub: folder -> `check_folder` -> `collect_upload` -> a staging folder -> one commit.

A push that was cut off leaves the repository as it was; the next one uploads only the large files that did not arrive.
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..arguments import check_choice
from ..cli import first_line
from ..compatibility import DTYPE_ARGUMENT
from ..repository import (
    BLOCK_CONFIG_NAME,
    BLOCK_NAME,
    CARRIED_NAME,
    INDEX_NAME,
    MODULAR_INDEX_NAME,
    carried_blocks,
    carried_code,
    index_with_code,
    json_text,
    resolve_index,
)
from .card import (
    EVALUATION_NAME,
    LORA_NAME,
    TRAINING_NAME,
    build_card,
    build_lora_card,
    read_evaluation,
    read_json,
    read_object,
)
from .check import CARD_NAME, PACKAGE, PARTS, check_folder, component_classes, find_stage_grid, is_model, list_files


VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Of the network, the server, and a large file on its way (RuntimeError). huggingface_hub has changed its HTTP library
# twice: its own error derives from that library's base, as a lost connection does.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, cast(Any, HfHubHTTPError.__bases__[0]))


class PushFailed(OSError):
    """The network or the Hub failed; the same push again resumes."""


def _without_origin(value: Any) -> Any:
    """A config without the folders that it and its parts were loaded from, which are nobody else's business."""
    if not isinstance(value, dict):
        return value
    return {key: _without_origin(entry) for key, entry in value.items() if key != "_name_or_path"}


def write_variant(folder: Path, variant: str, target: Path) -> None:
    """Writes the models of a pipeline once more, in half precision, as a variant.

    Args:
        folder (`Path`): the saved pipeline.
        variant (`str`): `"fp16"` or `"bf16"`.
        target (`Path`): where the variant's files go, one folder per component.
    """
    for name, cls in component_classes(folder).items():
        if is_model(cls):
            dtype = {DTYPE_ARGUMENT: VARIANTS[variant]}
            model = cls.from_pretrained(folder / name, **dtype, use_safetensors=True)
            model.save_pretrained(target / name, variant=variant)


def collect_upload(
    folder: str | Path,
    card: str,
    include_code: bool = True,
    repo_id: str | None = None,
    revision: str | None = None,
) -> dict[str, Path | bytes]:
    """What a push uploads, by its path in the repository.

    Args:
        folder (`str` or `Path`): a saved pipeline or a LoRA's folder, in which [`check_folder`] finds nothing wrong.
        card (`str`): text of the model card.
        include_code (`bool`, defaults to `True`): whether to carry the code that diffusers alone needs.
        repo_id (`str`, *optional*): repository in which modular pipelines find the components.
        revision (`str`, *optional*): its branch, tag or commit.
    """
    folder = Path(folder)
    files, _ = list_files(folder)
    upload: dict[str, Path | bytes] = {}
    for name, file in files.items():
        upload[name] = json_text(_without_origin(read_json(file))).encode() if file.suffix == ".json" else file
    upload[CARD_NAME] = card.encode()
    upload.pop(TRAINING_NAME, None)
    if EVALUATION_NAME in files:
        upload[EVALUATION_NAME] = json_text(read_evaluation(folder)).encode()
    if INDEX_NAME not in files:
        return upload
    index = _without_origin(read_object(files[INDEX_NAME]))
    if include_code:
        # AutoModel reads this here, not in the models' configs. In a folder it would hide the package from AutoModel.
        index = index_with_code(index) | {"auto_map": {"AutoModel": f"{CARRIED_NAME}.DoDModel"}}
        upload |= {path: text.encode() for path, text in carried_code(index).items()}
        upload |= {path: text.encode() for path, text in carried_blocks(index, repo_id, revision).items()}
    else:
        index = resolve_index(index, ["DoDPipeline"], PACKAGE, str(folder))
    upload[INDEX_NAME] = json_text(index).encode()
    return upload


def _commit(
    folder: Path,
    repo_id: str,
    delete_patterns: list[str] | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    token: str | None,
) -> str:
    """Makes a repository hold a staging folder's files, by one commit; returns the commit's address.

    Raises:
        PushFailed: in one line.
    """
    api = HfApi(token=token, library_name="diffusers-dod")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            delete_patterns=delete_patterns,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except HUB_ERRORS as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        advice = "To resume, repeat the push: large files that arrived are not sent again"
        raise PushFailed(f"{first_line(error)}{cause}. {advice}") from error
    return commit.pr_url or commit.commit_url


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
        folder (`str` or `Path`): what `save_pretrained`, `diffusers-dod train` or `save_lora_weights` wrote.
        repo_id (`str`): repository, created if missing.
        license (`str`, *optional*): Hub licence such as `"apache-2.0"`; required unless the folder's card names one.
        datasets (`list` of `str`, *optional*): Hub datasets used for training, for a new card.
        base_model (`str`, *optional*):
            repository that it was converted or adapted from, for a new card; required for a LoRA without a card.
        private (`bool`, *optional*): whether a new repository is private; by default as its owner's settings are.
        revision (`str`, *optional*): branch, created if missing; `main` by default.
        create_pr (`bool`, defaults to `False`): whether to open a pull request against `main` instead.
        variant (`str`, *optional*): `"fp16"` or `"bf16"`, to upload a pipeline's weights in that precision as well.
        include_code (`bool`, defaults to `True`): whether the repository carries the code that diffusers alone needs.
        dry_run (`bool`, defaults to `False`): whether to print what would go up and stop there.
        commit_message (`str`): message of the commit.
        token (`str`, *optional*): the Hub's token; that of `hf auth login` by default.

    Returns:
        `str`: address of the commit or the pull request, `None` for a dry run.

    Raises:
        ValueError: for what [`check_folder`] finds, and for arguments that the Hub does not take.
        PushFailed: if the network or the Hub fails.
    """
    folder = Path(folder)
    for named in (repo_id, *(datasets or []), *([base_model] if base_model else [])):
        validate_repo_id(named)
    if variant is not None:
        check_choice("variant", variant, tuple(VARIANTS))
    if create_pr and revision is not None:
        raise ValueError("a pull request is opened against `main`: leave out either `create_pr` or `revision`")
    problems = check_folder(folder, license)
    has_card = (folder / CARD_NAME).is_file()
    is_lora = (folder / LORA_NAME).is_file() and not (folder / INDEX_NAME).is_file()
    if is_lora and base_model is None and not has_card:
        problems.append("a LoRA needs the model that it adapts: pass `--base_model`")
    if problems:
        raise ValueError(f"{folder} was not pushed: {'; '.join(problems)}")

    with tempfile.TemporaryDirectory() as scratch:
        # 1. What goes up
        about: dict[str, Any] = {
            "repo_id": repo_id,
            "license": license,
            "datasets": datasets,
            "base_model": base_model,
        }
        if has_card:
            card = (folder / CARD_NAME).read_text(encoding="utf-8")
        elif is_lora:
            card = build_lora_card(**about)
        else:
            card = build_card(folder, has_picture=find_stage_grid(folder) is not None, has_code=include_code, **about)
        upload = collect_upload(folder, card, include_code, repo_id, revision)
        if variant is not None and not is_lora:
            written = Path(scratch, "variant")
            write_variant(folder, variant, written)
            files = (path for path in written.glob("*/*") if path.name != "config.json")
            upload |= {path.relative_to(written).as_posix(): path for path in files}
        if dry_run:
            sizes = {path: len(x) if isinstance(x, bytes) else x.stat().st_size for path, x in upload.items()}
            for name, size in sorted(sizes.items()):
                print(f"{size:>14,}  {name}")
            print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files would go to {repo_id}")
            return None

        # 2. A folder like the repository; weights are links, for they may be large
        staging = Path(scratch, "staging")
        for name, content in upload.items():
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                target.symlink_to(content.resolve())

        # 3. One commit, which also deletes what an earlier push of a pipeline left
        owned = sorted({*PARTS, *(path.partition("/")[0] for path in upload if "/" in path)})
        stale = [*(f"{name}/*" for name in owned), "pipeline.py", "stages.png", EVALUATION_NAME]
        stale += [BLOCK_NAME, BLOCK_CONFIG_NAME, MODULAR_INDEX_NAME]
        return _commit(
            staging,
            repo_id,
            None if is_lora else stale,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )


def push_pipeline(pipeline: DiffusionPipeline, repo_id: str, **kwargs: Any) -> str | None:
    """Saves a pipeline and pushes it; `kwargs` are [`push_folder`]'s."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        return push_folder(folder, repo_id, **kwargs)

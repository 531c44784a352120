"""Classes of data and classes of a saved model: by name wherever both have names."""

import unicodedata
from typing import Any

import datasets

from ..labels import synonyms


def nfc(name: str) -> str:
    """A name in the one Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", name.strip())


def match_classes(class_names: list[str], id2label: dict[int, str]) -> list[int] | None:
    """The model's class for each class of the data.

    A name is compared with a label as a whole and, if it is none, with the parts between a label's commas.

    Args:
        class_names (`list` of `str`): of the data.
        id2label (`dict` of `int` to `str`): of the model.

    Returns:
        the ids, or `None` if no name is one of the model's.

    Raises:
        ValueError: if some are the model's and others are not, or a name stands for several of its classes or one class for
            several names.
    """
    labels = {class_id: nfc(label) for class_id, label in sorted(id2label.items())}
    names = [nfc(name) for name in class_names]
    if all(labels.get(position) == name for position, name in enumerate(names)):
        return list(range(len(names)))  # even if two classes share a name
    whole: dict[str, list[int]] = {}
    for class_id, label in labels.items():
        whole.setdefault(label, []).append(class_id)
    parts = synonyms({str(class_id): label for class_id, label in labels.items()})
    found = [whole.get(name) or parts.get(name) or [] for name in names]
    if not any(found):
        return None
    unknown = [name for name, ids in zip(names, found) if not ids]
    if unknown:
        raise ValueError(
            f"{len(names) - len(unknown)} classes of the data are the model's, but not {_list(unknown)}: rename them to the "
            "model's labels, or leave them out"
        )
    for name, ids in zip(names, found):
        if len(ids) > 1:
            raise ValueError(f"{name!r} names the classes {ids} of the model: write the whole label of one of them")
    chosen = [ids[0] for ids in found]
    for class_id in chosen:
        same = [name for name, other in zip(names, chosen) if other == class_id]
        if len(same) > 1:
            raise ValueError(f"{_list(same)} are one class of the model, {labels[class_id]!r}: put them into one")
    return chosen


def _list(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def position_table(class_names: list[str], id2label: dict[int, str]) -> str:
    """What becomes of the model's classes where no name is one of its labels: a line for each class of the data."""
    lines = [f"  data {name!r}: model {i} ({id2label.get(i, 'no name')!r})" for i, name in enumerate(class_names)]
    return "\n".join(["No class name of the data is a label of the model, so they are matched by position:", *lines])


def _relabel(row: dict, ids: list[int]) -> dict:
    return {**row, "label": ids[row["label"]] if 0 <= row["label"] < len(ids) else -1}


def relabel_rows(rows: Any, ids: list[int]) -> Any:
    """A dataset of [`load_labelled_images`], streamed or not, with the class `ids[label]` in the place of `label`."""
    features = datasets.Features({**rows.features, "label": datasets.Value("int64")})
    if isinstance(rows, datasets.Dataset):
        labels = [ids[label] for label in rows["label"][:]]
        return rows.remove_columns("label").add_column("label", labels, feature=features["label"])
    return rows.map(_relabel, fn_kwargs={"ids": ids}, features=features)

"""Class labels of a call: ids, or names of `id2label` and their synonyms."""

import difflib
from typing import Any

import numpy as np
import torch

from .arguments import is_count, shown


def text_labels(id2label: Any) -> dict[str, str] | None:
    """`id2label` with its ids as strings, which JSON makes of them; `None` if it is empty.

    Raises:
        ValueError: if it is no dict of ids to names.
    """
    if not isinstance(id2label, (dict, type(None))):
        raise ValueError(f"`id2label` is {shown(id2label)}; it must be a dict of class ids to names.")
    for class_id, name in (id2label or {}).items():
        is_id = isinstance(class_id, (str, int)) and str(class_id).removeprefix("-").isdecimal()
        if not is_id or not isinstance(name, str):
            raise ValueError(
                f"`id2label` has {shown(class_id)}: {shown(name)}; it must be a dict of class ids to names."
            )
    return {str(class_id): name for class_id, name in (id2label or {}).items()} or None


def synonyms(id2label: dict[str, str]) -> dict[str, list[int]]:
    """Class ids by name; a label is known by its whole text and by each part between commas."""
    labels: dict[str, list[int]] = {}
    for class_id, name in id2label.items():
        for synonym in dict.fromkeys([name.strip(), *(part.strip() for part in name.split(","))]):
            labels.setdefault(synonym, []).append(int(class_id))
    return labels


class ClassLabelsMixin:
    """What a pipeline of class-conditional models makes of `class_labels`."""

    labels: dict[str, list[int]]
    transformer: Any

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of label names.

        Args:
            label (`str` or `list` of `str`): one name or several; a name of `id2label` or one of its synonyms.

        Raises:
            ValueError: for an unknown name, with the nearest ones, and for a name that several classes share.
        """
        ids = []
        for name in [label] if isinstance(label, str) else label:
            matches = self.labels.get(name.strip(), [])
            if not self.labels:
                raise ValueError(
                    f"This pipeline has no label names, so {shown(name)} is unknown: pass class ids instead."
                )
            if not matches:
                near = difflib.get_close_matches(name, self.labels, n=3, cutoff=0.0)
                raise ValueError(f"{shown(name)} is not a label. The nearest are {', '.join(map(shown, near))}.")
            if len(matches) > 1:
                raise ValueError(f"{name!r} names the classes {matches}: pass one of these ids instead.")
            if self.transformer is not None and not 0 <= matches[0] < self.transformer.config.num_classes:
                num_classes = self.transformer.config.num_classes
                raise ValueError(f"{name!r} names class {matches[0]}, but the model has {num_classes} classes.")
            ids.append(matches[0])
        return ids

    def prepare_class_labels(self, class_labels: int | str | None | list | torch.Tensor) -> list[int]:
        """Class ids of whatever names the classes; `None` becomes the null class.

        Args:
            class_labels: an id, a name, `None` (unconditional) or a list or tensor of them.

        Raises:
            ValueError: if the list is empty, an id is out of range or a name is unknown.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            is_plain = isinstance(class_labels, np.ndarray) or not (class_labels.is_sparse or class_labels.is_meta)
            if class_labels.ndim > 1 or not is_plain:
                raise ValueError(f"`class_labels` is {shown(class_labels)}; pass a tensor of class ids, `(images,)`.")
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty: pass at least one class id or name.")

        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if label is None:
                ids.append(num_classes)
            elif isinstance(label, str):
                ids += self.get_label_ids(label)
            elif is_count(label, least=0) and label < num_classes:
                ids.append(int(label))
            else:
                raise ValueError(
                    f"Class {shown(label)} is out of range: this model has {num_classes} classes, so pass an integer from 0 "
                    f"to {num_classes - 1}, or None for an unconditional sample."
                )
        return ids

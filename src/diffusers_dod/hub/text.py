"""What of a folder's texts goes into a public card: no folders of this machine, and nothing that Markdown would act on."""

import html
import os
import re
from typing import Any


# Beginnings of paths on any system, alone or within a text. Addresses (https://, s3://, ...) are taken out before.
PATH = re.compile(
    r"""(?:^|[\s"'`(\[{=,;:|])(?:file:|~[\w.-]*(?:[/\\]|$)|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\$\{?\w+\}?[/\\]|\\\\|/[^\s/])"""
)
ADDRESS = re.compile(r"(?!file:)\b[A-Za-z][A-Za-z0-9+.-]+://\S*", re.IGNORECASE)
# `a/b/c` and `a\b`: a repository of the Hub has one slash at most.
RELATIVE_PATH = re.compile(r"[^\s/\\]+(?:\\[^\s/\\]+|/[^\s/\\]+/[^\s/\\]+)[^\s]*/?")


def has_local_path(value: Any) -> bool:
    """Whether a text, or a text in a list, names a file or a folder of a machine; `user/model` does where it exists here."""
    if isinstance(value, (list, tuple)):
        return any(has_local_path(entry) for entry in value)
    if not isinstance(value, str):
        return False
    text = ADDRESS.sub("", value)
    is_path = PATH.search(text) or RELATIVE_PATH.fullmatch(text.strip())
    return bool(is_path) or (("/" in text or "\\" in text) and os.path.exists(value))


def without_local_paths(value: dict[str, Any]) -> dict[str, Any]:
    """The entries of a JSON object, at any depth, that name no file or folder of a machine."""
    return {
        key: without_local_paths(entry) if isinstance(entry, dict) else entry
        for key, entry in value.items()
        if not has_local_path([key, entry])
    }


def escape_markdown(value: Any) -> str:
    """A value as one line of Markdown that shows it as it is, in a table's cell, too."""
    text = " ".join(str(value).split())
    # The joiners of emoji and of Persian; other characters that do not show turn or end lines.
    text = "".join(character for character in text if character.isprintable() or character in "\u200c\u200d")
    text = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", html.escape(text, quote=False))
    return text

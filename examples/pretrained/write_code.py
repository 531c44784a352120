"""Writes what the models here take from the package: their cards, and its code for those who load them with diffusers alone.

    python examples/pretrained/write_code.py     # whenever the method's files or the card changed; a test compares

The code lies once in `code/`, and the models have links to it.
"""

import json
import os
from pathlib import Path

from diffusers_dod.hub.card import build_card
from diffusers_dod.repository import carried_code


HERE = Path(__file__).parent


def main() -> None:
    shared = HERE / "code"
    shared.mkdir(exist_ok=True)
    for index in sorted(HERE.glob("*/model_index.json")):
        for path, text in carried_code(json.loads(index.read_text())).items():
            link = index.parent / path
            (shared / link.name).write_text(text, encoding="utf-8")
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(shared / link.name, link.parent))
        name = f"examples/pretrained/{index.parent.name}"
        card = build_card(index.parent, name, "apache-2.0", has_picture=True)
        (index.parent / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

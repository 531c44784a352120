"""Writes the package's code once into `code/`, and links it into the models, for those who load them with diffusers alone.

    python examples/pretrained/write_code.py     # whenever the method's files changed; a test compares
"""

import json
import os
from pathlib import Path

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


if __name__ == "__main__":
    main()

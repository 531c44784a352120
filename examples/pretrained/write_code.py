"""Writes the package's code into the models beside this file, for those who load them with diffusers alone.

    python examples/pretrained/write_code.py     # from the repository's root, before a release
"""

from pathlib import Path

from diffusers_dod.repository import write_code


for index in sorted(Path("examples/pretrained").glob("*/model_index.json")):
    write_code(index.parent)
    print(f"{index.parent}: code of the pipeline and the models")

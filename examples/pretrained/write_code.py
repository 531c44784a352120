"""Writes the package's code into the models beside this file, for who loads them with diffusers alone; before a release."""

from pathlib import Path

from diffusers_dod.repository import write_code


for index in sorted(Path(__file__).parent.glob("*/model_index.json")):
    write_code(index.parent)
    print(f"{index.parent.name}: pipeline.py and the models' code")

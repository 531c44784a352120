"""Puts `examples/` on the path: the study shares `digits.py` and `classifier.py` with the quickstart."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

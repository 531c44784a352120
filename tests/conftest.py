"""diffusers' own common tests run on our classes only where its sources are at hand.

They are not part of diffusers' wheel or sdist: `DIFFUSERS_CHECKOUT=<checkout> python -m pytest tests/diffusers_common`.
"""

import os
import sys
from pathlib import Path

import pytest


CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")

collect_ignore = []
if CHECKOUT is None:
    collect_ignore.append("diffusers_common")
elif not Path(CHECKOUT, "tests/models/testing_utils").is_dir():
    raise pytest.UsageError(
        f"DIFFUSERS_CHECKOUT={CHECKOUT!r} has no tests/models/testing_utils: clone diffusers there."
    )
else:
    # For `from tests.models.testing_utils import ...`. Only that package: diffusers itself is the installed one.
    sys.path.insert(0, CHECKOUT)


def pytest_configure(config):
    if CHECKOUT is not None:
        # The marks that diffusers' mixins put on their tests
        config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")

"""Trains Diffusion on Diffusion: the same as `diffusers-dod train`, for `accelerate launch examples/train_dod.py`.

`--help` lists the options. The loop is `diffusers_dod/training/loop.py`, one readable function.
"""

import sys

from diffusers_dod.training.__main__ import main


if __name__ == "__main__":
    sys.exit(main())

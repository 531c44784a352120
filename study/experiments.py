"""The runs of the study and how each is sampled."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from measure_model import Setting, unguided
from train_model import Variant


class Study(NamedTuple):
    """A data set of `data_sets.py` and the steps of a run on it."""

    data: str
    steps: int


# The committed figures and pictures
RESULTS = Path(__file__).parent / "results"
# Each data set's steps, and those of a longer training.
STUDIES = {
    "digits": Study("digits", 4000),
    "digits-long": Study("digits", 16000),
    "glyphs": Study("glyphs", 8000),
    "glyphs-long": Study("glyphs", 16000),
    "emoji": Study("emoji", 6000),
    "emoji-long": Study("emoji", 12000),
}
# The samples that each figure is of, and where the curves have points, as shares of a run.
NUM_SAMPLES = 1000
MARKS = (0.25, 0.5, 1.0)

CLASS_ONLY = Variant(prior_drop=1.0)
DOD = Variant(code_noise=0.3)

# What every data set is run with.
MAIN = {"class_only": CLASS_ONLY, "dod": DOD}
# Class-only models of other settings, so that the rival is tuned as well.
RIVALS = {
    "class-only, learning rate 1e-3": replace(CLASS_ONLY, learning_rate=1e-3),
    "class-only, learning rate 4e-3": replace(CLASS_ONLY, learning_rate=4e-3),
    "class-only, one block more": replace(CLASS_ONLY, extra_layers=1),
}
# What is varied, one thing at a time.
ABLATIONS = {
    "bottleneck grid 4x4, 1 channel": replace(DOD, bottleneck=(4, 1)),
    "bottleneck grid 4x4, 4 channels": replace(DOD, bottleneck=(4, 4)),
    "bottleneck grid 2x2, 2 channels": replace(DOD, bottleneck=(2, 2)),
    "bottleneck grid 2x2, 8 channels": replace(DOD, bottleneck=(2, 8)),
    "bottleneck grid 2x2, 16 channels": replace(DOD, bottleneck=(2, 16)),
    "bottleneck grid 1x1, 8 channels": replace(DOD, bottleneck=(1, 8)),
    "deeper embedder (3 + 2)": replace(DOD, embedder_layers=(3, 2)),
    "prior drop 0.25": replace(DOD, prior_drop=0.25),
    "prior drop 0.75": replace(DOD, prior_drop=0.75),
    "no code noise": replace(DOD, code_noise=0.0),
    "code noise 0.6": replace(DOD, code_noise=0.6),
    "learning rate 1e-3": replace(DOD, learning_rate=1e-3),
    "learning rate 4e-3": replace(DOD, learning_rate=4e-3),
}
VARIANTS = MAIN | RIVALS | ABLATIONS

STAGE = 12
PAIR = unguided(STAGE, STAGE)
ALL_STAGES = unguided(*[STAGE] * 4)
REAL_PRIOR = unguided(STAGE, STAGE, real_prior=True)
LONG = unguided(2 * STAGE)
CLASS_ONLY_GUIDED = [Setting((2 * STAGE,), (scale,)) for scale in (1.5, 2.0, 2.5, 3.0, 4.0)]
DOD_GUIDED = [
    Setting((STAGE, STAGE), scales) for scales in ((1.5, 1.0), (1.5, 1.5), (2.0, 2.0), (2.5, 2.5), (3.0, 2.0))
]
# What else guidance can be: scales between, and other kinds, each at the scale that was best, or next to it.
MORE_GUIDANCE = {
    "class_only": [
        *(Setting((2 * STAGE,), (scale,)) for scale in (1.25, 1.75, 2.25)),
        Setting((2 * STAGE,), (2.0,), intervals=((0.0, 1.0),)),
        Setting((2 * STAGE,), (2.0,), intervals=((0.0, 0.5),)),
        Setting((2 * STAGE,), (2.0,), intervals=((0.5, 1.0),)),
        Setting((2 * STAGE,), (1.5,), intervals=((0.0, 1.0),), autoguidance=True),
        Setting((2 * STAGE,), (2.0,), intervals=((0.0, 1.0),), autoguidance=True),
        Setting((2 * STAGE,), (2.5,), intervals=((0.0, 1.0),), autoguidance=True),
    ],
    "dod": [
        Setting((STAGE, STAGE), (1.25, 1.25)),
        Setting((STAGE, STAGE), (1.0, 1.5)),
        Setting((STAGE, STAGE), (2.0, 1.0)),
        Setting((STAGE, STAGE), (1.0, 2.0)),
        Setting((STAGE, STAGE), (2.0, 2.0), intervals=((0.0, 1.0),) * 2),
        Setting((STAGE, STAGE), (2.0, 2.0), intervals=((0.0, 0.5),) * 2),
        Setting((STAGE, STAGE), (2.0, 2.0), intervals=((0.5, 1.0),) * 2),
        Setting((STAGE, STAGE), (1.0, 1.0), prior_guidance=1.5),
        Setting((STAGE, STAGE), (2.0, 2.0), prior_guidance=1.5),
        Setting((STAGE, STAGE), (2.0, 2.0), drop="both"),
        Setting((STAGE, STAGE), (1.5, 1.5), intervals=((0.0, 1.0),) * 2, autoguidance=True),
        Setting((STAGE, STAGE), (2.0, 2.0), intervals=((0.0, 1.0),) * 2, autoguidance=True),
    ],
}
# A fixed budget between the stages, two or more
SPLITS = [unguided(6, 18), unguided(18, 6), unguided(8, 8, 8), unguided(6, 6, 6, 6)]


def settings(name: str, step: int, steps: list[int], more_guidance: bool = False) -> list[Setting]:
    """How the run of a variant is sampled after `step`: most fully where it is compared, briefly before that."""
    at_end = step == steps[-1]
    more = MORE_GUIDANCE.get(name, []) if more_guidance and at_end else []
    if name == "class_only":
        # The last two steps are those of equal steps and equal time.
        first = [unguided(STAGE)] if step == steps[-2] else []
        guided = CLASS_ONLY_GUIDED if step in steps[-2:] else []
        return [*first, LONG, *guided, *more]
    if name == "dod":
        return [ALL_STAGES, REAL_PRIOR, *SPLITS, *DOD_GUIDED, *more] if at_end else [PAIR]
    if not at_end:
        return []
    return [PAIR, REAL_PRIOR] if VARIANTS[name].has_prior else [LONG]

"""Schedulers and prediction types beside those that test_pipeline_schedulers.py tries with every autoencoder."""

import inspect
import re

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin
from helpers import tiny_pipeline, tiny_transformer
from plain_sampling import plain_sample
from test_pipeline_schedulers import FLOW, FLOW_SCHEDULERS, NOISE_SCHEDULERS, assert_same

from diffusers_dod.compatibility import check_scheduler


FLOW_ONLY = {"flow": FLOW}
NOISE = {kind: {"prediction_type": kind} for kind in ("epsilon", "v_prediction")}
SAMPLE = {"sample": {"prediction_type": "sample"}}
CONFIGS = {
    "DEISMultistepScheduler": FLOW_ONLY | NOISE | SAMPLE,
    "DPMSolverSinglestepScheduler": FLOW_ONLY | NOISE | SAMPLE,
    "SASolverScheduler": FLOW_ONLY | NOISE | SAMPLE,
    "HeunDiscreteScheduler": NOISE | SAMPLE,
    "LMSDiscreteScheduler": NOISE | SAMPLE,
    "LCMScheduler": NOISE | SAMPLE,
    "TCDScheduler": NOISE | SAMPLE,
    "EulerAncestralDiscreteScheduler": NOISE,
    "KDPM2DiscreteScheduler": NOISE,
    "KDPM2AncestralDiscreteScheduler": NOISE,
    "EDMEulerScheduler": NOISE,
    "EDMDPMSolverMultistepScheduler": NOISE,
} | dict.fromkeys(dict.fromkeys(name for name, _ in NOISE_SCHEDULERS.values()), SAMPLE)
CASES = {f"{name}-{kind}": (name, config) for name, kinds in CONFIGS.items() for kind, config in kinds.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_guided_stages_equal_plain_sampling(case):
    name, config = CASES[case]

    def make_scheduler():
        return getattr(diffusers, name)(**config)

    pipe = tiny_pipeline(scheduler=make_scheduler())
    arguments = {"num_inference_steps": 3, "guidance_interval": (0, 1), "output_type": "latent"}
    output = pipe([1, 3], generator=torch.Generator().manual_seed(0), return_stages=True, **arguments)
    expected = plain_sample(pipe, make_scheduler, [1, 3], torch.Generator().manual_seed(0), scale=[1.5, 1.25])
    for sample, expected_sample in zip(output.stages, expected):
        assert_same(sample, expected_sample)


NOISE_CLASSES = dict.fromkeys([*CONFIGS, *(name for name, _ in NOISE_SCHEDULERS.values())])
FLOW_MATCH_CLASSES = [name for name, _ in FLOW_SCHEDULERS.values() if name.startswith("FlowMatch")]
REFUSED = [(name, "flow") for name in NOISE_CLASSES]
REFUSED += [(name, kind) for name in FLOW_MATCH_CLASSES for kind in ("epsilon", "v_prediction", "sample")]
REFUSED += [(name, "sample") for name, kinds in CONFIGS.items() if kinds is NOISE]


@pytest.mark.parametrize("name, kind", REFUSED)
def test_scheduler_of_another_prediction_is_refused(name, kind):
    pipe = tiny_pipeline(
        scheduler=getattr(diffusers, name)(), transformer=tiny_transformer(num_layers=0, prediction_type=kind)
    )
    with pytest.raises(ValueError, match="use `pipe.scheduler = "):
        pipe(1, num_inference_steps=1)


def make_all():
    """Every scheduler of diffusers that can be made, by itself and in the ways that users make it."""
    names = [name for name in dir(diffusers) if isinstance(getattr(diffusers, name), type)]
    classes = [getattr(diffusers, name) for name in names if issubclass(getattr(diffusers, name), SchedulerMixin)]
    classes.remove(SchedulerMixin)
    for scheduler in classes:
        parameters = inspect.signature(scheduler).parameters
        for config in (
            {"prediction_type": "flow_prediction"},
            {"use_karras_sigmas": True},
            {"use_dynamic_shifting": True},
            {"variance_type": "learned_range"},
            FLOW,
            {},
        ):
            if config.keys() <= parameters.keys():
                try:
                    yield scheduler(**config)
                except TypeError as error:
                    # Of other models, with arguments that have no default
                    print(f"{scheduler.__name__} cannot be made with {config}: {error}")


@pytest.mark.parametrize("kind", ["flow", "sample"])  # what fewest schedulers read
def test_every_scheduler_samples_or_is_refused_with_the_expression_that_does(kind):
    pipe, sampled, refused = tiny_pipeline(transformer=tiny_transformer(num_layers=0, prediction_type=kind)), set(), 0
    config = pipe.transformer.config
    for pipe.scheduler in make_all():
        try:
            check_scheduler(type(pipe.scheduler), pipe.scheduler.config, config)
        except ValueError as error:
            refused += 1
            expression = re.search(r"`pipe\.scheduler = (.+?)`", str(error))[1]
            pipe.scheduler = eval(expression, {"pipe": pipe, **vars(diffusers)})
            check_scheduler(type(pipe.scheduler), pipe.scheduler.config, config)
        changes = ("use_karras_sigmas", "use_dynamic_shifting", "variance_type")
        made = (type(pipe.scheduler), *(pipe.scheduler.config.get(name) for name in changes))
        if made not in sampled:
            options = {"num_stages": 1, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
            assert pipe(1, generator=torch.Generator().manual_seed(0), **options).images.isfinite().all(), made
        sampled.add(made)
    assert refused > 20 and len(sampled) > 5

"""Any value in any argument ends in a finite result of the right shape, or in one line that names the argument.

hypothesis draws the values, always the same ones. `DOD_EXAMPLES=5000 python -m pytest --timeout 0 tests/test_arguments.py` draws
that many others of each test.
"""

import inspect
import os
from decimal import Decimal
from fractions import Fraction

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffusers_dod.training
from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.arguments import LARGEST
from diffusers_dod.conversion import convert_backbone
from diffusers_dod.training import (
    DiffusionExample,
    REPAProjector,
    count_prior_rows,
    ddpm_example,
    dod_loss,
    drop_labels,
    flow_example,
    repa_loss,
)


EXAMPLES = int(os.environ.get("DOD_EXAMPLES", 0))


def examples(count):
    """`count` examples that are the same in every run, or `DOD_EXAMPLES` others."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TENSORS = [
    torch.zeros(()),
    torch.tensor(1),
    torch.tensor([1.0, 2.0]),
    torch.tensor([0, 1]),
    torch.tensor([True, False]),
    torch.zeros(0),
    torch.zeros(1, 3, 8, 8),
    torch.rand(2, 3, 8, 8),
    torch.rand(2, 3, 8, 8, dtype=torch.float64),
    torch.full((1, 3, 8, 8), torch.nan),
    torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    torch.zeros(1, 3, 8, 8, device="meta"),
    torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
    torch.zeros(1, 3, 8, 8).to_sparse(),
    torch.zeros(1, 16, 2),
    torch.rand(2, 16, 2),
    torch.zeros(3, 8, 8),
    torch.zeros(1, 0, 8, 8),
    torch.zeros(0, 3, 8, 8),
]
OBJECTS = [
    object(),
    len,
    int,
    Ellipsis,
    Decimal("0.5"),
    Fraction(1, 2),
    1j,
    slice(0, 2),
    torch.float32,
    torch.device("cpu"),
    torch.Generator(),
    torch.nn.Linear(2, 2),
    diffusers.DDIMScheduler(),
    np.float32(1.5),
    np.int64(2),
    np.bool_(True),
    np.str_("cat"),
    np.array(1),
    np.array([1, 2]),
    np.array([1.5]),
    np.array(["cat"]),
    np.array([None, object()], dtype=object),
    np.zeros((8, 8, 3), dtype=np.float32),
    np.zeros((1, 8, 8, 3), dtype=np.uint8),
    PIL.Image.new("RGB", (8, 8)),
    PIL.Image.new("I", (8, 8)),
    PIL.Image.new("L", (0, 3)),
]
NUMBERS = [-(10**400), -1, 0, 1, 2, 3, 7, 2**63, 10**30, 10**400, 0.0, -0.5, 0.3, 1.0, 1e38, 1e308]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.floats(), st.text(max_size=3), st.binary(max_size=2)
)
PLAIN = st.one_of(SCALARS, st.sampled_from(TENSORS), st.sampled_from(OBJECTS))
ANYTHING = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.tuples(PLAIN, PLAIN),
    st.lists(st.tuples(SCALARS, SCALARS), max_size=2),
    st.dictionaries(SCALARS, SCALARS, max_size=2),
    st.sets(st.integers(0, 3), max_size=2),
)


def value_of(*right):
    """One of the values that are right, or, as often, anything."""
    return st.one_of(st.sampled_from(right), ANYTHING)


def arguments(right, most=3):
    """Values of up to `most` of the arguments, each right or anything."""
    chosen = st.lists(st.sampled_from(sorted(right)), min_size=1, max_size=most, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: value_of(*right[name]) for name in names}))


def answer(function, names, *args, **kwargs):
    """The result, or `None` after an error that is one line and names one of the arguments."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and len(text) < 500, text
        assert any(name in text for name in names), text
        return None


# --- the pipeline's call


def make_pipeline():
    return tiny_pipeline(
        channels=3,
        transformer=tiny_transformer(in_channels=3, num_layers=1, num_classes=4),
        latent_embedder=tiny_embedder(in_channels=3, codes_mean=[0.1, -0.2], codes_std=[0.5, 2.0]),
        code_transformer=tiny_transformer(
            in_channels=2, sample_size=4, num_layers=1, num_classes=4, prediction_type="flow"
        ),
        code_scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        id2label={0: "cat", 1: "dog, hound"},
    )


PIPE = make_pipeline()
PICTURE = PIL.Image.new("RGB", (9, 7), "red")
CALL = {
    "class_labels": (
        0,
        3,
        None,
        "cat",
        "hound",
        [1, "cat", None],
        (2,),
        range(3),
        torch.tensor([1, 2]),
        np.array([3]),
    ),
    "num_stages": (None, 1, 2),
    "num_inference_steps": (1, 2, [1, 1], [2]),
    "guidance_scale": (None, 1.0, 1.5, 0, -1, [1.0, 2.0], [3]),
    "prior_guidance_scale": (None, 1.0, 0.5, [None, 2.0]),
    "guidance_drop": ("class", "prior", "both"),
    "guidance_interval": ((0.0, 1.0), (0.25, 0.75), [0, 1], [(0, 1), (0.5, 0.5)]),
    "num_images_per_prompt": (1, 2),
    "height": (None, 8, 4, 12),
    "width": (None, 8, 6),
    "generator": (None, torch.Generator(), [torch.Generator()], [torch.Generator(), torch.Generator()]),
    "latents": (None, torch.zeros(1, 3, 8, 8), torch.rand(2, 3, 4, 8)),
    "image": (None, PICTURE, [PICTURE, PICTURE], np.zeros((8, 8, 3), dtype=np.float32), -torch.rand(1, 3, 8, 8)),
    "output_type": ("pil", "np", "pt", "latent"),
    "return_dict": (True, False),
    "return_stages": (True, False),
    "callback_on_step_end": (
        None,
        lambda pipe, step, timestep, tensors: {},
        lambda *args: None,
        lambda *args: tensors_of(*args),
    ),
    "callback_on_step_end_tensor_inputs": (["latents"], [], ["latents", "prior_tokens"]),
    "prior_source": (None, "codes", "stage"),
    "codes": (None, torch.zeros(1, 16, 2), torch.rand(2, 16, 2)),
    "code_num_inference_steps": (1, 2),
    "code_guidance_scale": (None, 1.0, 2.0, 0),
    "code_noise_level": (None,),
}
SMALL = {"class_labels": 1, "num_inference_steps": 1, "code_num_inference_steps": 1, "output_type": "pt"}


def tensors_of(pipe, step, timestep, tensors):
    return tensors


def test_every_argument_of_the_call_is_drawn():
    assert set(CALL) == set(inspect.signature(DoDPipeline.__call__).parameters) - {"self"}


@examples(250)
@given(given_values=arguments(CALL))
def test_any_call_draws_or_says_what_is_wrong(given_values):
    """`Class` and `label` stand for `class_labels`, `multiples` for the sizes."""
    names = [*given_values, "Class", "label", "multiples of", "image has", "diverged"]
    values = {**SMALL, **given_values}
    output = answer(PIPE, names, **values)
    if output is None:
        return
    count = len(PIPE.prepare_class_labels(values["class_labels"])) * values.get("num_images_per_prompt", 1)
    images = output.images if isinstance(output, diffusers.utils.BaseOutput) else output[0]
    assert len(images) == count
    sample = images if torch.is_tensor(images) else torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    assert sample.isfinite().all()
    size = tuple(sample.shape[-2:]) if torch.is_tensor(images) else tuple(sample.shape[1:3])
    latents = values.get("latents")
    expected = (8, 8) if latents is None else tuple(latents.shape[-2:])
    assert size == tuple(values.get(name) or side for name, side in zip(("height", "width"), expected))


@pytest.mark.parametrize("name", ["height", "width"])
@pytest.mark.parametrize(
    "size", [torch.zeros(1, 3, 8, 8), np.zeros((9, 9)), [8] * 100, "8\n8"], ids=["tensor", "array", "list", "text"]
)
def test_a_size_that_is_none_is_one_short_line(name, size):
    with pytest.raises(ValueError, match="must be multiples of 2") as caught:
        PIPE(1, **{name: size})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


# --- constructors


TRANSFORMER = {
    "sample_size": (8, (8, 4), [4, 8]),
    "patch_size": (1, 2),
    "in_channels": (3, 4),
    "out_channels": (None, 3, 6),
    "num_layers": (0, 1),
    "num_attention_heads": (1, 2),
    "attention_head_dim": (4, 8),
    "num_classes": (0, 3),
    "mlp_ratio": (2, 4.0, 0.5),
    "adaln_rank": (None, 1, 3),
    "rope_theta": (100.0, 1000),
    "timestep_scale": (1.0, -0.001),
    "timestep_offset": (0.0, 1),
    "prediction_type": (None, "flow", "epsilon", "v_prediction", "sample"),
    "pos_embed_type": ("rope", "sincos", "rope_sincos"),
    "base_size": (16, 2),
    "activation_fn": ("swiglu", "gelu-approximate"),
    "qk_norm": (None, "layer_norm", "rms_norm"),
    "adaln_type": ("low_rank", "full"),
    "x_prediction": (False, True),
    "norm_type": ("layer_norm", "rms_norm"),
    "patch_bottleneck_dim": (None, 3),
    "in_context_len": (0, 2),
    "in_context_start": (0, 1),
    "noise_scale": (1.0, 2.0),
}
EMBEDDER = {
    "sample_size": (8, (8, 4)),
    "patch_size": (1, 2, 4),
    "in_channels": (3, 4),
    "num_encoder_layers": (0, 1),
    "num_decoder_layers": (0, 1),
    "num_attention_heads": (1, 2),
    "attention_head_dim": (4, 8),
    "bottleneck_dim": (1, 2),
    "output_dim": (16, 5),
    "output_patch_size": (None, 1, 2),
    "mlp_ratio": (2, 4.0),
    "rope_theta": (100.0, 1000),
    "codes_mean": (None, [0.0, 1.0], [0.5]),
    "codes_std": (None, [1.0, 2.0], (0.5, 1)),
    "noise_level_input": (False, True),
}
PROJECTOR = {"in_dim": (16,), "out_dim": (4,), "hidden_dim": (8,)}
TINY_TRANSFORMER = {
    "sample_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 3,
}
TINY_EMBEDDER = {
    "sample_size": 8,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "output_dim": 16,
    "bottleneck_dim": 2,
}
TINY_EMBEDDER |= {"num_attention_heads": 2, "attention_head_dim": 8}
TINY_PROJECTOR = {"in_dim": 16, "out_dim": 4, "hidden_dim": 8}
CONSTRUCTORS = {
    DoDTransformer2DModel: (TRANSFORMER, TINY_TRANSFORMER),
    DoDLatentEmbedder: (EMBEDDER, TINY_EMBEDDER),
    REPAProjector: (PROJECTOR, TINY_PROJECTOR),
}


def output_of(model):
    config = model.config
    if isinstance(model, REPAProjector):
        return model(torch.rand(1, 2, config.in_dim)), (1, 2, config.out_dim)
    sizes = config.sample_size if isinstance(config.sample_size, (tuple, list)) else [config.sample_size] * 2
    latents = torch.rand(2, config.in_channels, *sizes)
    if isinstance(model, DoDLatentEmbedder):
        tokens, codes = model(latents, return_dict=False)
        patch_size = config.output_patch_size or config.patch_size
        assert codes.shape == (
            2,
            (sizes[0] // config.patch_size) * (sizes[1] // config.patch_size),
            config.bottleneck_dim,
        )
        return tokens, (2, (sizes[0] // patch_size) * (sizes[1] // patch_size), config.output_dim)
    sample = model(latents, torch.tensor([1.0, 999.0]), torch.tensor([0, config.num_classes])).sample
    return sample, (2, config.out_channels or config.in_channels, *sizes)


@pytest.mark.parametrize("model_class", CONSTRUCTORS, ids=lambda each: each.__name__)
def test_every_argument_of_the_constructors_is_drawn(model_class):
    names = set(inspect.signature(model_class.__init__).parameters) - {"self", "args", "kwargs"}
    assert set(CONSTRUCTORS[model_class][0]) == names


@pytest.mark.parametrize("model_class", CONSTRUCTORS, ids=lambda each: each.__name__)
@examples(80)
@given(data=st.data())
def test_any_model_works_or_is_refused_by_name(model_class, data):
    right, tiny = CONSTRUCTORS[model_class]
    values = data.draw(arguments(right))
    model = answer(model_class, [*values, "The width is"], **{**tiny, **values})
    if model is None:
        return
    with torch.no_grad():
        result = answer(output_of, ["multiples of"], model)  # a size that the patch does not divide
    if result is not None:
        output, shape = result
        assert output.shape == shape and output.isfinite().all()
    assert model_class.from_config(model.config).config == model.config


COMPONENTS = {
    "transformer": (PIPE.transformer, PIPE.code_transformer),
    "latent_embedder": (PIPE.latent_embedder,),
    "scheduler": (PIPE.scheduler, diffusers.DDIMScheduler()),
    "vae": (None,),
    "id2label": (None, {}, {0: "cat"}, {"1": "dog, hound"}),
    "code_transformer": (None, PIPE.code_transformer, PIPE.transformer),
    "code_scheduler": (None, PIPE.code_scheduler),
    "guider": (None, diffusers.ClassifierFreeGuidance()),
    "weak_transformer": (None, PIPE.transformer),
    "code_guidance_scale": (1.0, 1.5),
}


@examples(80)
@given(values=arguments(COMPONENTS, most=2))
def test_any_pipeline_works_or_is_refused_by_name(values):
    assert set(COMPONENTS) == set(inspect.signature(DoDPipeline.__init__).parameters) - {"self"}
    names = [*values, *(name.replace("_", " ") for name in values), "code model", "no label names"]
    pipe = answer(DoDPipeline, names, **{**PIPE.components, "id2label": None, **values})
    if pipe is None:
        return
    pipe.set_progress_bar_config(disable=True)
    output = answer(pipe, names, **SMALL)
    assert output is None or (output.images.shape == (1, 3, 8, 8) and output.images.isfinite().all())


# --- training


LATENTS, LABELS = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
EXAMPLE = flow_example(LATENTS, torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.9]))
DDPM = diffusers.DDPMScheduler()
FUNCTIONS = {
    drop_labels: {
        "class_labels": (LABELS,),
        "num_classes": (4,),
        "probability": (0.1, 0, 1),
        "draws": (None, torch.tensor([0.2, 0.9])),
    },
    count_prior_rows: {"batch_size": (2, 7), "prior_drop": (0.5, 0, 1), "generator": (None, torch.Generator())},
    flow_example: {"latents": (LATENTS,), "noise": (LATENTS,), "sigmas": (torch.tensor([0.0, 1.0]),)},
    ddpm_example: {
        "latents": (LATENTS,),
        "noise": (LATENTS,),
        "timesteps": (torch.tensor([0, 999]),),
        "noise_scheduler": (DDPM, diffusers.DDPMScheduler(prediction_type="v_prediction")),
    },
    dod_loss: {
        "transformer": (PIPE.transformer,),
        "latent_embedder": (PIPE.latent_embedder, None),
        "latents": (LATENTS,),
        "class_labels": (LABELS,),
        "example": (
            EXAMPLE,
            EXAMPLE._replace(noisy=torch.rand(1, 3, 8, 8)),
            EXAMPLE._replace(target=None),
            EXAMPLE._replace(timesteps=torch.tensor(1.0)),
            tuple(EXAMPLE),
        ),
        "num_prior_rows": (1, 0, 2),
        "weighting": (None, torch.tensor([1.0, 2.0])),
        "code_noise": (None, torch.zeros(2, 16, 2)),
        "hidden_states_layer": (None, 1),
        "noise_level": (None, torch.tensor([0.0, 0.5])),
    },
    repa_loss: {"projected": (torch.rand(2, 3, 4),), "features": (torch.rand(2, 3, 4),)},
}


def test_every_function_of_the_training_is_drawn():
    tuples = {DiffusionExample, diffusers_dod.training.DoDLoss}  # hold what they are given
    public = {getattr(diffusers_dod.training, name) for name in diffusers_dod.training.__all__}
    assert {*FUNCTIONS, REPAProjector} == public - tuples
    for function, right in FUNCTIONS.items():
        assert set(right) == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: each.__name__)
@examples(60)
@given(data=st.data())
def test_any_training_function_works_or_says_what_is_wrong(function, data):
    right = FUNCTIONS[function]
    values = data.draw(arguments(right, most=2))
    values = {**{name: each[0] for name, each in right.items()}, **values}
    with torch.no_grad():
        # Of two tensors that do not fit each other, the second is named.
        result = answer(function, [*right, "`noisy`", "`target`", "`timesteps` of the example"], **values)
    if result is None:
        return
    if function is count_prior_rows:
        assert isinstance(result, int) and 0 <= result <= values["batch_size"]
    elif function is drop_labels:
        assert result.shape == values["class_labels"].shape and not result.is_floating_point()
    elif function in (flow_example, ddpm_example):
        shape = values["latents"].shape
        assert result.noisy.shape == result.target.shape == shape and result.noisy.is_floating_point()
        assert result.timesteps.shape == shape[:1]
    elif function is dod_loss:
        assert result.per_sample.shape == values["class_labels"].shape and result.total.shape == ()
    else:
        assert result.shape == ()


# --- conversion


CONVERSION = {
    "state_dict": ({},),
    "source": ("sit", "dit", "diffusers-dit", "fitv2"),
    "num_attention_heads": (2, 6),
    "sample_size": (None, 4, 8),
    "in_channels": (3, 4),
}


@examples(100)
@given(values=arguments(CONVERSION))
def test_any_conversion_says_what_is_wrong(values):
    """What is drawn is no checkpoint."""
    names = [*values, "the checkpoint"]
    tiny = {"state_dict": {"x": torch.zeros(2)}, "source": "sit", "num_attention_heads": 2}
    assert answer(convert_backbone, names, **{**tiny, **values}) is None


def test_the_largest_count_is_one_that_works():
    assert LARGEST > 10**6
    answer(DoDTransformer2DModel, ["`num_layers`"], num_layers=LARGEST + 1)

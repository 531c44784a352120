"""diffusers' guiders in the pipeline, against their formulas written out plainly, and what each of them cannot do."""

import copy
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, guiders
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from helpers import tiny_coded_pipeline, tiny_pipeline, tiny_transformer
from torch import nn

from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder


STEPS = 8


def sample(pipe, labels=(1, 3), **options):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "output_type": "latent"} | options
    return pipe(list(labels), generator=torch.Generator().manual_seed(0), return_stages=True, **options).stages


@torch.no_grad()
def plain_stages(pipe, guide, weak=None, drop="class", num_stages=2):
    """Euler's steps of every stage; `guide(step, conditional, other, weak)` gets predictions, the last on demand.

    `other` goes without the class; `weak()` is the prediction of the model `weak`, with the class or, given True, without.
    """
    transformer, labels = pipe.transformer, torch.tensor([1, 3])
    null, generator = torch.full_like(labels, 10), torch.Generator().manual_seed(0)
    sigmas, stages = torch.cat([torch.linspace(1000, 1, STEPS) / 1000, torch.zeros(1)]), []
    for _ in range(num_stages):
        prior = pipe.latent_embedder(stages[-1]).prior_tokens if stages else None
        x, memory = torch.randn(2, 4, 8, 8, generator=generator), {}
        for step in range(STEPS):
            time = torch.full((2,), 1000 * sigmas[step].item())

            def predict(model, ids, x=x, time=time, prior=prior):
                return model(x, time, ids, encoder_hidden_states=prior).sample

            def of_weak(without_class=False, predict=predict):
                return predict(weak, null if without_class else labels)

            other = predict(transformer, labels if drop == "nothing" else null)
            velocity = guide(step, predict(transformer, labels), other, of_weak, memory)
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        stages.append(x)
    return stages


def dot(a, b):
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


def norm(a):
    return dot(a, a).sqrt()


def cfg(step, cond, uncond, weak, memory):
    return (1 - 3) * uncond + 3 * cond


def cfg_rescaled_in_the_middle(step, cond, uncond, weak, memory):
    if not 2 <= step < 6:
        return cond * 1.0
    guided = cond + 2 * (cond - uncond)
    deviation = [each.flatten(1).std(1).view(-1, 1, 1, 1) for each in (cond, guided)]
    return 0.7 * guided * deviation[0] / deviation[1] + 0.3 * guided


def zero_star(step, cond, uncond, weak, memory):
    if step < 2:
        return torch.zeros_like(cond)
    uncond = uncond * dot(cond, uncond) / dot(uncond, uncond)
    return uncond + 2 * (cond - uncond)


def projected(cond, change, eta):
    parallel = cond * dot(change, cond) / dot(cond, cond)
    return change - parallel + eta * parallel


def apg(step, cond, uncond, weak, memory):
    memory["change"] = change = cond - uncond - 0.5 * memory.get("change", 0)
    change = change * (4 / norm(change)).clamp(max=1)
    return uncond + 2 * projected(cond, change, 0.25)


def apg_after_cfg(step, cond, uncond, weak, memory):
    memory["change"] = change = cond - uncond - 0.5 * memory.get("change", 0)
    if step <= 3:
        return uncond + 2 * (cond - uncond)
    change = change * (4 / norm(change)).clamp(max=1)
    return uncond + 3 * projected(cond, change, 0.0)


def tangential(step, cond, uncond, weak, memory):
    pair = torch.stack([cond, uncond], 1).flatten(2).double()
    _, vectors = torch.linalg.eigh(pair @ pair.mT)  # of the Gram matrix; the last is the largest
    main = nn.functional.normalize((vectors[:, :, -1:].mT @ pair)[:, 0], dim=1).float().view_as(cond)
    uncond = main * dot(uncond, main)
    return uncond + 2 * (cond - uncond)


def auto(step, cond, uncond, weak, memory):
    return weak(True) + 2 * (cond - weak(True))


def auto_of_the_class(step, cond, other, weak, memory):
    return weak() + 2 * (cond - weak())


def skip_layers(step, cond, uncond, weak, memory):
    guided = uncond + 2 * (cond - uncond)
    return guided + 1.5 * (cond - weak()) if 0 < step < 4 else guided


def frequencies(step, cond, uncond, weak, memory):
    from kornia.geometry import pyrdown, pyrup

    def bands(a):
        low = pyrdown(a)
        return a - pyrup(low), low

    high, low = (u + scale * (c - u) for c, u, scale in zip(bands(cond), bands(uncond), (3.0, 1.5)))
    return pyrup(low) + high


class AttentionToOneself(nn.Module):
    """Attention whose scores are the identity (PAG, arXiv 2403.17377)."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, hidden_states, rotary_emb=None):
        return self.attn.to_out[0](self.attn.to_v(hidden_states))


def weakened(transformer, kind):
    """A copy of a model whose second block is not there, or attends to nothing else."""
    transformer = copy.deepcopy(transformer)
    if kind == "skipped":
        del transformer.transformer_blocks[1]
    elif kind == "to itself":
        transformer.transformer_blocks[1].attn = AttentionToOneself(transformer.transformer_blocks[1].attn)
    return transformer


SKIP = {"indices": [1]}
MOMENTUM = {"adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 4.0}
# Guider, its arguments, the formula, how the other model is weakened, what a call drops
WORKING = {
    "ClassifierFreeGuidance": ({"guidance_scale": 3.0}, cfg, None, "class"),
    "ClassifierFreeGuidance-rescaled": (
        {
            "guidance_scale": 2.0,
            "guidance_rescale": 0.7,
            "use_original_formulation": True,
            "start": 0.25,
            "stop": 0.75,
        },
        cfg_rescaled_in_the_middle,
        None,
        "class",
    ),
    "ClassifierFreeZeroStarGuidance": ({"guidance_scale": 2.0, "zero_init_steps": 2}, zero_star, None, "class"),
    "AdaptiveProjectedGuidance": ({"guidance_scale": 2.0, "eta": 0.25} | MOMENTUM, apg, None, "class"),
    "AdaptiveProjectedMixGuidance": (
        {
            "guidance_scale": 2.0,
            "adaptive_projected_guidance_scale": 3.0,
            "adaptive_projected_guidance_start_step": 3,
        }
        | MOMENTUM,
        apg_after_cfg,
        None,
        "class",
    ),
    "TangentialClassifierFreeGuidance": ({"guidance_scale": 2.0}, tangential, None, "class"),
    "AutoGuidance": ({"guidance_scale": 2.0, "auto_guidance_config": SKIP}, auto, "skipped", "class"),
    "AutoGuidance-nothing": (
        {"guidance_scale": 2.0, "auto_guidance_config": SKIP},
        auto_of_the_class,
        "skipped",
        "nothing",
    ),
    "SkipLayerGuidance": (
        {
            "guidance_scale": 2.0,
            "skip_layer_guidance_scale": 1.5,
            "skip_layer_config": SKIP,
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.5,
        },
        skip_layers,
        "skipped",
        "class",
    ),
    "PerturbedAttentionGuidance": (
        {
            "guidance_scale": 2.0,
            "perturbed_guidance_scale": 1.5,
            "perturbed_guidance_layers": [1],
            "perturbed_guidance_start": 0.0,
            "perturbed_guidance_stop": 0.5,
        },
        skip_layers,
        "to itself",
        "class",
    ),
    "FrequencyDecoupledGuidance": ({"guidance_scales": [3.0, 1.5]}, frequencies, None, "class"),
}


def make_guider(case):
    name, (options, *_) = case.partition("-")[0], WORKING[case]
    if name == "FrequencyDecoupledGuidance":
        pytest.importorskip("kornia")
    return getattr(guiders, name)(**options)


@pytest.mark.parametrize("case", WORKING)
def test_a_guider_is_its_formula_in_every_stage(case):
    _, formula, kind, drop = WORKING[case]
    pipe = tiny_pipeline(guider=make_guider(case))
    expected = plain_stages(pipe, formula, weakened(pipe.transformer, kind), drop)
    stages = sample(pipe, guidance_drop=drop)
    torch.testing.assert_close(torch.stack(stages), torch.stack(expected), rtol=0, atol=2e-4)
    # It is gone where it is taken out, and so is what it did to layers.
    pipe.guider = None
    plain = sample(pipe, guidance_scale=1.0)
    assert (plain[-1] - stages[-1]).abs().max() > 1e-2
    assert torch.equal(plain[-1], sample(tiny_pipeline(), guidance_scale=1.0)[-1])


def test_the_guider_of_classifier_free_guidance_is_the_pipelines_own_bit_for_bit():
    own = sample(tiny_pipeline(), guidance_scale=2.0, guidance_interval=(0.25, 0.75), guidance_drop="both")
    guider = guiders.ClassifierFreeGuidance(2.0, start=0.25, stop=0.75)
    assert torch.equal(torch.stack(sample(tiny_pipeline(guider=guider), guidance_drop="both")), torch.stack(own))


REFUSED = {
    "LTX2Guidance": ({"guidance_scale": 2.0}, "guides by arguments of LTX-2's transformer"),
    "MagnitudeAwareGuidance": ({}, "cannot guide images: linalg.matrix_norm"),
    "SmoothedEnergyGuidance": (
        {"seg_guidance_config": SmoothedEnergyGuidanceConfig(indices=[1])},
        "does not count its branches",
    ),
    "AutoGuidance": ({"auto_guidance_layers": [1], "dropout": 1.0}, r"as a `LayerSkipConfig\(indices=\[1\]\)`"),
    "SkipLayerGuidance": ({"skip_layer_guidance_layers": 1}, r"as a `LayerSkipConfig\(indices=\[1\]\)`"),
    "PerturbedAttentionGuidance": (
        {"guidance_scale": 1.0, "perturbed_guidance_layers": [1], "perturbed_guidance_stop": 1.0},
        "only beside guidance by the class",
    ),
    "PerturbedAttentionGuidance-integer": (
        {"perturbed_guidance_layers": 1},
        r"as a `LayerSkipConfig\(indices=\[1\]\)`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_guider_that_would_do_nothing_or_fail_is_refused(case):
    options, message = REFUSED[case]
    if not hasattr(guiders, case.partition("-")[0]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {case.partition('-')[0]}")
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipeline(guider=getattr(guiders, case.partition("-")[0])(**options)))


def test_every_guider_of_diffusers_is_in_the_table():
    names = {name for name in dir(guiders) if isinstance(getattr(guiders, name), type)} - {"BaseGuidance"}
    assert names <= {case.partition("-")[0] for case in [*WORKING, *REFUSED]}
    page = Path(__file__).parents[1].joinpath("docs/support.md").read_text()
    assert all(f"\n| `{name}`" in page for name in names)


# What is refused above for a fault of diffusers, with diffusers alone. One that fails no longer is mended there: lift the
# refusal, and write its formula into WORKING.
def dit():
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 2, "sample_size": 4}
    return diffusers.DiTTransformer2DModel(**config | {"norm_num_groups": 1, "num_embeds_ada_norm": 10})


@pytest.mark.parametrize(
    "name, options, branches",
    [
        ("AutoGuidance", {"auto_guidance_layers": [1], "dropout": 1.0}, 2),
        ("AutoGuidance", {"auto_guidance_layers": 1, "dropout": 1.0}, 2),
        ("SkipLayerGuidance", {"skip_layer_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}, 3),
        ("PerturbedAttentionGuidance", {"perturbed_guidance_layers": 1, "perturbed_guidance_stop": 1.0}, 3),
    ],
)
def test_upstream_layers_become_integers(name, options, branches):
    guider, model = getattr(guiders, name)(**options), dit()
    guider.set_state(step=5, num_inference_steps=8, timestep=None)
    for _ in range(branches - 1):
        guider.prepare_models(model)
    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        guider.prepare_models(model)


def test_upstream_magnitude_aware_guidance_fails_on_images():
    guider = pytest.importorskip("diffusers.guiders.magnitude_aware_guidance").MagnitudeAwareGuidance()
    guider.set_state(step=0, num_inference_steps=1, timestep=None)
    with pytest.raises(RuntimeError, match="matrix_norm"):
        guider.forward(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))


def test_upstream_smoothed_energy_guidance_changes_no_layer():
    guider = guiders.SmoothedEnergyGuidance(2.0, seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[1]))
    model = dit()
    guider.set_state(step=5, num_inference_steps=8, timestep=None)
    assert len(guider.prepare_inputs({})) == 3
    for _ in range(3):
        guider.prepare_models(model)
    assert guider._count_prepared == 0
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


def test_upstream_perturbed_attention_alone_changes_no_layer():
    guider = guiders.PerturbedAttentionGuidance(1.0, perturbed_guidance_layers=[1], perturbed_guidance_stop=1.0)
    guider.set_state(step=5, num_inference_steps=8, timestep=None)
    conditions = guider.prepare_inputs({"class_labels": ("class", "null")})
    assert [batch.class_labels for batch in conditions] == ["class", "null"]  # both should be the class's
    model = dit()
    for _ in conditions:
        guider.prepare_models(model)
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


@pytest.mark.parametrize(
    "name, value", [("guidance_scale", 2.0), ("prior_guidance_scale", 2.0), ("guidance_interval", (0.0, 1.0))]
)
def test_arguments_that_the_guider_has_of_its_own_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is given, but ClassifierFreeGuidance guides"):
        sample(tiny_pipeline(guider=guiders.ClassifierFreeGuidance(2.0)), **{name: value})


@pytest.mark.parametrize("guider", [2.0, diffusers.DDIMScheduler, "apg"])
def test_what_is_no_guider_is_refused(guider):
    pipe = tiny_pipeline()
    pipe.guider = guider
    with pytest.raises(ValueError, match="must be one of diffusers' guiders"):
        sample(pipe)


def test_a_failing_forward_leaves_no_layer_skipped():
    pipe = tiny_pipeline(guider=make_guider("AutoGuidance"))
    handle = pipe.transformer.transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(pipe)
    handle.remove()
    pipe.guider = None
    assert torch.equal(sample(pipe)[-1], sample(tiny_pipeline())[-1])


def test_the_code_model_is_guided_by_its_own_scale():
    own, guided = tiny_coded_pipeline(), tiny_coded_pipeline(guider=guiders.ClassifierFreeGuidance(2.0))
    options = {"num_inference_steps": 4, "code_num_inference_steps": 3, "output_type": "latent"}

    def draw(pipe, **more):
        return pipe([1, 3], generator=torch.Generator().manual_seed(0), **options | more)

    expected = draw(own, guidance_scale=2.0, guidance_interval=(0.0, 1.0), code_guidance_scale=1.5)
    output = draw(guided, code_guidance_scale=1.5)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.images, expected.images)
    assert not torch.equal(draw(guided).codes, output.codes)


@pytest.mark.parametrize("case", ["AdaptiveProjectedGuidance", "PerturbedAttentionGuidance"])
def test_with_a_list_of_generators_an_image_does_not_depend_on_its_batch(case):
    pipe = tiny_pipeline(guider=make_guider(case))

    def draw(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(labels, generator=generators, num_inference_steps=STEPS, output_type="latent").images

    torch.testing.assert_close(draw([1, 3], [5, 6])[1:], draw([3], [6]), atol=1e-4, rtol=1e-4)


def test_a_callback_changes_the_guiders_scale():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.guider.guidance_scale, pipe.do_classifier_free_guidance))
        pipe.guider.guidance_scale = 1.0
        return {}

    pipe = tiny_pipeline(guider=guiders.ClassifierFreeGuidance(3.0))
    stages = sample(pipe, num_stages=1, callback_on_step_end=callback)
    assert seen == [(3.0, True)] + [(1.0, True)] * (STEPS - 1)

    def formula(step, cond, uncond, weak, memory):
        return uncond + 3 * (cond - uncond) if step == 0 else cond

    torch.testing.assert_close(stages, plain_stages(pipe, formula, num_stages=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["ClassifierFreeGuidance", "ClassifierFreeGuidance-rescaled", "AutoGuidance"])
def test_with_a_feature_cache(case):
    plain = sample(tiny_pipeline(guider=make_guider(case)))[-1]
    pipe = tiny_pipeline(guider=make_guider(case))  # before 0.41 diffusers' caches want a model that never ran
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))  # whose every step is computed
    if case == "AutoGuidance":
        with pytest.raises(ValueError, match="AutoGuidance changes layers, whose outputs a cache keeps"):
            sample(pipe)
    else:
        assert torch.equal(sample(pipe)[-1], plain)
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        assert (sample(pipe)[-1] - plain).abs().max() > 1e-3


def test_a_learned_variance_is_kept_of_the_first_branch():
    transformer = tiny_transformer(in_channels=4, out_channels=8)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    options = {"transformer": transformer, "scheduler": scheduler}
    own = sample(tiny_pipeline(**options), guidance_scale=2.0, guidance_interval=(0.0, 1.0))
    guided = sample(tiny_pipeline(**options, guider=guiders.ClassifierFreeGuidance(2.0)))
    assert torch.equal(torch.stack(guided), torch.stack(own))


@pytest.mark.parametrize("skip", [SKIP, LayerSkipConfig(indices=[1])], ids=["dict", "object"])
def test_a_guider_is_saved_and_loaded_by_the_package_and_by_the_repositorys_own_code(skip, tmp_path):
    pipe = tiny_pipeline()
    pipe.guider = guiders.AutoGuidance(guidance_scale=2.0, auto_guidance_config=skip)  # set later than made
    pipe.weak_transformer, expected = None, sample(pipe)[-1]
    pipe.save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(loaded)[-1], expected)
    carried = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(carried).__module__.startswith("diffusers_modules")
    assert torch.equal(sample(carried)[-1], expected)
    assert check_folder(tmp_path, "apache-2.0") == []
    assert DoDPipeline.from_pretrained(tmp_path, guider=None).guider is None


# A weaker model
def test_a_weaker_model_makes_the_second_branch():
    weak = tiny_transformer(num_layers=1)
    pipe = tiny_pipeline(weak_transformer=weak)
    expected = plain_stages(pipe, auto_of_the_class, weak)
    stages = sample(pipe, guidance_scale=2.0, guidance_interval=(0.0, 1.0))
    torch.testing.assert_close(torch.stack(stages), torch.stack(expected), rtol=0, atol=1e-4)
    without_class = sample(pipe, guidance_scale=2.0, guidance_interval=(0.0, 1.0), guidance_drop="class")
    expected = plain_stages(pipe, auto, weak)
    torch.testing.assert_close(torch.stack(without_class), torch.stack(expected), rtol=0, atol=1e-4)


def test_a_guider_combines_a_weaker_model():
    pipe = tiny_pipeline(
        weak_transformer=tiny_transformer(num_layers=1), guider=make_guider("AdaptiveProjectedGuidance")
    )
    expected = plain_stages(
        pipe, lambda step, cond, _, weak, memory: apg(step, cond, weak(), None, memory), pipe.weak_transformer
    )
    torch.testing.assert_close(torch.stack(sample(pipe)), torch.stack(expected), rtol=0, atol=2e-4)


def test_a_weaker_model_guides_stage_1_even_without_the_prior_alone():
    pipe = tiny_pipeline(weak_transformer=tiny_transformer(num_layers=1))
    stages = sample(pipe, guidance_drop="prior", guidance_scale=2.0)
    assert (stages[0] - sample(pipe, guidance_scale=1.0)[0]).abs().max() > 1e-3


def test_a_weaker_model_is_saved_and_loaded_with_its_own_code(tmp_path):
    pipe = tiny_pipeline(weak_transformer=tiny_transformer(num_layers=1))
    expected = sample(pipe)[-1]
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "weak_transformer/diffusers_dod.py").is_file()
    assert torch.equal(sample(DoDPipeline.from_pretrained(tmp_path))[-1], expected)
    carried = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(sample(carried)[-1], expected)
    assert check_folder(tmp_path, "apache-2.0") == []
    without = DoDPipeline.from_pretrained(tmp_path, weak_transformer=None)
    assert torch.equal(sample(without)[-1], sample(tiny_pipeline())[-1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 4}, "`num_classes` is 4 but the transformer's is 10"),
        ({"attention_head_dim": 4}, "width is 8 but the transformer's is 16"),
        ({"prediction_type": "flow"}, "`prediction_type` is flow but the transformer's is None"),
    ],
)
def test_a_weaker_model_of_another_kind_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(weak_transformer=tiny_transformer(**options))


@pytest.mark.parametrize(
    "components, options, message",
    [
        ({}, {"guidance_drop": "nothing"}, "both branches are the same model's"),
        ({"weak_transformer": True}, {"prior_guidance_scale": 2.0}, "has three branches"),
        ({"weak_transformer": True, "guider": True}, {}, "`weak_transformer` is one"),
    ],
)
def test_arguments_that_contradict_the_components_are_refused(components, options, message):
    made = {"weak_transformer": lambda: tiny_transformer(num_layers=2), "guider": lambda: make_guider("AutoGuidance")}
    with pytest.raises(ValueError, match=message):
        sample(tiny_pipeline(**{name: made[name]() for name in components}), **options)

"""Nonsense is refused in one line that names it: constructors, calls, schedulers, results, folders."""

import copy
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from safetensors.torch import load_file, save_file

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.evaluation import metrics


NONSENSE = [
    *({"num_layers": value} for value in (-1, -3, 1.5, "two", True, None)),
    *({"num_attention_heads": value} for value in (0, -2, 2.0)),
    *({"attention_head_dim": value} for value in (0, -8, 6)),
    *({"patch_size": value} for value in (0, -1, 2.0, [2])),
    *({"sample_size": value} for value in (0, -8, 8.0, (8, 0), (8, 8, 8), "large")),
    *({"in_channels": value} for value in (0, -4)),
    *({"out_channels": value} for value in (0, -4)),
    *({"num_classes": value} for value in (-1, 2.5)),
    *({"adaln_rank": value} for value in (0, -1)),
    *({"patch_bottleneck_dim": value} for value in (0, -1)),
    *({"in_context_len": value} for value in (-1, 2.0)),
    *({"in_context_start": value} for value in (-1, None)),
    *({name: value} for name in ("mlp_ratio", "rope_theta", "noise_scale") for value in (0, -1.0, math.nan, math.inf)),
    *({name: value} for name in ("timestep_scale", "timestep_offset") for value in (math.nan, math.inf, "1")),
    *(
        {name: "nonsense"}
        for name in ("prediction_type", "pos_embed_type", "activation_fn", "qk_norm", "adaln_type", "norm_type")
    ),
]
EMBEDDER_NAMES = ("patch_size", "sample_size", "in_channels", "num_attention_heads", "attention_head_dim", "mlp_ratio")


@pytest.mark.parametrize("values", NONSENSE, ids=str)
def test_constructors_refuse_nonsense_by_name(values):
    config = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    (name,) = values
    with pytest.raises(ValueError, match=f"`{name}` is|width is") as error:
        DoDTransformer2DModel(**config | values)
    assert "\n" not in str(error.value)
    if name in EMBEDDER_NAMES:
        config = {"sample_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 1, "output_dim": 16}
        with pytest.raises(ValueError, match=f"`{name}` is"):
            DoDLatentEmbedder(**config | {"num_attention_heads": 2, "attention_head_dim": 8} | values)


@pytest.mark.parametrize(
    "values",
    [
        {"bottleneck_dim": 0},
        {"output_dim": -16},
        {"output_patch_size": 0},
        {"num_encoder_layers": -1},
        {"rope_theta": 0},
    ],
    ids=str,
)
def test_the_embedder_s_own_sizes(values):
    with pytest.raises(ValueError, match=f"`{next(iter(values))}` is"):
        tiny_embedder(**values)
    tiny_embedder(num_encoder_layers=0, num_decoder_layers=0)


CALLS = [
    *({"generator": value} for value in (7, (torch.Generator(),), [7], [None], "seed", torch.tensor(3))),
    *({name: value} for name in ("height", "width") for value in (8.0, "8", -8, 0, True, 7)),
    *(
        {"latents": value}
        for value in (torch.zeros(1, 4, 8, 8, dtype=torch.complex64), torch.zeros(1, 4, 8, 8).bool())
    ),
    *({"latents": value} for value in (torch.zeros(1, 4, 8, 8, device="meta"), [1.0], torch.zeros(4, 8, 8))),
    *({"guidance_scale": value} for value in (math.nan, math.inf, "strong", True, [1.0, True])),
    *({"num_inference_steps": value} for value in (0, 2.0, "few", [2, None], True)),
    *({"num_stages": value} for value in (0, -1, 1.5, True, "two")),
    *({"guidance_interval": value} for value in ((0.5, 0.2), (0, 2), (math.nan, 1), 0.5, "all")),
    {"output_type": "jpg"},
    {"prior_source": "image"},
    {"callback_on_step_end_tensor_inputs": ["noise"]},
]


@pytest.mark.parametrize("options", CALLS, ids=[f"{next(iter(call))}-{i}" for i, call in enumerate(CALLS)])
def test_calls_refuse_nonsense_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"`{name}`|multiples of|generators for") as error:
        tiny_pipeline()([1], **{"num_inference_steps": 1} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("class_id", [10, 99, -1])
def test_a_name_of_a_class_that_the_model_lacks_is_refused(class_id):
    pipe = tiny_pipeline(id2label={0: "cat", class_id: "ghost"})
    with pytest.raises(ValueError, match=f"'ghost' names class {class_id}, but the model has 10 classes"):
        pipe("ghost", num_inference_steps=1)
    assert pipe("cat", num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True
        ),
        diffusers.DEISMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_sample_that_diverged_is_an_error_and_no_black_picture(scheduler, output_type):
    pipe = tiny_pipeline(scheduler=scheduler, channels=3)
    with pytest.raises(ValueError, match=f"NaN or infinite values: {type(scheduler).__name__} diverged"):
        pipe([1], num_inference_steps=6, output_type=output_type)


DIVERGING = {
    "guidance of both stages": ({"guidance_scale": 3e37, "guidance_interval": (0, 1)}, {}),
    "guidance of the second stage": ({"guidance_scale": [1.0, -1e38], "guidance_interval": (0, 1)}, {}),
    "guidance by the prior": ({"prior_guidance_scale": 1e38, "guidance_interval": (0, 1)}, {}),
    "noise of the user's": ({"latents": torch.full((1, 3, 8, 8), 3e38)}, {}),
    "a terminal shift with one step": ({"num_inference_steps": 1}, {"shift_terminal": 0.1}),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_what_diverges_does_so_aloud(name):
    options, scheduler = DIVERGING[name]
    pipe = tiny_pipeline(channels=3, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler diverged. Lower `guidance_scale`"):
        pipe([1], **{"num_inference_steps": 4} | options)


@pytest.mark.parametrize("where", ["scheduler", "code_scheduler"])
def test_dynamic_shifting_is_refused_before_anything_is_drawn(where):
    pipe = tiny_coded_pipeline(**{where: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)})
    with pytest.raises(
        ValueError,
        match=rf"`pipe.{where} = FlowMatch\w+.from_config\(pipe.{where}.config, use_dynamic_shifting=False\)",
    ):
        pipe([1], num_inference_steps=1)


FROM_PIPE = {
    "all of a code model": {},
    "another scheduler": {"scheduler": diffusers.FlowMatchHeunDiscreteScheduler()},
    "no code model": {"code_transformer": None, "code_scheduler": None},
    "a guider": {"guider": ClassifierFreeGuidance(2.0)},
    "an autoencoder": {"vae": tiny_vae()},
    "other labels": {"id2label": {0: "owl"}},
}


@pytest.mark.parametrize("name", FROM_PIPE)
def test_from_pipe_shares_models_and_labels(name):
    pipe, given = tiny_coded_pipeline(id2label={0: "cat", 1: "dog"}), FROM_PIPE[name]
    other = DoDPipeline.from_pipe(pipe, **given)
    assert other is not pipe
    assert all(other.components[part] is given.get(part, pipe.components[part]) for part in pipe.components)
    assert other.labels == ({"owl": [0]} if "id2label" in given else {"cat": [0], "dog": [1]})
    assert (
        other("owl" if "id2label" in given else "cat", num_inference_steps=1, output_type="latent").images is not None
    )


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_takes_a_type_and_refuses_what_it_does_not_know(name):
    assert DoDPipeline.from_pipe(tiny_pipeline(), **{name: torch.bfloat16}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has no component 'unet'"):
        DoDPipeline.from_pipe(tiny_pipeline(), unet=None)


MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OF_THREADS = {
    "stages": lambda: tiny_pipeline(),
    "codes": lambda: tiny_coded_pipeline(),
    "two calls a step": lambda: tiny_pipeline(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()),
    "a scheduler with a memory": lambda: tiny_pipeline(scheduler=diffusers.UniPCMultistepScheduler(**MULTISTEP)),
    "a guider": lambda: tiny_pipeline(guider=ClassifierFreeGuidance(3.0, start=0.2, stop=0.6)),
    "a guider with a memory": lambda: tiny_pipeline(
        guider=AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
    ),
}


@pytest.mark.parametrize("name", OF_THREADS)
def test_threads_with_pipelines_of_their_own_draw_what_each_draws_alone(name):
    """As `docs/how-it-works.md` says; the two take their steps by turns."""
    pipe = OF_THREADS[name]()
    own = {part: copy.deepcopy(pipe.components[part]) for part in ("scheduler", "code_scheduler", "guider")}
    pipes, turns = (pipe, DoDPipeline.from_pipe(pipe, **own)), threading.Barrier(2)
    pipes[1].set_progress_bar_config(disable=True)

    def draw(number, **options):
        options |= {"num_inference_steps": 5, "code_num_inference_steps": 5, "output_type": "latent"}
        return pipes[number]([number], generator=torch.Generator().manual_seed(number), **options).images

    def take_turns(*_):
        turns.wait(20)
        return {}

    alone = [draw(number) for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda number: draw(number, callback_on_step_end=take_turns), range(2)))
    assert all(torch.equal(one, other) for one, other in zip(together, alone))


ORIGINALS = {
    "pipeline": lambda: tiny_pipeline(),
    "coded pipeline": lambda: tiny_coded_pipeline(id2label={0: "cat", 1: "dog"}),
    "LightningDiT's positions": lambda: tiny_pipeline(
        transformer=tiny_transformer(in_channels=4, pos_embed_type="rope_sincos", adaln_type="full", qk_norm=None)
    ),
    "another scheduler": lambda: tiny_pipeline(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()),
    "bfloat16": lambda: tiny_pipeline().to(torch.bfloat16),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_deep_copy_draws_the_same_and_shares_nothing(name):
    """Also after it was used, in whatever mode; the copy can be trained."""
    pipe = ORIGINALS[name]()

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe([1], num_inference_steps=2, output_type="latent", generator=generator).images

    with torch.inference_mode():
        expected = draw(pipe).clone()
    noise, ids = torch.randn(1, 4, 8, 8, dtype=pipe.dtype), torch.tensor([1])
    pipe.transformer(noise, torch.tensor([500.0]), ids)
    copied = copy.deepcopy(pipe)
    assert torch.equal(draw(copied), expected) and copied.scheduler is not pipe.scheduler
    copied.transformer(noise, torch.tensor([500.0]), ids).sample.sum().backward()
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(1)
    assert torch.equal(draw(copied), expected)


@pytest.mark.parametrize("component", ["transformer", "latent_embedder", "code_transformer"])
def test_a_folder_whose_weights_lack_a_tensor_is_refused(component, tmp_path):
    tiny_coded_pipeline().save_pretrained(tmp_path)
    file = tmp_path / component / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the weights of `{component}` lack {name}"):
        DoDPipeline.from_pretrained(tmp_path)
    # One that is at hand is not looked at.
    given = getattr(tiny_coded_pipeline(), component)
    assert getattr(DoDPipeline.from_pretrained(tmp_path, **{component: given}), component) is given


def test_weights_in_shards_and_variants_are_whole(tmp_path):
    pipe = tiny_pipeline(transformer=tiny_transformer(in_channels=4, num_layers=4))
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded/transformer").glob("*.safetensors"))) > 1
    DoDPipeline.from_pretrained(tmp_path / "sharded")
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    DoDPipeline.from_pretrained(tmp_path / "variant", variant="fp16")
    index = json.loads((tmp_path / "sharded/model_index.json").read_text())
    assert index["transformer"][1] == "DoDTransformer2DModel"


NAN, FINE = torch.full((40, 4), math.nan), torch.randn(40, 4)
ONE_BAD = torch.where(torch.arange(40)[:, None] == 7, math.inf, FINE)


@pytest.mark.parametrize("bad", [NAN, ONE_BAD, -ONE_BAD], ids=["NaN", "one infinite", "one minus infinite"])
@pytest.mark.parametrize("name", ["precision_recall", "density_coverage", "kernel_distance"])
def test_metrics_of_features_that_are_not_finite_are_refused(name, bad):
    for pair in ((bad, FINE), (FINE, bad)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            getattr(metrics, name)(*pair)
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.feature_statistics(bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.inception_score(bad)


@pytest.mark.parametrize("count, splits", [(3, 10), (9, 10), (1, 2)])
def test_a_score_of_fewer_samples_than_splits_is_refused(count, splits):
    with pytest.raises(ValueError, match=f"{count} samples cannot be split into {splits} parts"):
        metrics.inception_score(FINE[:count], splits=splits)

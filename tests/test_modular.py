"""The blocks of Modular Diffusers draw what `DoDPipeline` does, bit for bit."""

import json

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance, DDPMScheduler, ModularPipeline
from helpers import tiny_coded_pipeline, tiny_pipeline, tiny_transformer, tiny_vae
from test_code_noise import reading_embedder

from diffusers_dod import DoDPipeline, DoDStages


LABELS = {1: "crane, bird", 3: "tench"}
PIPELINES = {
    "autoencoder": lambda: tiny_pipeline(vae=tiny_vae("kl"), id2label=LABELS),
    "codes": lambda: tiny_coded_pipeline(id2label=LABELS),
    "guided codes": lambda: tiny_coded_pipeline(code_guidance_scale=1.7),
    "noisy codes": lambda: tiny_coded_pipeline(latent_embedder=reading_embedder()),
    "weaker model": lambda: tiny_pipeline(weak_transformer=tiny_transformer(num_layers=1)),
    "own guider": lambda: tiny_pipeline(guider=ClassifierFreeZeroStarGuidance(guidance_scale=1.5)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("pipeline") for name in PIPELINES}
    for name, make in PIPELINES.items():
        make().save_pretrained(folders[name])
    return folders


def load(folder):
    pipe = DoDStages().init_pipeline(folder)
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels, **arguments):
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    if isinstance(pipe, DoDPipeline):
        return pipe(labels, **options | arguments).images
    return pipe(class_labels=labels, output="images", **options | arguments)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("autoencoder", {}),
        ("autoencoder", {"num_stages": 3, "num_inference_steps": [2, 4, 3]}),
        ("autoencoder", {"num_images_per_prompt": 2, "height": 32, "width": 16}),
        ("autoencoder", {"latents": noise(2, 4, 8, 8), "guidance_drop": "both"}),
        ("autoencoder", {"image": noise(3, 16, 16).clamp(0, 1)}),
        ("autoencoder", {"output_type": "latent"}),
        ("codes", {"code_num_inference_steps": 3, "code_guidance_scale": 2.0}),
        ("codes", {"prior_source": "stage"}),
        ("guided codes", {}),
        ("guided codes", {"code_guidance_scale": 1.0}),
        ("codes", {"codes": noise(1, 16, 2), "num_stages": 2}),
        ("noisy codes", {"code_noise_level": 0.5, "num_stages": 2}),
        ("weaker model", {}),
        ("own guider", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_blocks_draw_what_the_pipeline_does(name, arguments, folders):
    modular, pipe = load(folders[name]), DoDPipeline.from_pretrained(folders[name])
    assert type(modular.guider) is (ClassifierFreeZeroStarGuidance if name == "own guider" else ClassifierFreeGuidance)
    pipe.set_progress_bar_config(disable=True)
    pipe.guider = modular.guider
    labels = ["bird" if pipe.labels else 1, None]
    images = draw(modular, labels, **arguments)
    assert torch.equal(images, draw(pipe, labels, **arguments))
    modular.update_components(guider=ClassifierFreeZeroStarGuidance(guidance_scale=2.0, start=0.0, stop=1.0))
    pipe.guider = modular.guider
    guided = draw(modular, labels, **arguments)
    assert torch.equal(guided, draw(pipe, labels, **arguments)) and not torch.equal(guided, images)


def test_wrong_arguments_are_refused(folders):
    pipe = load(folders["autoencoder"])
    with pytest.raises(ValueError, match="'crow' is not a label"):
        draw(pipe, "crow")
    for name, value, message in (
        ("num_inference_steps", 0, "`num_inference_steps` is 0"),
        ("height", 17, "multiples of 4"),
        ("num_stages", 0, "`num_stages` is 0"),
        ("prior_source", "codes", "no code model"),
        ("guidance_drop", "prompt", "`guidance_drop` is 'prompt'"),
        ("output_type", "jpeg", "`output_type` is 'jpeg'"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, 1, **{name: value})
    coded = load(folders["codes"])
    for name, value, message in (
        ("output_type", "pil", "they are latents, not pictures"),
        ("code_guidance_scale", float("nan"), "`code_guidance_scale` is nan"),
        ("height", 10, "does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(coded, 1, **{name: value})
    for name in ("scheduler", "code_scheduler"):
        whole = getattr(coded, name)
        setattr(coded, name, None)
        with pytest.raises(ValueError, match=f"`{name}` is None"):
            draw(coded, 1)
        setattr(coded, name, whole)
    coded.code_scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="`pipe.code_scheduler = "):
        draw(coded, 1)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        draw(pipe, 1, output_type="latent")
    with pytest.raises(ValueError, match="load_components"):
        draw(DoDStages().init_pipeline(folders["autoencoder"]), [1])


def test_a_module_that_the_index_names_is_not_imported(folders, tmp_path, monkeypatch):
    index = json.loads((folders["codes"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["evil_module", "Evil"]}))
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="import evil_module first"):
        DoDStages().init_pipeline(tmp_path)


def test_a_folder_is_refused_without_trust_and_whole_when_saved_again(folders, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ModularPipeline.from_pretrained(str(folders["codes"]))
    pipe = ModularPipeline.from_pretrained(str(folders["codes"]), trust_remote_code=True)
    pipe.load_components()
    expected = draw(load(folders["codes"]), ["bird", 3])
    assert torch.equal(draw(pipe, ["bird", 3]), expected)
    assert type(pipe.transformer).__module__.endswith("block")  # the folder's own code

    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    pipe.blocks.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert "diffusers_modules" not in json.dumps(index)
    assert (tmp_path / "block.py").read_text() == (folders["codes"] / "block.py").read_text()
    again = ModularPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)
    again.load_components()
    assert torch.equal(draw(again, ["bird", 3]), expected)
    assert again.code_transformer is not None and again.config.id2label == pipe.config.id2label
    guided = ModularPipeline.from_pretrained(str(folders["guided codes"]), trust_remote_code=True)
    assert guided.config.code_guidance_scale == 1.7
    noisy = ModularPipeline.from_pretrained(str(folders["noisy codes"]), trust_remote_code=True)
    noisy.load_components()
    assert torch.equal(draw(noisy, [1, 3]), draw(load(folders["noisy codes"]), [1, 3]))


def test_a_pipeline_of_other_blocks(folders):
    """Blocks can be taken out and put in, as in diffusers' own."""
    blocks = DoDStages()
    blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline(folders["autoencoder"])
    pipe.load_components()
    state = pipe(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    samples = state.get("stage_samples")
    assert len(samples) == 2 and torch.equal(samples[-1], state.get("sample"))
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)

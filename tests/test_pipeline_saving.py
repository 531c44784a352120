"""Pipeline folders: what is saved is what is loaded, bit for bit."""

import json
import shutil

import diffusers
import pytest
import torch
from helpers import tiny_pipeline, tiny_transformer, tiny_vae

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel


LABELS = {0: "tench, Tinca tinca", 3: "Hüpfball, 跳跳球", 4: "crane"}


def sample(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"} | arguments
    return pipe([3, 1], generator=torch.Generator().manual_seed(0), **arguments).images


AUTOENCODERS = [None, "kl", "tiny", "dc", "rae"]


@pytest.mark.parametrize("autoencoder", AUTOENCODERS)
def test_folder_gives_the_same_images(autoencoder, tmp_path):
    vae = autoencoder and tiny_vae(autoencoder)
    pipe = tiny_pipeline(
        vae=vae,
        channels=64 if autoencoder == "rae" else 4,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        id2label=LABELS,
    )
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path)
    assert (loaded.vae is None) == (autoencoder is None)
    assert torch.equal(sample(loaded), expected)
    # Again, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(sample(DoDPipeline.from_pretrained(tmp_path / "again")), expected)


def test_names_survive(tmp_path):
    tiny_pipeline(id2label=LABELS).save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path)
    assert loaded.get_label_ids(["Tinca tinca", "跳跳球", "Hüpfball", "crane"]) == [0, 3, 3, 4]
    assert loaded.config.id2label == {str(class_id): name for class_id, name in LABELS.items()}
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["id2label"]["3"] == "Hüpfball, 跳跳球"


def test_pipeline_without_names_stays_without(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path)
    assert loaded.config.id2label is None and loaded.labels == {}


def test_components_load_alone(tmp_path):
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    pipe.save_pretrained(tmp_path)
    rebuilt = DoDPipeline(
        transformer=DoDTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer"),
        latent_embedder=DoDLatentEmbedder.from_pretrained(tmp_path, subfolder="latent_embedder"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        vae=diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae"),
    )
    assert torch.equal(sample(rebuilt), sample(pipe))


@pytest.mark.parametrize("name", ["transformer", "latent_embedder", "vae", "weak_transformer"])
def test_auto_model_loads_the_models_of_a_folder_where_the_package_is_imported(name, tmp_path):
    pipe = tiny_pipeline(vae=tiny_vae("kl"), weak_transformer=tiny_transformer(num_layers=1))
    pipe.save_pretrained(tmp_path)
    model = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder=name)
    assert type(model) is type(getattr(pipe, name))
    weights, expected = model.state_dict(), getattr(pipe, name).state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


def test_component_given_at_loading_replaces_the_saved_one(tmp_path):
    tiny_pipeline(vae=tiny_vae("kl")).save_pretrained(tmp_path)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    loaded = DoDPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    assert loaded.scheduler is scheduler
    assert DoDPipeline.from_pretrained(tmp_path, vae=None).spatial_factor == 1


@pytest.mark.parametrize("name, dtype", [("dtype", torch.bfloat16), ("torch_dtype", torch.float16)])
def test_dtype_at_loading(name, dtype, tmp_path):
    tiny_pipeline(vae=tiny_vae("kl")).save_pretrained(tmp_path)
    loaded = DoDPipeline.from_pretrained(tmp_path, **{name: dtype})
    for model in (loaded.transformer, loaded.latent_embedder, loaded.vae):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.isfinite(sample(loaded)).all()


def test_components_make_another_pipeline():
    pipe = tiny_pipeline(vae=tiny_vae("kl"), id2label=LABELS)
    # The table of names is no component.
    other = DoDPipeline(**pipe.components, id2label=pipe.config.id2label)
    assert set(pipe.components) == {
        "transformer",
        "latent_embedder",
        "scheduler",
        "vae",
        "code_transformer",
        "code_scheduler",
        "guider",
        "weak_transformer",
    }
    assert torch.equal(sample(other), sample(pipe))
    assert other.labels == pipe.labels


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "entries, code",
    [
        ({"vae": ["json", "Evil"]}, "vae/json.py"),
        ({"vae": ["diffusers", "Evil"]}, "vae/diffusers.py"),
        ({"vae": ["transformers", "Evil"]}, "vae/transformers.py"),
        ({"vae": ["diffusers", "DiffusionPipeline"]}, "vae/pipeline.py"),
        ({}, "scheduler/diffusers.py"),
        ({"vae": ["torch", "Evil"]}, "vae/torch.py"),
        ({"guider": ["diffusers", "Evil"]}, "guider/diffusers.py"),
        ({"code_scheduler": ["yaml", "Evil"]}, "code_scheduler/yaml.py"),
        ({"weak_transformer": ["diffusers", "Evil"]}, "weak_transformer/diffusers.py"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae/diffusers.py"),
        ({}, "latent_embedder/diffusers_dod.py"),
        ({}, "transformer/diffusers_dod.py"),
        ({}, "pipeline.py"),
        ({}, "block.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_of_a_folder_is_not_run(entries, code, saved, tmp_path):
    """Whatever the folder and the call say of it, and on every supported diffusers."""
    folder, marker = tmp_path / "pipeline", tmp_path / "marker"
    shutil.copytree(saved, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))
    (folder / code).parent.mkdir(exist_ok=True)
    (folder / code).write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\nclass DoDTransformer2DModel: pass\n"
    )
    (folder / "vae/model_index.json").parent.mkdir(exist_ok=True)
    (folder / "vae/model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "Evil"]}))
    for options in ({}, {"trust_remote_code": True}):
        if "/" in code and not code.endswith("/diffusers_dod.py"):  # diffusers takes it for the component's own
            # Which of them differs between releases of diffusers.
            with pytest.raises((ValueError, OSError, AttributeError, TypeError)):
                DoDPipeline.from_pretrained(folder, **options)
        else:
            assert isinstance(DoDPipeline.from_pretrained(folder, **options), DoDPipeline)
    assert not marker.exists()


def test_folder_without_the_models(tmp_path):
    """A part of a pipeline, for one who wants the scheduler and the names only."""
    tiny_pipeline(id2label=LABELS).save_pretrained(tmp_path)
    part = DoDPipeline.from_pretrained(tmp_path, transformer=None, latent_embedder=None)
    assert part.get_label_ids("crane") == [4]

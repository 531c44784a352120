"""Class names and ids, and bad input: one clear error, raised before anything is changed."""

import numpy as np
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae


LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "Hüpfball, 跳跳球", 4: "great white shark"}


def labels_pipeline():
    return tiny_pipeline(id2label=LABELS)


@pytest.mark.parametrize(
    "given, ids",
    [
        ("tench", [0]),
        ("Tinca tinca", [0]),
        ("tench, Tinca tinca", [0]),
        ("Hüpfball", [3]),
        ("跳跳球", [3]),
        (" great white shark ", [4]),
        (["tench", 2, None], [0, 2, 10]),
        (3, [3]),
        (None, [10]),
        (torch.tensor([4, 0]), [4, 0]),
        (torch.tensor(4), [4]),
        (np.array([1, 2]), [1, 2]),
        (np.int64(1), [1]),
        (range(2), [0, 1]),
        ((1, 1), [1, 1]),
    ],
    ids=str,
)
def test_labels_become_ids(given, ids):
    assert labels_pipeline().prepare_class_labels(given) == ids


def test_name_is_one_image():
    assert len(labels_pipeline()("tench", num_inference_steps=1, output_type="latent").images) == 1


def test_named_class_is_the_class():
    pipe = labels_pipeline()
    by_name, by_id = (
        pipe(label, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for label in ("Hüpfball", 3)
    )
    assert torch.equal(by_name, by_id)


def test_ids_may_be_strings():
    assert tiny_pipeline(id2label={"3": "cat"}).get_label_ids("cat") == [3]


@pytest.mark.parametrize(
    "name, message",
    [
        ("crane", r"'crane' names the classes \[1, 2\]"),
        ("grate white shark", "nearest are 'great white shark'"),
        ("Tensch", "'Tensch' is not a label.*'tench'"),
        ("", "is not a label"),
    ],
)
def test_unclear_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        labels_pipeline()(name, num_inference_steps=1)


def test_pipeline_without_names_says_so():
    with pytest.raises(ValueError, match="no label names, so 'cat' is unknown: pass class ids"):
        tiny_pipeline()("cat")


NOISE = torch.zeros(1, 4, 8, 8)
BAD_INPUTS = {
    "no class": ({"class_labels": []}, "`class_labels` is empty"),
    "class too large": ({"class_labels": 10}, "Class 10 is out of range.*0 to 9"),
    "negative class": ({"class_labels": [0, -1]}, "Class -1 is out of range"),
    "float class": ({"class_labels": 1.0}, "Class 1.0 is out of range"),
    "bool class": ({"class_labels": True}, "Class True is out of range"),
    "nested classes": ({"class_labels": torch.zeros(2, 2, dtype=torch.long)}, "pass a tensor of class ids"),
    "no stage": ({"num_stages": 0}, "`num_stages` is 0"),
    "float stages": ({"num_stages": 2.0}, "`num_stages` is 2.0"),
    "bool stages": ({"num_stages": True}, "`num_stages` is True"),
    "no step": ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    "no step in one stage": ({"num_inference_steps": [2, 0]}, "`num_inference_steps` is 0"),
    "float steps": ({"num_inference_steps": 2.0}, "`num_inference_steps` is 2.0"),
    "bool steps": ({"num_inference_steps": True}, "`num_inference_steps` is True"),
    "pair of steps": ({"num_inference_steps": (2, 2)}, "`num_inference_steps` is "),
    "too many steps": ({"num_inference_steps": [1, 1, 1]}, "`num_inference_steps` has 3 entries for 2 stages"),
    "too few scales": ({"guidance_scale": [1.0]}, "`guidance_scale` has 1 entries for 2 stages"),
    "too few prior scales": ({"prior_guidance_scale": [1.0]}, "`prior_guidance_scale` has 1 entries"),
    "too many intervals": ({"guidance_interval": [(0, 1)] * 3}, "`guidance_interval` has 3 entries"),
    "NaN scale": ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    "infinite scale": ({"prior_guidance_scale": [1.0, float("inf")]}, "`prior_guidance_scale` is inf"),
    "no scale": ({"guidance_scale": [1.0, None]}, "`guidance_scale` is None"),
    "scale as text": ({"guidance_scale": "2"}, "`guidance_scale` is '2'"),
    "interval backwards": ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval` is \(0.8, 0.2\)"),
    "interval in steps": ({"guidance_interval": (0, 20)}, r"`guidance_interval` is \(0, 20\)"),
    "interval as list": ({"guidance_interval": [0.2, 0.8]}, "`guidance_interval` is 0.2; pass a tuple"),
    "interval of three": ({"guidance_interval": (0.1, 0.2, 0.3)}, "`guidance_interval` is "),
    "unknown drop": ({"guidance_drop": "none"}, "`guidance_drop` is 'none'"),
    "no image": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    "float images": ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` is 1.5"),
    "height between patches": ({"height": 9}, "A 9x8 image does not fit.*multiples of 2"),
    "no height": ({"height": 0}, "A 0x8 image does not fit"),
    "negative width": ({"width": -8}, "A 8x-8 image does not fit"),
    "latents between patches": ({"latents": torch.zeros(1, 4, 7, 8)}, "A 7x8 image does not fit"),
    "too many latents": ({"latents": torch.zeros(2, 4, 8, 8)}, r"`latents` is \(2, 4, 8, 8\)"),
    "latents of other channels": ({"latents": torch.zeros(1, 3, 8, 8)}, r"`latents` is \(1, 3, 8, 8\)"),
    "latents of another size": ({"latents": NOISE, "height": 16}, r"must be a tensor of \(1, 4, 16, 8\)"),
    "flat latents": ({"latents": torch.zeros(4, 8, 8)}, r"`latents` is \(4, 8, 8\)"),
    "latents as array": ({"latents": NOISE.numpy()}, "`latents` is ndarray"),
    "NaN latents": ({"latents": NOISE * torch.nan}, "`latents` holds NaN"),
    "infinite latents": ({"latents": NOISE + torch.inf}, "`latents` holds NaN or infinite"),
    "too many generators": ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    "no generator": ({"generator": []}, "0 generators for 1 images"),
    "unknown output type": ({"output_type": "jpeg"}, "`output_type` is 'jpeg'"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_and_changes_nothing(case):
    arguments, message = BAD_INPUTS[case]
    pipe, good = tiny_pipeline(), {"class_labels": 0, "num_inference_steps": 1, "output_type": "latent"}
    expected = pipe(**good, generator=torch.Generator().manual_seed(0)).images
    before, generator = pipe.scheduler.timesteps.clone(), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=message) as error:
        pipe(**good | {"generator": generator} | arguments)
    assert "\n" not in str(error.value)
    assert torch.equal(pipe.scheduler.timesteps, before)
    assert torch.equal(pipe(**good, generator=generator).images, expected)  # no noise was drawn


@pytest.mark.parametrize(
    "components, message",
    [
        ({"latent_embedder": {"output_dim": 24}}, "`output_dim` is 24 but the transformer needs 16"),
        ({"latent_embedder": {"in_channels": 3}}, "`in_channels` is 3 but the transformer needs 4"),
        ({"latent_embedder": {"output_patch_size": 4}}, "`output_patch_size` is 4 but the transformer needs 2"),
        ({"latent_embedder": {"patch_size": 4}}, "`output_patch_size` is 4 but the transformer needs 2"),
        ({"transformer": {"in_channels": 3}}, "`in_channels` is 4 but the transformer needs 3"),
        ({"vae": {"latent_channels": 8}}, "VAE's latents have 8 channels but the transformer takes 4"),
    ],
)
def test_components_that_do_not_fit_are_refused(components, message):
    build = {"latent_embedder": tiny_embedder, "transformer": tiny_transformer, "vae": lambda **o: tiny_vae("kl", **o)}
    built = {"transformer": tiny_transformer(), "latent_embedder": tiny_embedder()}
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**built | {name: build[name](**config) for name, config in components.items()})


def test_size_that_only_the_embedder_cannot_cut_is_refused_before_stage_1():
    pipe = tiny_pipeline(latent_embedder=tiny_embedder(patch_size=4, output_patch_size=2))
    steps = []
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match="multiples of 4"):
        pipe(0, height=10, width=8, num_inference_steps=1)
    assert not steps
    pipe(0, height=10, width=8, num_stages=1, num_inference_steps=1, output_type="latent")


def test_latents_without_an_autoencoder_are_no_picture():
    with pytest.raises(
        ValueError, match=r"its samples have 4 channels: they are latents.*output_type='latent'.*`vae=`"
    ):
        tiny_pipeline()(0, num_inference_steps=1)
    assert tiny_pipeline()(0, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)

"""Every recipe: its options, the sizes that it states, and two steps of it at a reduced width."""

import importlib.metadata
import json
import re
import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_transformer, tiny_vae
from original_models import load_original
from safetensors.torch import save_file
from training_runs import EXAMPLES, arguments, write_digits

from diffusers_dod import DoDPipeline
from diffusers_dod.cli import BadInput
from diffusers_dod.data.batches import TrainingData
from diffusers_dod.presets import PRESETS
from diffusers_dod.training.build import build_pipeline
from diffusers_dod.training.options import parse_args
from diffusers_dod.training.recipes import load_recipe
from diffusers_dod.training.train_codes import parse_args as parse_code_args


PATHS = sorted((EXAMPLES / "recipes").glob("*.yaml"))
CODE_RECIPES = [path for path in PATHS if path.stem.endswith("_codes")]
RECIPES = [pytest.param(path, id=path.stem) for path in PATHS if "\ntransformer_config:" in path.read_text()]
CONTINUED = [path for path in PATHS if path.stem.endswith("_transformer")]
# Those that start from the weights of a public model, by the tiny checkpoint of it
CONVERTED = {"lightningdit": "lightningdit", "repae": "sit", "jit": "jit"}
NARROW = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "adaln_rank": 4}
NARROW_EMBEDDER = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def tiny_autoencoder(name: str, folder: Path) -> str:
    """One of the kind that a recipe names, of the same factor and latent channels."""
    torch.manual_seed(0)
    if "sd-vae" in name or "characters-vae" in name:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1)
    elif "dc-ae" in name:
        sides = {}
        for side in ("encoder", "decoder"):
            sides[f"{side}_block_types"] = "ResBlock"
            sides[f"{side}_block_out_channels"] = (32,) * 6
            sides[f"{side}_layers_per_block"] = (1,) * 6
            sides[f"{side}_qkv_multiscales"] = ((),) * 6
        vae = diffusers.AutoencoderDC(latent_channels=32, attention_head_dim=8, **sides)
    else:
        sizes = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
        vae = diffusers.AutoencoderRAE(**sizes, decoder_hidden_size=32, decoder_intermediate_size=32)
    vae.save_pretrained(folder)
    return str(folder)


def recipe_args(recipe: Path, folder: Path, *flags) -> list[str]:
    argv = ["--recipe", str(recipe), "--output_dir", str(folder / "run"), *map(str, flags)]
    args = parse_args([*argv, "--train_data_dir", "x"], "")
    if args.vae_name_or_path is not None:
        argv += ["--vae_name_or_path", tiny_autoencoder(args.vae_name_or_path, folder / "vae")]
    return argv


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds_models_of_the_size_that_it_states(recipe, tmp_path):
    classes, *stated = re.search(
        r"# Parameters with (\d+) classes: transformer ([\d,]+), embedder ([\d,]+)", recipe.read_text()
    ).groups()
    args = parse_args([*recipe_args(recipe, tmp_path), "--train_data_dir", "x"], "")
    with torch.device("meta"):
        pipeline = build_pipeline(args, TrainingData(None, int(classes), None, recipe.stem == "digits", None))
    sizes = {"sd": (32, 4), "rae": (16, 768), "dcae": (8, 32), "digits": (28, 1), "emoji": (32, 3), "letters": (8, 4)}
    expected = sizes.get(recipe.stem.removeprefix("imagenet256_"), sizes["sd"])
    for model, parameters in zip((pipeline.transformer, pipeline.latent_embedder), stated):
        assert model.device.type == "meta"
        assert f"{model.num_parameters():,}" == parameters
        assert (model.config.sample_size, model.config.in_channels) == expected


@pytest.mark.parametrize("recipe", CODE_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_code_model_is_that_of_its_pipeline(recipe):
    args = parse_code_args(["pipeline", "--recipe", str(recipe), "--output_dir", "x", "--train_data_dir", "x"])
    assert set(args.code_config) == {"num_layers", "num_attention_heads", "attention_head_dim"}
    assert recipe.with_stem(recipe.stem.removesuffix("_codes")).exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_at_a_reduced_width(recipe, tmp_path):
    from diffusers_dod.training.__main__ import train_model

    digits = write_digits(tmp_path / "data")
    flags = ["--transformer_config", json.dumps(NARROW), "--embedder_config", json.dumps(NARROW_EMBEDDER)]
    flags += ["--train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 2, "--validation_steps", 0]
    flags += ["--report_to", "none", "--mixed_precision", "no", "--seed", 5, "--no-random_flip"]
    if recipe.stem not in ("digits", "emoji", "imagenet256_rae"):  # RAE brings every image to its encoder's size
        flags += ["--resolution", 64]
    argv = [*recipe_args(recipe, tmp_path, *flags), "--train_data_dir", str(digits)]
    assert train_model(argv) == 0
    config = json.loads((tmp_path / "run" / "training_config.json").read_text())
    stated = parse_args(["--recipe", str(recipe), "--output_dir", "x", "--train_data_dir", "x"], "")
    assert config["learning_rate"] == stated.learning_rate and config["ema_decay"] == stated.ema_decay
    assert config["seed"] == 5 and config["random_flip"] is False
    # Flags changed single entries of the recipe's model.
    assert config["transformer_config"]["patch_size"] == stated.transformer_config["patch_size"]
    assert config["transformer_config"]["num_layers"] == 1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (
        environment["versions"]["torch"] == importlib.metadata.version("torch")
        and len(environment["git"]["commit"]) == 40
    )
    assert DoDPipeline.from_pretrained(tmp_path / "run").transformer.config.num_layers == 1


@pytest.mark.parametrize("recipe", CONTINUED, ids=lambda path: path.stem)
def test_a_recipe_of_further_training_leaves_the_rest_of_the_pipeline(recipe, tmp_path):
    from diffusers_dod.training.__main__ import train_model

    transformer = tiny_transformer(in_channels=1, num_classes=3, sample_size=14, prediction_type="flow")
    statistics = {"codes_mean": [0.1, -0.2], "codes_std": [0.5, 2.0]}
    sizes = {"in_channels": 1, "sample_size": 14, "patch_size": 7, "output_patch_size": 2}
    embedder = tiny_embedder(**sizes, **statistics, noise_level_input=True)
    code_model = tiny_transformer(in_channels=2, num_classes=3, sample_size=2, prediction_type="flow")
    models = {"transformer": transformer, "latent_embedder": embedder, "code_transformer": code_model}
    tiny_coded_pipeline(**models).save_pretrained(tmp_path / "coded")
    flags = [
        "--pretrained_model_name_or_path",
        tmp_path / "coded",
        "--train_data_dir",
        write_digits(tmp_path / "data"),
    ]
    flags += ["--train_batch_size", 2, "--max_train_steps", 2, "--report_to", "none", "--mixed_precision", "no"]
    assert train_model(["--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), *map(str, flags)]) == 0
    before, after = (DoDPipeline.from_pretrained(tmp_path / folder) for folder in ("coded", "run"))
    for name in ("transformer", "latent_embedder", "code_transformer"):
        old, new = (getattr(pipe, name).state_dict() for pipe in (before, after))
        assert all(torch.equal(old[key], new[key]) for key in old) == (name != "transformer")


def test_every_recipe_is_of_some_kind():
    assert len(RECIPES) + len(CODE_RECIPES) + len(CONTINUED) + len(CONVERTED) == len(PATHS)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_recipe_for_published_weights_states_sizes_and_costs(name):
    script = runpy.run_path(EXAMPLES.parent / "benchmarks/training_cost.py")
    text = (EXAMPLES / "recipes" / f"{name}.yaml").read_text()
    for line in script["lines"](name):
        assert f"\n# {line}\n" in text
    for steps in script["STEPS"].values():
        assert f"{steps:,}" in text and f"max_train_steps{': ' if steps == 100_000 else ' '}{steps}" in text
    args = parse_args(
        ["--recipe", str(EXAMPLES / "recipes" / f"{name}.yaml"), "--output_dir", "x", "--train_data_dir", "x"]
    )
    assert args.train_batch_size * args.gradient_accumulation_steps == script["BATCH"]


@pytest.mark.parametrize(
    ("name", "train"),
    [("lightningdit", []), ("repae", ["--train", "embedder,lora", "--lora_rank", "2"]), ("jit", [])],
    ids=CONVERTED,
)
def test_a_recipe_trains_a_converted_model(name, train, tmp_path):
    from diffusers_dod.conversion.__main__ import main as convert
    from diffusers_dod.training.__main__ import train_model

    recipe = EXAMPLES / "recipes" / f"{name}.yaml"
    save_file(load_original(name).weights, tmp_path / "model.safetensors")
    command = [
        CONVERTED[name],
        str(tmp_path / "model.safetensors"),
        str(tmp_path / "dod"),
        "--num_attention_heads",
        "2",
    ]
    if name != "jit":
        tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
        command += ["--vae", str(tmp_path / "vae")]
    assert convert(command) == 0
    digits = write_digits(tmp_path / "data")
    flags = ["--pretrained_model_name_or_path", tmp_path / "dod", "--train_data_dir", digits, *train]
    flags += ["--train_batch_size", 2, "--max_train_steps", 2, "--validation_steps", 0, "--report_to", "none"]
    flags += ["--mixed_precision", "no", "--gradient_accumulation_steps", 1, "--dataloader_num_workers", 0]
    assert train_model(["--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), *map(str, flags)]) == 0
    before, after = (DoDPipeline.from_pretrained(tmp_path / folder) for folder in ("dod", "run"))
    assert before.transformer.config == after.transformer.config | {
        "_name_or_path": before.transformer.config._name_or_path
    }
    changed = [
        key
        for key, tensor in before.transformer.state_dict().items()
        if not torch.equal(tensor, after.transformer.state_dict()[key])
    ]
    assert changed and (len(changed) < len(before.transformer.state_dict())) == bool(train)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1e-4", "'learning_rat', which is no option"),
        ("learning_rate: fast", "--learning_rate: invalid float value: 'fast'"),
        ("weighting: cosmos", "--weighting: invalid choice"),
        ("a: [", "cannot be read"),
        ("recipe: other.yaml", "'recipe', which is no option"),
        ("mixed_precision: yes", "--mixed_precision: invalid choice: 'yes'"),
        # Aliases can grow without end, a repeated name hides a value, and nothing of a file is code.
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not allowed"),
        ("base: &base {seed: 1}\nother: {<<: *base}\n", "aliases are not allowed"),
        ("seed: 1\nresolution: 32\nseed: 2\n", "'seed' is given twice"),
        ("transformer_config: {num_layers: 1, num_layers: 2}\n", "'num_layers' is given twice"),
        ('seed: 1\n"seed": 2\n', "'seed' is given twice"),
        ("ema_decay: [{a: 1, a: 2}]\n", "'a' is given twice"),
        ("transformer_config: &c {num_layers: *c}\n", "aliases are not allowed"),
        ("seed: " + 1200 * "[" + "\n", "cannot be read"),
        ("? [a, b]\n: 1\n", "cannot be read"),
        ("- seed\n- 1\n", "must hold options"),
        ("seed: true\n", "'seed': True, but it takes no true or false"),
        ("mixed_precision: false\n", "'mixed_precision': False, but it takes no true or false"),
        ("compile: yes\n", "'compile': yes, but it takes true or false"),
        ("!!python/object/apply:os.system [true]\n", "cannot be read"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    argv = arguments(tmp_path / "run", "--train_data_dir", tmp_path, "--recipe", tmp_path / "recipe.yaml")
    with pytest.raises(BadInput, match=message) as error:
        parse_args(argv, "")
    assert "\n" not in str(error.value)


def test_a_recipe_is_read_as_yaml_but_for_its_numbers_with_exponents():
    text = "seed: 1\ntransformer_config: {patch_size: 4, num_layers: 2}\nema_decay: [0.9, 0.99]\nlearning_rate: 1e-4\n"
    expected = {"seed": 1, "transformer_config": {"patch_size": 4, "num_layers": 2}, "ema_decay": [0.9, 0.99]}
    assert load_recipe(text) == expected | {"learning_rate": "1e-4"}
    assert load_recipe("a: true\nb: False\nc: no\nd: on\ne: true_colours\n") == {
        "a": True,
        "b": False,
        "c": "no",
        "d": "on",
        "e": "true_colours",
    }
    assert json.dumps(load_recipe("a: {b: {c: 1}}")) == '{"a": {"b": {"c": 1}}}'


def test_flags_override_a_recipe_of_every_kind_of_value(tmp_path):
    recipe = "train_data_dir: images\nstreaming: true\nema: false\nema_decay: [0.9, 0.99]\nmax_train_steps: 7\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "transformer_config: {patch_size: 4, num_layers: 3}\n")
    argv = ["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", "x"]
    args = parse_args(argv, "")
    assert args.streaming and not args.ema and args.ema_decay == [0.9, 0.99] and args.max_train_steps == 7
    (tmp_path / "other.yaml").write_text(recipe + "mixed_precision: no\nvae_subfolder: null\nspike_factor: null\n")
    other = parse_args(["--recipe", str(tmp_path / "other.yaml"), "--output_dir", "x"], "")
    assert other.mixed_precision == "no" and other.vae_subfolder == args.vae_subfolder
    assert other.spike_factor == args.spike_factor
    flags = ["--no-streaming", "--ema_decay", "0.5", "--transformer_config", '{"num_layers": 2}']
    args = parse_args([*argv, *flags], "")
    assert not args.streaming and args.ema_decay == [0.5]
    assert args.transformer_config == {"patch_size": 4, "num_layers": 2}


def test_the_recipe_of_imagenet_takes_every_preset(tmp_path):
    recipe = EXAMPLES / "recipes" / "imagenet256.yaml"
    for name, preset in PRESETS.items():
        args = parse_args([*recipe_args(recipe, tmp_path / name, "--preset", name), "--train_data_dir", "x"])
        with torch.device("meta"):
            pipeline = build_pipeline(args, TrainingData(None, 1000, None, False, None))
        for model, stated in (
            (pipeline.transformer, preset.transformer),
            (pipeline.latent_embedder, preset.latent_embedder),
        ):
            assert stated.items() <= dict(model.config).items()
        assert (pipeline.transformer.config.sample_size, pipeline.transformer.config.patch_size) == (32, 2)

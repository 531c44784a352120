"""Every flag of every command with wrong values of every kind: success, or status 2 and one line.

The flags are those of the commands' own parsers, so a new one is covered. CI takes a sample of the lines;
`DOD_FLAGS=1 python -m pytest --timeout 0 tests/test_flags.py` takes all, for the better part of an hour; `DOD_FLAGS=5` runs
one in five.
"""

import importlib
import io
import json
import os
import subprocess
import sys
from argparse import _SubParsersAction
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_transformer, tiny_vae
from original_models import load_original
from safetensors.torch import save_file
from training_runs import EMBEDDER, TRANSFORMER, write_digits
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from diffusers_dod.__main__ import COMMANDS
from diffusers_dod.cli import run


# One in so many lines is parsed, and one in so many of those that the parsers take is run.
PARSED, RUN = (1, int(os.environ["DOD_FLAGS"])) if "DOD_FLAGS" in os.environ else (7, 14)
WRONG = ["", " ", "x", "-1", "0", "1", "0.5", "nan", "inf", "-inf", "1e400", "9" * 20, "null", "[1]", "{", '{"x": 1}']
WRONG += ["missing/file", "folder", "file", "bytes", "list.json", "loop", "x" * 300, "a\nb", "\udcff", "--seed"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A right line of every command, by its words, and what some flags need beside it or instead of it."""
    folder = tmp_path_factory.mktemp("flags")
    digits = write_digits(folder / "digits", counts=(4, 4, 3))
    pipe = tiny_coded_pipeline(
        transformer=tiny_transformer(in_channels=1, sample_size=14, patch_size=7, num_classes=3),
        latent_embedder=tiny_embedder(
            in_channels=1, sample_size=14, patch_size=7, codes_mean=[0.0, 0.1], codes_std=[1.0, 2.0]
        ),
        code_transformer=tiny_transformer(in_channels=2, sample_size=2, patch_size=1, num_classes=3),
    )
    pipe.save_pretrained(folder / "model")
    save_file(load_original("sit").weights, folder / "sit.safetensors")
    tiny_vae().save_pretrained(folder / "vae")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(folder / "dino")
    ViTImageProcessor(size={"height": 14, "width": 14}).save_pretrained(folder / "dino")
    (folder / "sampling.json").write_text("{}")
    data = ["--train_data_dir", str(digits)]
    tiny = ["--transformer_config", json.dumps(TRANSFORMER), "--embedder_config", json.dumps(EMBEDDER)]
    steps = ["--max_train_steps", "1", "--output_dir", "out", "--report_to", "none", "--validation_steps", "0"]
    steps += ["--lr_warmup_steps", "0", "--train_batch_size", "2"]
    train = ["train", *data, "--resolution", "14", *tiny, *steps]
    model, dino = str(folder / "model"), str(folder / "dino")
    evaluated = ["--evaluation_samples", "2", "--evaluation_reference", str(digits), "--evaluation_extractor", dino]
    pushed = ["--push_to_hub", "--hub_license", "mit"]
    started = ["train", *data, "--resolution", "14", "--pretrained_model_name_or_path", model, *steps]
    no_model = ["train", *data, "--resolution", "14", *steps]
    no_data = ["train", "--resolution", "14", *tiny, *steps]
    codes = ["train-codes", model, *data, "--resolution", "14", *steps, "--held_out", "0"]
    samples = ["evaluate", "--samples", str(digits), "--reference", str(digits), "--extractor", dino]
    return {
        "train": train,
        "train-codes": codes,
        "cache": [
            "cache",
            *data,
            "--resolution",
            "14",
            "--vae_name_or_path",
            str(folder / "vae"),
            "--output_dir",
            "out",
        ],
        "sample": [
            "sample",
            "--model",
            model,
            "--num_images",
            "2",
            "--num_inference_steps",
            "1",
            "--output_dir",
            "out",
        ]
        + ["--code_num_inference_steps", "1"],
        "evaluate": [*samples, "--metrics", "fd"],
        "probe": ["probe", "--model", model, *data],
        "convert": ["convert", "sit", str(folder / "sit.safetensors"), "out", "--num_attention_heads", "2"],
        "hub check": ["hub", "check", model, "--license", "mit"],
        "hub push": ["hub", "push", model, "user/model", "--license", "mit", "--dry_run"],
        "viz": ["viz", "--model", model, "--output_dir", "out", "--num_inference_steps", "1", "--classes", "0"],
        "demo": ["demo"],
    }, {
        "train": {
            **dict.fromkeys(("dataset_name", "dataset_config_name", "latents_dir"), no_data),
            **dict.fromkeys(("pretrained_model_name_or_path", "preset"), no_model),
            "vae_subfolder": [*train, "--vae_name_or_path", str(folder / "vae")],
            **dict.fromkeys(("train", "lora_rank"), [*started, "--lora_rank", "1", "--train", "lora"]),
            "streaming": train,
            "shuffle_buffer_size": [*train, "--streaming"],
            **dict.fromkeys(("repa_weight", "repa_layer"), [*train, "--repa_encoder", dino, "--repa_layer", "1"]),
            "repa_encoder": [*train, "--repa_layer", "1"],
            **dict.fromkeys(
                ("evaluation_samples", "evaluation_reference", "evaluation_extractor"), [*train, *evaluated]
            ),
            **dict.fromkeys(
                ("hub_model_id", "hub_license", "hub_private_repo", "hub_push_checkpoints"), [*train, *pushed]
            ),
            "mode_scale": [*train, "--timestep_density", "mode"],
        },
        "train-codes": {
            **dict.fromkeys(("dataset_name", "latents_dir"), [word for word in codes if word not in data]),
            "mode_scale": [*codes, "--timestep_density", "mode"],
        },
        "cache": {"dataset_name": ["cache", "--vae_name_or_path", str(folder / "vae"), "--output_dir", "out"]},
    }


def parsers():
    """The parser of every command by its words."""
    found = {}
    for command, (module, _) in COMMANDS.items():
        module = "training.options" if command == "train" else module
        parser = importlib.import_module(f"diffusers_dod.{module}").build_parser()
        nested = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
        found |= (
            {f"{command} {name}": each for name, each in nested[0].choices.items()} if nested else {command: parser}
        )
    return found


PARSERS = parsers()


def accepts(line):
    """Whether the command's parser takes a line; what it says of one that it refuses is one line."""
    module = COMMANDS[line[0]][0]
    module = importlib.import_module(f"diffusers_dod.{'training.options' if line[0] == 'train' else module}")
    parse = getattr(module, "parse_args", lambda argv: module.build_parser().parse_args(argv))

    def parse_only(argv):
        parse(argv)

    with redirect_stderr(io.StringIO()) as stderr:
        status = run(parse_only, line[0], line[1:])
    assert (status, stderr.getvalue().count("\n")) in ((0, 0), (2, 1)), (line, stderr.getvalue())
    return status == 0


def lines_of(command, action, base):
    """The right line with each wrong value of an action in its place."""
    if action.nargs == 0:
        return [[*base, action.option_strings[0]]]
    if action.option_strings:
        flag = action.option_strings[0]
        return [[*base, flag, *(["0.5"] if action.nargs == 2 else []), value] for value in WRONG]
    place = {"convert": ("source", "checkpoint", "output"), "train-codes": ("pipeline",)}
    place |= {"hub check": ("folder",), "hub push": ("folder", "repo_id")}
    index = len(command.split()) + place[command].index(action.dest)
    return [[*base[:index], value, *base[index + 1 :]] for value in WRONG]


@pytest.fixture(scope="module")
def accepted(lines):
    """The lines that the parsers take."""
    right, special = lines
    candidates, taken = [], []
    assert right.keys() == PARSERS.keys()
    for command, parser in PARSERS.items():
        for action in parser._actions:
            if action.dest == "help":
                continue
            candidates += lines_of(command, action, special.get(command, {}).get(action.dest, right[command]))
    candidates = candidates[::PARSED]
    taken = [line for line in candidates if accepts(line)]
    print(f"{len(candidates)} lines, of which the parsers take {len(taken)}")
    return taken


def test_the_parsers_refuse_in_one_line(accepted):
    assert len(accepted) > 1500 / PARSED


def test_any_value_of_any_flag_ends_well_or_in_one_line(accepted, lines, tmp_path):
    right, _ = lines
    chosen = [*accepted[::RUN], *(line for command, line in right.items() if command != "demo")]
    results_file = tmp_path / "results.jsonl"
    (tmp_path / "cases.json").write_text(json.dumps(chosen))
    command = [
        sys.executable,
        Path(__file__).with_name("flag_runs.py"),
        tmp_path / "cases.json",
        results_file,
    ]
    subprocess.run(command, check=True)
    results = [json.loads(line) for line in results_file.read_text().splitlines()]
    wrong = []
    for result in results:
        stderr = [line for line in result["stderr"].splitlines() if line.strip()]
        errors = [line for line in stderr if line.startswith("diffusers-dod") and ": error: " in line]
        if result["status"] == 2:
            ended = len(errors) == 1 and errors[0] == stderr[-1]
        else:  # what `check` found is on stdout
            ended = not errors and result["status"] in ((0, 1) if result["words"][:2] == ["hub", "check"] else (0,))
        if not ended or "Traceback" in result["stderr"]:
            wrong.append(result)
    print(f"{len(results)} runs: {Counter(str(result['status']) for result in results)}")
    report = "\n".join(f"{r['status']} {' '.join(r['words'])[-200:]!r}: {r['stderr'][-1500:]}" for r in wrong)
    assert not wrong, f"{len(wrong)} of {len(results)}:\n{report}"
    assert all(
        result["status"] == 0 for result in results[-len(right) + 1 :] if result["words"][:2] != ["hub", "check"]
    )

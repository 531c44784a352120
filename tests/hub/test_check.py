"""What `check` says before an upload, and what the card says; nothing here needs a Hub."""

import ast
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import tiny_pipeline, tiny_transformer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from diffusers_dod import DoDPipeline, DoDTransformer2DModel
from diffusers_dod.hub import check_folder, collect_upload, find_stage_grid, push_folder
from diffusers_dod.hub.__main__ import main
from diffusers_dod.hub.card import build_card
from diffusers_dod.repository import standalone_source


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def edit_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def edit_weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def nan_in_weights(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors["proj_out.weight"].view(-1)[3].fill_(float("nan")))


def missing_tensor(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.pop("proj_out.weight"))


def other_shape(folder):
    edit_weights(folder / WEIGHTS, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)}))


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def variant_of_another_model(folder):
    file = folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors")
    save_file({"proj_out.weight": torch.zeros(2, 2)}, file)


def embedder_of_another_width(folder):
    edit_json(folder / "transformer/config.json", num_attention_heads=4)


def scheduler_of_another_prediction(folder):
    edit_json(folder / "transformer/config.json", prediction_type="flow")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])


def no_scheduler_folder(folder):
    (folder / "scheduler/scheduler_config.json").unlink()


def broken_config(folder):
    (folder / "vae/config.json").write_text("{")


def foreign_module(folder):
    edit_json(folder / "model_index.json", vae=["elsewhere", "AutoencoderKL"])


def unknown_class(folder):
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderOfNobody"])


def another_pipeline(folder):
    edit_json(folder / "model_index.json", _class_name="DiTPipeline")


def pickled_file(folder):
    torch.save({}, folder / "vae/diffusion_pytorch_model.bin")


def no_index(folder):
    (folder / "model_index.json").unlink()


def broken_card(folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


BROKEN = [
    b"",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe{}",
    b'"text"',
    b'{"a": "\\ud800"}',
    b"[" * 100_000,
]
BROKEN_EVALUATIONS = [
    {"results": []},
    {"reference": None, "results": []},
    {"reference": ["mnist"], "results": []},
    {"reference": "mnist"},
    {"reference": "mnist", "results": {"fid": 1}},
    {"reference": "mnist", "results": [1]},
    {"reference": "mnist", "results": [{"value": 1}]},
    {"reference": "mnist", "results": [{"metric": "fid"}]},
    {"reference": "mnist", "results": [{"metric": "fid", "value": "low"}]},
    {"reference": "mnist", "results": [{"metric": "fid", "value": True}]},
    {"reference": "mnist", "results": [{"metric": ["fid"], "value": 1}]},
    {"reference": "mnist", "results": [{"metric": "fid", "value": 1, "name": 7}]},
]
BROKEN_INDEXES = [
    {"_class_name": None},
    {"_class_name": []},
    {"_class_name": 3},
    {"_class_name": [["DoDPipeline"]]},
    {"vae": []},
    {"vae": ["diffusers"]},
    {"vae": ["diffusers", 5]},
    {"vae": [None, "AutoencoderKL"]},
    {"vae": [["diffusers"], "AutoencoderKL"]},
    {"vae": ["diffusers", "loaders"]},
    {"vae": ["diffusers", "randn_tensor"]},
    {"vae": ["diffusers", "UNet2DModel"]},
    {"transformer": ["diffusers_dod", "DoDLatentEmbedder"]},
    {"scheduler": ["diffusers", "AutoencoderKL"]},
    {"scheduler": "FlowMatchEulerDiscreteScheduler"},
    {"id2label": ["cat"]},
    {"id2label": "cat"},
    {"id2label": {"0": None}},
    {"id2label": {"0": ["cat", "kitten"]}},
    {"id2label": {"cat": 0}},
    {"id2label": {"-1": "cat"}},
    {"id2label": {"10": "beyond"}},
    {"code_guidance_scale": "much"},
]
BROKEN_CONFIGS = [
    ("transformer", {"patch_size": 0}),
    ("transformer", {"num_layers": "two"}),
    ("transformer", {"num_attention_heads": None}),
    ("latent_embedder", {"bottleneck_dim": -1}),
    ("latent_embedder", {"num_encoder_layers": "many"}),
    ("scheduler", {"num_train_timesteps": "many"}),
    ("vae", {"block_out_channels": []}),
    ("vae", {"norm_num_groups": 0}),
]


def assert_one_line_for(name, folder, capsys):
    """`check` and `push` name the file, each problem in one line, and nothing is a traceback."""
    problems = check_folder(folder, "mit")
    assert any(problem.startswith(name) for problem in problems), problems
    assert all(problem.isprintable() and len(problem) < 600 for problem in problems)
    assert main(["check", str(folder), "--license", "mit"]) == 1
    assert capsys.readouterr().out.splitlines() == problems
    assert main(["push", str(folder), "user/never", "--license", "mit", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"was not pushed: {'; '.join(problems)}")


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:9]))
@pytest.mark.parametrize(
    "name", ["evaluation.json", "training_config.json", "model_index.json", "transformer/config.json"]
)
def test_broken_json_is_one_line(name, content, folder, capsys):
    (folder / name).write_bytes(content)
    assert_one_line_for(name, folder, capsys)


@pytest.mark.parametrize("evaluation", BROKEN_EVALUATIONS, ids=json.dumps)
def test_broken_evaluation_is_one_line(evaluation, folder, capsys):
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert_one_line_for("evaluation.json", folder, capsys)


@pytest.mark.parametrize("entries", BROKEN_INDEXES, ids=json.dumps)
def test_broken_index_is_one_line(entries, folder, capsys):
    edit_json(folder / "model_index.json", **entries)
    assert_one_line_for(("model_index.json", "vae", "transformer", "scheduler"), folder, capsys)


@pytest.mark.parametrize("part, entries", BROKEN_CONFIGS, ids=str)
def test_broken_config_is_one_line(part, entries, folder, capsys):
    (file,) = (path for path in (folder / part).glob("*config.json"))
    edit_json(file, **entries)
    assert_one_line_for(part, folder, capsys)


@pytest.mark.parametrize(
    "name, content",
    [
        ("stages.png", b""),
        ("stages.png", b"\x89PNG\r\n\x1a\n"),
        ("samples/step-1.png", b"no picture"),
        ("vae/extra.json", b"{]"),
        ("pytorch_lora_weights.safetensors", b"none"),
        ("README.md", b"---\nlicense: mit\n- x\n---\n"),
        ("README.md", b"---\n- mit\n---\n"),
        ("README.md", b"\xff\xfe"),
    ],
    ids=str,
)
def test_other_broken_files_are_one_line(name, content, folder, capsys):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    assert_one_line_for(name, folder, capsys)


def test_entries_left_out_of_a_config_take_their_defaults(folder):
    """What the models accept, the card takes as well; a list in another JSON file is nobody's business."""
    for part in ("transformer", "latent_embedder"):
        config = json.loads((folder / part / "config.json").read_text())
        for entry in ("prediction_type", "mlp_ratio", "_diffusers_version"):
            config.pop(entry, None)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "vae/extra.json").write_text("[1]")
    assert check_folder(folder, "mit") == []
    assert "| classes | 10 |" in build_card(folder, "user/model", "mit")
    assert json.loads(collect_upload(folder, "card")["vae/extra.json"]) == [1]


@pytest.mark.parametrize("name", ["none", "file"])
def test_a_folder_that_is_none_is_one_line(name, tmp_path, capsys):
    (tmp_path / "file").write_text("{}")
    assert check_folder(tmp_path / name, "mit") == [f"{tmp_path / name}: no such folder"]
    assert main(["check", str(tmp_path / name)]) == 1
    capsys.readouterr()
    assert main(["push", str(tmp_path / name), "user/never"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"was not pushed: {tmp_path / name}: no such folder")


def test_only_a_lora_needs_a_base_model(tmp_path, capsys):
    for name, said in (("empty", False), ("lora", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{'pytorch_lora_weights' if said else 'other'}.safetensors").write_bytes(b"")
        assert main(["push", str(tmp_path / name), "user/never", "--license", "mit"]) == 2
        assert ("a LoRA needs the model that it adapts" in capsys.readouterr().err) is said


def test_folders_that_models_were_loaded_from_stay_here(folder):
    edit_json(
        folder / "vae/config.json", _name_or_path="/home/bob/vae", encoder={"_name_or_path": "/home/bob/encoder"}
    )
    edit_json(folder / "model_index.json", _name_or_path="/home/bob/model")
    upload = collect_upload(folder, "card")
    texts = [content for content in upload.values() if isinstance(content, bytes)]
    assert len(texts) > 5 and not any(b"bob" in text for text in texts)


@pytest.mark.parametrize(
    "damage, message",
    [
        (nan_in_weights, "proj_out.weight holds NaN"),
        (missing_tensor, "not those of its config.json, for instance proj_out.weight"),
        (other_shape, "not those of its config.json, for instance proj_out.bias"),
        (truncated, f"{WEIGHTS}: cannot be read"),
        (no_weights, "transformer: no safetensors weights"),
        (variant_of_another_model, "model.fp16.safetensors: the weights are not those"),
        (embedder_of_another_width, "configs: The latent embedder's `output_dim`"),
        (scheduler_of_another_prediction, "configs: The transformer predicts 'flow' but DDIMScheduler"),
        (no_scheduler_folder, "scheduler/scheduler_config.json: no such file"),
        (broken_config, "vae/config.json: cannot be read as JSON (Expecting"),
        (foreign_module, "takes its `vae` from the module 'elsewhere'"),
        (unknown_class, "AutoencoderOfNobody"),
        (another_pipeline, "holds a DiTPipeline, not a DoDPipeline"),
        (pickled_file, "vae/diffusion_pytorch_model.bin: a pickled file can run code"),
        (no_index, "No such file"),
        (broken_card, "README.md: its head is not valid YAML"),
    ],
)
def test_damage_is_named_and_stops_the_push(damage, message, folder, capsys):
    assert check_folder(folder, "mit") == []
    damage(folder)
    problems = check_folder(folder, "mit")
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    assert main(["check", str(folder), "--license", "mit"]) == 1
    assert message in capsys.readouterr().out
    with pytest.raises(ValueError, match="was not pushed"):
        push_folder(folder, "user/never", license="mit")


def test_licence_comes_from_the_argument_or_the_card(folder):
    (problem,) = check_folder(folder)
    assert problem.startswith("no licence: pass `--license`")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    assert check_folder(folder) == []
    # The card is not changed, so an argument cannot give it a licence.
    (folder / "README.md").write_text("---\ntags: [a]\n---\nMine.\n")
    (problem,) = check_folder(folder, "mit")
    assert problem.startswith("no licence: write `license:`")
    # The user's own card goes up as it is.
    assert collect_upload(folder, "x")["README.md"] == b"x"


def test_card_says_what_the_folder_holds_and_nothing_else(folder):
    card = ModelCard(build_card(folder, "user/model", "mit"))
    assert card.data.eval_results is None and card.data.datasets is None and "base_model" not in card.data.to_dict()
    assert "No evaluation of this model is reported" in card.text.replace("\n", " ")
    assert "## Training" not in card.text and "stages.png" not in card.text
    (folder / "training_config.json").write_text(json.dumps({"dataset_name": "mnist", "ema_decay": 0.9}))
    card = ModelCard(build_card(folder, "user/model", "mit", base_model="facebook/DiT-XL-2-256", has_picture=True))
    assert card.data.datasets == ["mnist"] and card.data.base_model == "facebook/DiT-XL-2-256"
    assert "| ema_decay | 0.9 |" in card.text and "](stages.png)" in card.text


def test_a_weaker_model_goes_along_and_is_on_the_card(folder):
    assert "autoguidance" not in build_card(folder, "user/model", "mit")
    pipe = DoDPipeline.from_pretrained(folder)
    weak = DoDTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": 1})
    DoDPipeline.from_pretrained(folder, weak_transformer=weak).save_pretrained(folder)
    assert check_folder(folder, license="mit") == []
    card = build_card(folder, "user/model", "mit")
    assert f"| weaker transformer, for autoguidance | {weak.num_parameters() / 1e6:.2f} M parameters |" in card
    files = {"config.json", "diffusers_dod.py", "diffusion_pytorch_model.safetensors"}
    assert {f"weak_transformer/{name}" for name in files} <= set(collect_upload(folder, card))


def test_newest_sample_grid_is_the_picture(folder):
    assert find_stage_grid(folder) is None
    (folder / "samples").mkdir()
    for name in ("step-2000.png", "step-900.png"):
        (folder / "samples" / name).write_bytes(b"")
    os.utime(folder / "samples/step-900.png", (1, 1))
    assert find_stage_grid(folder) == folder / "samples/step-2000.png"
    assert collect_upload(folder, "card")["stages.png"] == folder / "samples/step-2000.png"
    assert not any(path.startswith("samples") for path in collect_upload(folder, "card"))


def test_carried_code_is_the_packages_own():
    """Every line of the modules is carried but for the imports among them, and nothing else is."""
    package = Path(DoDPipeline.save_pretrained.__code__.co_filename).parent
    models = ["transformer_dod", "latent_embedder_dod"]
    pipeline = (
        "adapters arguments autoencoding compatibility denoising guidance labels pictures priors repository".split()
    )
    for root, parts in {
        "pipeline_dod": pipeline,
        "models_dod": ["transformer_dod", "latent_embedder_dod", "arguments", "layers"],
        "modular_dod": [*(part for part in pipeline if part != "adapters"), *models, "layers"],
    }.items():
        carried = standalone_source(package / f"{root}.py")
        names = [
            name.id if isinstance(name, ast.Name) else name
            for node in ast.parse(carried).body
            for name in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "name", None)])
            if name is not None
        ]
        assert [name for name, count in Counter(names).items() if count > 1] == [], "one module's name hides another's"
        assert "from ." not in carried
        own = "".join((package / f"{part}.py").read_text() for part in [root, *parts])
        own = re.sub(r"^from \.\w+ import (\(.*?\)|[^\n]*)\n", "", own, flags=re.DOTALL | re.MULTILINE)
        assert Counter(carried.splitlines()) == Counter(own.splitlines())


def test_subclass_is_saved_without_code(tmp_path):
    """Its module may be the user's whole script."""

    class MyPipeline(DoDPipeline):
        pass

    pipe = tiny_pipeline()
    MyPipeline(**pipe.components).save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    assert type(MyPipeline.from_pretrained(tmp_path)) is MyPipeline
    with pytest.raises(ValueError, match="holds a MyPipeline, not a DoDPipeline"):
        DoDPipeline.from_pretrained(tmp_path)


def test_compiled_pipeline_carries_its_code(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "diffusers_dod"
    DoDPipeline.from_pretrained(tmp_path)


def test_no_classes_in_the_snippet_of_an_unconditional_model(tmp_path):
    tiny_pipeline(transformer=tiny_transformer(num_classes=0)).save_pretrained(tmp_path)
    assert "pipe(None, num_stages=2)" in build_card(tmp_path, "user/model", "mit")

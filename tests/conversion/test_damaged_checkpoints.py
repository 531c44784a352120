"""Checkpoints that are not quite what they should be: converted all the same, or refused in one line that says why."""

import argparse
import pickle

import pytest
import torch
from original_models import diffusers_dit, load_original
from safetensors.torch import save_file

from diffusers_dod.conversion import convert_backbone
from diffusers_dod.conversion.__main__ import main
from diffusers_dod.conversion.sources import SOURCES


NAMES = ["sit", "dit", "fitv2", "lightningdit_qk_norm", "repae", "jit"]
# Tensors that a model of any source has, without the prefix that JiT's checkpoints have
ANY = "final_layer.linear.weight"


def plain(name):
    return name.removeprefix("net.")


def needed(original):
    """Names of what is converted; REPA-E's projector and its counter of batches are dropped."""
    dropped = ("projectors.", "bn.num_batches_tracked")
    return [name for name in original.weights if not name.startswith(dropped)]


def refusal(original, weights, **options):
    with pytest.raises(ValueError) as caught:
        original.convert(weights, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_model(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, other_state[name]), name


# --- the state dict


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_tensor_is_refused_by_name(name):
    original = load_original(name)
    for key in needed(original):
        weights = {other: tensor for other, tensor in original.weights.items() if other != key}
        assert plain(key) in refusal(original, weights), key


@pytest.mark.parametrize("name", NAMES)
def test_every_transposed_weight_is_refused_by_name(name):
    """Of the square ones nothing shows it."""
    original = load_original(name)
    for key in needed(original):
        tensor = original.weights[key]
        if tensor.ndim < 2 or tensor.shape[0] == tensor.shape[1]:
            continue
        message = refusal(original, original.weights | {key: tensor.transpose(0, 1)})
        assert plain(key) in message or "in_channels" in message, (key, message)


@pytest.mark.parametrize("name", NAMES)
def test_extra_tensors_are_refused_by_name(name):
    original = load_original(name)
    extra = {"blocks.0.attn.g_norm.weight": torch.ones(16), "head.bias": torch.ones(3)}
    message = refusal(original, original.weights | extra)
    assert "left over: blocks.0.attn.g_norm.weight, head.bias" in message
    assert f"width {32 if name in ('sit', 'dit', 'fitv2') else 16}" in message


def test_blocks_of_diffusers_that_differ_in_what_is_one_here():
    weights = diffusers_dit().state_dict()
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    weights[key] = weights[key] + 1
    with pytest.raises(ValueError, match="embeddings differ .class_embed.weight of block 1., but DoD has one"):
        convert_backbone(weights, "dit", num_attention_heads=2)


@pytest.mark.parametrize("damage", ["missing", "extra", "transposed"])
def test_diffusers_checkpoint(damage):
    weights = diffusers_dit().state_dict()
    for key, tensor in weights.items():
        if damage == "transposed" and (tensor.ndim < 2 or tensor.shape[0] == tensor.shape[1]):
            continue
        changed = dict(weights)
        if damage == "missing":
            del changed[key]
        elif damage == "extra":
            changed[key + ".extra"] = tensor
        else:
            changed[key] = tensor.transpose(0, 1)
        with pytest.raises(ValueError) as caught:
            convert_backbone(changed, "dit", num_attention_heads=2)
        assert key in str(caught.value) or "in_channels" in str(caught.value), (key, caught.value)


def test_all_that_is_wrong_is_listed_at_once():
    original = load_original("dit")
    weights = dict(original.weights)
    del weights["blocks.1.attn.proj.bias"]
    weights["blocks.0.mlp.fc2.weight"] = weights["blocks.0.mlp.fc2.weight"].T
    weights["extra"] = torch.zeros(1)
    message = refusal(original, weights)
    assert "missing: blocks.1.attn.proj.bias; left over: extra; of the wrong shape: blocks.0.mlp.fc2.weight" in message
    assert "is (128, 32), not (32, 128)" in message


def test_a_long_list_is_cut():
    original = load_original("dit")
    weights = {name: tensor for name, tensor in original.weights.items() if not name.startswith("blocks.1.attn")}
    weights |= {f"extra.{i}": torch.zeros(1) for i in range(200)}
    message = refusal(original, weights)
    assert "and 190 more" in message and len(message) < 1000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name, value):
    original = load_original(name)
    (key,) = (key for key in original.weights if plain(key) == ANY)
    weights = original.weights | {key: original.weights[key].clone()}
    weights[key][3, 5] = value
    assert f"NaN or infinite values in {ANY}" in refusal(original, weights)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("sit", 3),
        ("dit", 5),
        ("fitv2", 7),
        ("fitv2", 16),
        ("sit", 0),
        ("repae", 5),
        ("jit", 8),
        ("lightningdit", 8),
    ],
)
def test_head_count_that_does_not_fit(name, heads):
    """32 channels are not 3, 5 or 7 heads; 16 or 8 heads of 2 channels cannot carry 2D rotary positions."""
    original = load_original(name)
    assert "heads" in refusal(original, original.weights, num_attention_heads=heads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_becomes_float32(name, dtype):
    original = load_original(name)
    half = {key: tensor.to(dtype) for key, tensor in original.weights.items()}
    model = original.convert(half)
    rounded = {key: tensor.float() for key, tensor in half.items()}
    for key in rounded:
        if plain(key).startswith(("pos_embed", "feat_rope")):
            rounded[key] = original.weights[key]
    assert_same_model(model, original.convert(rounded))


@pytest.mark.parametrize("keys", [("ema",), ("model_ema1",), ("model",), ("state_dict",), ("state_dict", "model")])
@pytest.mark.parametrize("name", NAMES)
def test_nested_state_dict(name, keys):
    original = load_original(name)
    nested = original.weights
    for key in reversed(keys):
        nested = {key: nested, "steps": 400, "args": "text"}
    assert_same_model(original.convert(nested), original.convert())


def test_averaged_weights_come_first():
    original = load_original("dit")
    other = {name: tensor if name == "pos_embed" else tensor + 1 for name, tensor in original.weights.items()}
    both = {"model": other, "ema": original.weights, "opt": {"state": {}}}
    assert_same_model(original.convert(both), original.convert())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "a.b."]
)
@pytest.mark.parametrize("name", NAMES)
def test_prefix(name, prefix):
    """What DDP, compilation or the attribute of a module that holds the model puts before every name."""
    original = load_original(name)
    prefixed = {f"{prefix}{key}": tensor for key, tensor in original.weights.items()}
    assert_same_model(original.convert({"state_dict": prefixed}), original.convert())


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapped_blocks(wrapper):
    original = load_original("sit")
    wrapped = {key.replace("blocks.1.", f"blocks.1.{wrapper}."): tensor for key, tensor in original.weights.items()}
    assert wrapped.keys() != original.weights.keys()
    assert_same_model(original.convert(wrapped), original.convert())


def test_prefix_of_diffusers_dit():
    weights = diffusers_dit().state_dict()
    prefixed = {f"module.{key}": tensor for key, tensor in weights.items()}
    assert_same_model(*(convert_backbone(each, "dit", num_attention_heads=2) for each in (prefixed, weights)))


def test_several_models():
    """Two models in one state dict, or names that only their wrappers tell apart."""
    weights = load_original("dit").weights
    several = {f"{owner}.{key}": tensor for owner in ("student", "teacher") for key, tensor in weights.items()}
    assert "more than once, under 'student.', 'teacher.'" in refusal(load_original("dit"), several)
    twice = weights | {f"module.{key}": tensor for key, tensor in weights.items()}
    assert "the same without their wrappers" in refusal(load_original("dit"), twice)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_average_is_passed_over(name):
    original = load_original(name)
    assert_same_model(original.convert({"ema": {}, "model": original.weights}), original.convert())


@pytest.mark.parametrize("checkpoint", [{}, {"ema": {}}, [], {"a": 1}, {"a": torch.zeros(2, dtype=torch.int8)}])
def test_no_state_dict(checkpoint):
    with pytest.raises(ValueError, match="no state dict|other things than floating-point tensors: a"):
        convert_backbone(checkpoint, "dit", num_attention_heads=2)


def test_another_source():
    # SiT, DiT and LightningDiT without its switches have the same tensors.
    untold = {("sit", "dit"), ("dit", "sit"), ("sit", "lightningdit"), ("dit", "lightningdit")}
    for name in NAMES:
        original = load_original(name)
        for source in SOURCES:
            if source == original.source or (name, source) in untold:
                continue
            with pytest.raises(ValueError, match="left over|has no tensor|must have|check `in_channels`"):
                convert_backbone(original.weights, source, num_attention_heads=2)
    original = load_original("fitv2")
    with pytest.raises(ValueError, match="`source` is 'pixart'; use 'sit' or"):
        convert_backbone(original.weights, "pixart", num_attention_heads=2)


def test_lightningdits_feed_forward_is_no_dits():
    """Also where its norms and rotary positions, which tell it from DiT, are switched off."""
    weights = load_original("lightningdit").weights
    plainer = {key: tensor for key, tensor in weights.items() if ".norm" not in key and "feat_rope" not in key}
    plainer.pop("final_layer.norm_final.weight", None)
    with pytest.raises(ValueError, match="no tensor blocks.0.mlp.fc1.bias"):
        convert_backbone(plainer, "dit", num_attention_heads=2)
    assert convert_backbone(plainer, "lightningdit", num_attention_heads=2).config.norm_type == "layer_norm"


def test_learned_sigma_is_no_fitv2():
    original = load_original("fitv2")
    doubled = {
        name: torch.cat([tensor, tensor]) if name.startswith("final_layer.linear") else tensor
        for name, tensor in original.weights.items()
    }
    assert "FiT's first version" in refusal(original, doubled)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sit", "pos_embed"),
        ("dit", "pos_embed"),
        ("repae", "pos_embed"),
        ("jit", "net.pos_embed"),
        ("lightningdit", "pos_embed"),
        ("lightningdit", "feat_rope.freqs_cos"),
        ("lightningdit", "feat_rope.freqs_sin"),
    ],
)
def test_position_table_that_was_trained(name, key):
    original = load_original(name)
    weights = original.weights | {key: original.weights[key] + 0.01}
    assert f"{plain(key)} is not the fixed table of 2D positions" in refusal(original, weights)


def test_wrong_channels():
    original = load_original("sit")  # of 3 channels
    assert "takes 3 channels, not 4: check `in_channels`" in refusal(original, original.weights, in_channels=4)
    original = load_original("fitv2")  # where no tensor says so directly
    assert "check `in_channels`" in refusal(original, original.weights, in_channels=3)


# --- the file


class RunsWhenLoaded:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def refused_by_the_command(checkpoint, tmp_path, capsys, source="dit"):
    output = tmp_path / "output"
    status = main([source, str(checkpoint), str(output), "--num_attention_heads", "2"])
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1 and message.startswith("diffusers-dod convert: error: ")
    assert not output.exists() and not list(tmp_path.glob(".output*"))
    return message


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_pickle_with_code_does_not_run(suffix, tmp_path, capsys):
    marker, path = tmp_path / "marker", tmp_path / f"model{suffix}"
    torch.save(load_original("dit").weights | {"extra": RunsWhenLoaded(marker)}, path)
    message = refused_by_the_command(path, tmp_path, capsys)
    assert "other objects than tensors" in message and "safetensors" in message
    assert not marker.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # it would have
    assert marker.exists()


def test_plain_pickle_with_code_does_not_run(tmp_path, capsys):
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(RunsWhenLoaded(marker)))
    refused_by_the_command(path, tmp_path, capsys)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_git_lfs_pointer(suffix, tmp_path, capsys):
    path = tmp_path / f"model{suffix}"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2700000000\n")
    message = refused_by_the_command(path, tmp_path, capsys)
    assert str(path) in message and "git-lfs pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "words", "missing"])
def test_broken_file(suffix, damage, tmp_path, capsys):
    path, weights = tmp_path / f"model{suffix}", load_original("dit").weights
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a model", "words": b"text\n"}[damage]
        )
    assert str(path) in refused_by_the_command(path, tmp_path, capsys)


def test_the_command_lists_what_is_wrong(tmp_path, capsys):
    weights = dict(load_original("dit").weights)
    del weights["blocks.1.attn.proj.bias"]
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    message = refused_by_the_command(path, tmp_path, capsys)
    assert str(path) in message and "missing: blocks.1.attn.proj.bias" in message


def test_torch_file_that_is_called_safetensors(tmp_path):
    """FiT's repository has such."""
    torch.save(load_original("fitv2").weights, tmp_path / "model.safetensors")
    assert (
        main(["fitv2", str(tmp_path / "model.safetensors"), str(tmp_path / "output"), "--num_attention_heads", "2"])
        == 0
    )
    assert (tmp_path / "output" / "model_index.json").is_file()


def test_training_checkpoint_with_its_command_line(tmp_path, capsys):
    """As the training scripts of DiT, SiT and REPA write them."""
    weights, path = load_original("dit").weights, tmp_path / "0050000.pt"
    arguments = argparse.Namespace(model="DiT-XL/2", epochs=1400)
    torch.save({"model": weights, "ema": weights, "opt": {"state": {}, "param_groups": []}, "args": arguments}, path)
    assert main(["dit", str(path), str(tmp_path / "output"), "--num_attention_heads", "2"]) == 0
    assert "nested under 'ema'" in capsys.readouterr().out
    assert (tmp_path / "output" / "model_index.json").is_file()

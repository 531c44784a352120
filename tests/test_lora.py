"""LoRA adapters of the transformer through diffusers' own loaders and peft."""

import pytest
import torch
from helpers import tiny_pipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder, push_folder


def sample(pipe):
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    return pipe([3, 1], generator=torch.Generator().manual_seed(0), **arguments).images


def save_adapter(folder, seed):
    """Writes a LoRA with random weights as a training would."""
    transformer = tiny_pipeline().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], lora_alpha=2))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    layers = get_peft_model_state_dict(transformer)
    DoDPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return transformer


def test_adapter_is_loaded_fused_and_unloaded(tmp_path):
    adapted = save_adapter(tmp_path, seed=1)
    pipe = tiny_pipeline()
    plain = sample(pipe)
    expected = sample(tiny_pipeline(transformer=adapted))
    assert (expected - plain).abs().max() > 1e-2
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(sample(pipe), expected)
    pipe.fuse_lora()
    assert torch.allclose(sample(pipe), expected, atol=1e-4)
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert torch.allclose(sample(pipe), plain, atol=1e-4)
    pipe.enable_lora()
    assert torch.allclose(sample(pipe), expected, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.allclose(sample(pipe), plain, atol=1e-4)
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_a_pipeline_is_saved_without_its_adapter_or_with_it_fused(tmp_path):
    save_adapter(tmp_path / "lora", seed=1)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "lora")
    expected = sample(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="call `unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.allclose(sample(DoDPipeline.from_pretrained(tmp_path / "saved")), expected, atol=1e-4)


def test_two_adapters_with_weights(tmp_path):
    """Two at weights 0.5 and 2 are the sum of both changes at these weights, which fusing them one by one makes."""
    pipe = tiny_pipeline()
    for name, seed in (("one", 1), ("two", 2)):
        save_adapter(tmp_path / name, seed)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 2.0])
    assert pipe.get_active_adapters() == ["one", "two"]
    both = sample(pipe)

    fused = tiny_pipeline()
    for name, scale in (("one", 0.5), ("two", 2.0)):
        fused.load_lora_weights(tmp_path / name, adapter_name=name)
        fused.fuse_lora(lora_scale=scale)
        fused.unload_lora_weights()
    assert torch.allclose(sample(fused), both, atol=1e-3)
    pipe.set_adapters("two")
    alone = sample(pipe)
    assert (alone - both).abs().max() > 1e-2
    pipe.delete_adapters("one")
    assert torch.equal(sample(pipe), alone)


@pytest.mark.parametrize("where", ["folder", "file", "tensors"])
def test_an_adapter_that_peft_saved_is_loaded_with_its_alpha(where, tmp_path):
    targets = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], lora_alpha=6)
    model = get_peft_model(tiny_pipeline().transformer, targets)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    expected = sample(tiny_pipeline(transformer=model.get_base_model()))
    pipe, file = tiny_pipeline(), tmp_path / "adapter_model.safetensors"
    pipe.load_lora_weights({"folder": tmp_path, "file": file, "tensors": load_file(file)}[where])
    adapted = sample(pipe)
    assert (adapted - sample(tiny_pipeline())).abs().max() > 1e-2
    # The tensors say nothing of the alpha.
    assert torch.allclose(adapted, expected, atol=1e-5) == (where != "tensors")


def test_an_adapter_is_swapped_in_place(tmp_path):
    """Hot-swapping keeps the modules, so a compiled model need not be compiled again."""
    for name, seed in (("one", 1), ("two", 2)):
        save_adapter(tmp_path / name, seed)
    pipe, other = tiny_pipeline(), tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "one", adapter_name="style")
    modules = [id(module) for module in pipe.transformer.modules()]
    pipe.load_lora_weights(tmp_path / "two", adapter_name="style", hotswap=True)
    other.load_lora_weights(tmp_path / "two")
    assert torch.equal(sample(pipe), sample(other))
    assert [id(module) for module in pipe.transformer.modules()] == modules


def test_folder_with_an_adapter_is_checked_and_needs_its_base(tmp_path, capsys):
    save_adapter(tmp_path, seed=1)
    assert check_folder(tmp_path, "mit") == []
    with pytest.raises(ValueError, match="needs the model that it adapts"):
        push_folder(tmp_path, "user/lora", license="mit")
    push_folder(tmp_path, "user/lora", license="mit", base_model="user/model", dry_run=True)
    assert "pytorch_lora_weights.safetensors" in capsys.readouterr().out

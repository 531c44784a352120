"""What diffusers offers every model, on both of ours: saving, casting, attention backends, LoRA, offloading."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from helpers import needs_group_offload, tiny_embedder, tiny_transformer
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dod.compatibility import DTYPE_ARGUMENT


def transformer_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([100.0, 900.0]),
        "class_labels": torch.tensor([3, 10]),
        "encoder_hidden_states": torch.randn(2, 16, 16, generator=generator).to(dtype),
    }


def embedder_inputs(dtype=torch.float32):
    return {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)}


CASES = {
    "transformer": (tiny_transformer, transformer_inputs),
    "transformer like DiT": (
        lambda **overrides: tiny_transformer(
            pos_embed_type="sincos",
            base_size=4,
            activation_fn="gelu-approximate",
            qk_norm=None,
            adaln_type="full",
            **overrides,
        ),
        transformer_inputs,
    ),
    # A coarser grid, so that the resize acts too
    "embedder": (lambda **overrides: tiny_embedder(patch_size=4, output_patch_size=2, **overrides), embedder_inputs),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


def public_config(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


# --- saving


@torch.no_grad()
def test_save_and_load_in_shards(case, tmp_path):
    build, make_inputs = case
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path)
    assert public_config(loaded) == public_config(model)
    assert torch.equal(run(loaded, make_inputs()), run(model, make_inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_save_and_load_keep_the_dtype(case, dtype, tmp_path):
    model = case[0]().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{DTYPE_ARGUMENT: dtype})
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name


# --- precision


class _RecordDtypes(TorchDispatchMode):
    """Collects the dtype of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.dtypes.add(tensor.dtype)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64(case, dtype):
    build, make_inputs = case
    model, inputs = build().to(dtype), make_inputs(dtype)
    with _RecordDtypes() as recorded:
        output = run(model, inputs)
        output.float().square().mean().backward()
    assert dtype in recorded.dtypes
    assert torch.float64 not in recorded.dtypes and torch.complex128 not in recorded.dtypes


@torch.no_grad()
def test_bfloat16_stays_bfloat16_and_near_float32(case):
    build, make_inputs = case
    output = run(build().to(torch.bfloat16), make_inputs(torch.bfloat16))
    expected = run(build(), make_inputs())
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_layerwise_casting(case):
    build, make_inputs = case
    model, expected = build(), run(build(), make_inputs())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        cast = name.split(".")[0].endswith("_blocks") and ("attn." in name or "ff." in name)
        if not name.startswith("proj_out"):
            assert parameter.dtype == (torch.float8_e4m3fn if cast else torch.float32), name
    output = run(model, make_inputs())
    assert output.dtype == torch.float32
    assert 0 < (output - expected).norm() < 0.2 * expected.norm()


# --- training


def test_gradient_checkpointing_gives_the_same_gradients(case):
    build, make_inputs = case
    gradients = []
    for checkpointing in (False, True):
        model, calls = build().train(), []
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        block = next(module for name, module in model.named_modules() if name.endswith("blocks.0"))
        block.attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        run(model, make_inputs()).square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)  # the backward pass runs a checkpointed block again
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().max() > 0, name


# --- attention


@torch.no_grad()
def test_fused_projections(case):
    build, make_inputs = case
    model = build()
    before, names = run(model, make_inputs()), list(model.state_dict())
    model.fuse_qkv_projections()
    attentions = [module for name, module in model.named_modules() if name.endswith("attn")]
    calls = []
    for attention in attentions:
        attention.to_qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, make_inputs()), before, atol=1e-5, rtol=1e-4)
    assert len(calls) == len(attentions) > 0
    model.unfuse_qkv_projections()
    assert list(model.state_dict()) == names
    assert torch.equal(run(model, make_inputs()), before)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
@torch.no_grad()
def test_attention_backends_agree(case, backend):
    build, make_inputs = case
    model = build()
    expected = run(model, make_inputs())
    with attention_backend("native"):  # `set_attention_backend` is global too: leaving this puts it back
        model.set_attention_backend(backend)
        output = run(model, make_inputs())
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_backend_is_the_one_that_runs(case):
    """A kernel that this device lacks raises, so the model's own choice reaches its attention."""
    build, make_inputs = case
    model = build()
    with attention_backend("native"):
        model.set_attention_backend("_native_cudnn")
        # Back to the native one for every model that has no choice of its own
        with attention_backend("native"), pytest.raises(RuntimeError, match="No (available kernel|viable backend)"):
            run(model, make_inputs())


# --- LoRA


@torch.no_grad()
def test_lora(case, tmp_path):
    build, make_inputs = case
    model = build()
    before = run(model, make_inputs())
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    adapted = run(model, make_inputs())
    assert (adapted - before).abs().max() > 1e-2
    model.save_lora_adapter(tmp_path)

    loaded = build()
    loaded.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(run(loaded, make_inputs()), adapted)
    loaded.fuse_lora()
    torch.testing.assert_close(run(loaded, make_inputs()), adapted, atol=1e-5, rtol=1e-4)
    loaded.unfuse_lora()
    loaded.disable_lora()
    torch.testing.assert_close(run(loaded, make_inputs()), before, atol=1e-5, rtol=1e-4)
    loaded.unload_lora()
    assert list(loaded.state_dict()) == list(build().state_dict())


def test_lora_trains_the_adapter_only(case):
    build, make_inputs = case
    model = build()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    run(model, make_inputs()).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)


# --- offloading


@needs_group_offload
@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@torch.no_grad()
def test_group_offload(case, options):
    """From the CPU to the CPU: every parameter must be where a hook expects it, no memory is saved."""
    build, make_inputs = case
    model, expected = build(), run(build(), make_inputs())
    model.enable_group_offload(onload_device=torch.device("cpu"), **options)
    for _ in range(2):
        assert torch.equal(run(model, make_inputs()), expected)


@torch.no_grad()
def test_disk_offload(case, tmp_path):
    """accelerate's `device_map` with a part on disk: no block is split, and the output is the same."""
    build, make_inputs = case
    model = build()
    model.save_pretrained(tmp_path / "model")
    names = {name.split(".")[0] for name, _ in model.named_children()}
    blocks = {name for name in names if name.endswith("blocks")}
    device_map = dict.fromkeys(names - blocks, "cpu") | dict.fromkeys(blocks, "disk")
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    assert torch.equal(run(loaded, make_inputs()), run(model, make_inputs()))

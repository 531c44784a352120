"""What keeps the models and the pipeline fast on a device: nothing waits for it, nothing is copied to it step by step."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


SINCOS = {"pos_embed_type": "sincos", "base_size": 4}


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([100.0, 900.0]), torch.tensor([3, 10])


# --- tables of positions, which are operations of every forward


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_a_second_forward_equals_the_first(overrides):
    """Whatever grid and precision came between."""
    model = tiny_transformer(**overrides)
    expected = model(*make_inputs()).sample
    model(torch.randn(2, 4, 6, 10), *make_inputs()[1:])
    tiny_transformer(**overrides).to(torch.bfloat16)(make_inputs()[0].bfloat16(), *make_inputs()[1:])
    assert torch.equal(model(*make_inputs()).sample, expected)


@pytest.mark.parametrize("overrides", [{}, SINCOS])
def test_what_ran_in_inference_mode_trains(overrides):
    """No tensor of inference mode is left, which autograd would refuse to save for the backward pass."""
    model = tiny_transformer(**overrides)
    with torch.inference_mode():
        expected = model(*make_inputs()).sample.clone()
    sample = model(*make_inputs()).sample
    torch.testing.assert_close(sample.detach(), expected)
    sample.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_fake_tensors_run_and_leave_nothing_behind(overrides):
    model, latents = tiny_transformer(**overrides), torch.randn(2, 4, 14, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(2, 4, 14, 6), *(torch.empty_like(x) for x in make_inputs()[1:])).sample.shape[2] == 14
    assert type(model(latents, *make_inputs()[1:]).sample) is torch.Tensor
    with FakeTensorMode(allow_non_fake_inputs=True):  # nor do real tensors get among them
        model(torch.empty(2, 4, 14, 6), *(torch.empty_like(x) for x in make_inputs()[1:]))


@pytest.mark.parametrize("build", [tiny_transformer, lambda: tiny_transformer(**SINCOS), tiny_embedder])
@torch.no_grad()
def test_models_run_on_the_meta_device(build):
    """Tables are made where the latents are."""
    model = build().to("meta")
    inputs = [tensor.to("meta") for tensor in make_inputs()]
    output = model(*inputs) if hasattr(model, "transformer_blocks") else model(inputs[0])
    assert output[0].is_meta


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_exported_program_equals_the_model(overrides):
    model = tiny_transformer(num_layers=1, sample_size=12, **overrides)
    inputs = (torch.randn(2, 4, 12, 8), *make_inputs()[1:])
    program = torch.export.export(model, inputs, kwargs={"return_dict": False}, strict=False)
    expected = model(*inputs).sample
    torch.testing.assert_close(program.module()(*inputs, return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)
    assert type(model(*inputs).sample) is torch.Tensor


# --- sampling


class Operations(TorchDispatchMode):
    """Remembers the names of all operations below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def count_operations(pipe, steps):
    with Operations() as operations:
        pipe([1, 3], num_inference_steps=steps, guidance_scale=2.0, guidance_interval=(0.0, 1.0), output_type="latent")
    return {name: operations.names.count(name) for name in set(operations.names)}


# Those after which the host reads what a device computed
WAITING = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.is_nonzero.default")


def test_steps_do_not_wait_for_the_device():
    """Neither the pipeline nor the models; nor FlowMatchEulerDiscreteScheduler, if it is told where to begin."""
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    few, many = count_operations(pipe, 2), count_operations(pipe, 5)
    assert many["aten.addmm.default"] > few["aten.addmm.default"]
    for name in WAITING:  # a look at the result, whether it is finite, is all that the host waits for
        assert many.get(name, 0) == few.get(name, 0) <= 1
    # Nor is anything copied to the device in each step.
    for name in ("aten._to_copy.default", "aten.lift_fresh.default"):
        assert many.get(name) == few.get(name)


@pytest.mark.parametrize("separate", [{}, {"prior_guidance_scale": 2.0}])
def test_only_guided_steps_have_more_rows(separate):
    pipe, labels, priors = tiny_pipeline(), [], []

    def watch(module, arguments, keywords):
        labels.append(keywords["class_labels"])
        priors.append(keywords["encoder_hidden_states"])

    pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    options = {"num_inference_steps": 6, "guidance_interval": (0.2, 0.8), "output_type": "latent"}
    pipe([1, 3], guidance_scale=2.0, **separate, **options)
    parts = 3 if separate else 2
    assert [len(rows) for rows in labels] == [2, 2, 4, 4, 4, 2] + [2, 2, *[2 * parts] * 3, 2]
    assert priors[:6] == [None] * 6 and [len(rows) for rows in priors[6:]] == [len(rows) for rows in labels[6:]]


def test_a_prior_that_a_callback_changes_in_place_is_seen():
    pipe = tiny_pipeline()
    noise, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def change(in_place):
        def callback(pipe, step, timestep, tensors):
            tokens = tensors["prior_tokens"]
            return {"prior_tokens": tokens.zero_() if in_place else torch.zeros_like(tokens)}

        return callback

    def sample(callback):
        return pipe(
            [1, 3],
            image=picture,
            latents=noise,
            num_inference_steps=3,
            guidance_scale=2.0,
            guidance_interval=(0.0, 1.0),
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prior_tokens"],
        ).images

    assert torch.equal(sample(change(True)), sample(change(False)))
    assert (sample(change(False)) - sample(None)).abs().max() > 1e-3


# --- what a saved model holds


@pytest.mark.parametrize("build", [tiny_transformer, lambda: tiny_transformer(**SINCOS), tiny_embedder])
def test_tables_are_no_part_of_a_model(build):
    model = build()
    names, buffers = list(model.state_dict()), list(model.buffers())
    with torch.no_grad():
        model(*make_inputs()) if hasattr(model, "transformer_blocks") else model(make_inputs()[0])
    assert list(model.state_dict()) == names and list(model.buffers()) == buffers == []

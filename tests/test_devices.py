"""A GPU's mistakes without a GPU: devices that are mixed, and what makes the host wait, on a device of fake tensors."""

import diffusers
import numpy as np
import pytest
import torch
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from own_process import in_own_process
from test_more_schedulers import CASES
from test_pipeline_schedulers import SCHEDULERS, make_scheduler


pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)


def generators(count):
    """Of the CPU, since fake devices have none; what they draw is then copied, which is seen."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# --- the device itself


@in_own_process()
def test_the_fake_device_sees_what_a_gpu_would():
    from fake_device import DEVICE, Wait, fake_device
    from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

    with fake_device() as device:
        values = torch.randn(3, device=DEVICE)
        assert torch.ones(3).sum().item() == 3 and not device.taken()  # the CPU is real
        with pytest.raises(FakeTensorDeviceMismatchError):
            values + torch.ones(3)
        values + torch.tensor(1.0)  # as on a GPU, where a single number of the CPU is welcome
        torch.ones(3).to(DEVICE, non_blocking=True)
        assert not device.taken()
        for kind, wait in (
            ("read", lambda: values.sum().item()),
            ("read", lambda: bool(values.isfinite().all())),
            ("read", lambda: values.nonzero()),
            ("copy to the host", lambda: values.cpu()),
            ("copy to the device", lambda: torch.ones(3).to(DEVICE)),
            ("copy to the device", lambda: torch.tensor([1, 2], device=DEVICE)),
        ):
            wait()
            assert device.taken() == [Wait(kind, "tests/test_devices.py:<lambda>")]


# --- sampling

ALL_SCHEDULERS = {name: (lambda name=name: make_scheduler(name)) for name in SCHEDULERS}
ALL_SCHEDULERS |= {case: (lambda c=c, o=o: getattr(diffusers, c)(**o)) for case, (c, o) in CASES.items()}
# One of each class
SCHEDULER_OF_CLASS = {type(make()).__name__: name for name, make in reversed(ALL_SCHEDULERS.items())}
# diffusers' own schedulers that stop in each step, and where
STOPPING = {
    "DDIMScheduler": "looks its table of noise levels up, which is on the CPU, by the timestep, which is on the device",
    "DDPMScheduler": "the same",
    "LCMScheduler": "the same",
    "TCDScheduler": "the same",
    "FlowMatchHeunDiscreteScheduler": "asks whether this sigma is above the least for its churn, which is off",
    "SASolverScheduler": "asks whether the timestep is one of those where it adds noise",
    "UniPCMultistepScheduler": "solves for its coefficients on the CPU and copies them",
}
RANDOM = "utils/torch_utils.py:randn_tensor"
OF_A_CALL = {
    # The class ids
    ("copy to the device", "diffusers_dod/pipeline_dod.py:__call__"),
    # A finite sample, asked once for the whole batch
    ("read", "diffusers_dod/arguments.py:check_sample"),
    # The noise of the CPU's generators, which these tests have and a GPU need not
    ("copy to the device", RANDOM),
    # The codes' mean and deviation, of the embedder's config
    ("copy to the device", "diffusers_dod/latent_embedder_dod.py:<genexpr>"),
    # What the user passed: noise, codes, a picture, which is asked once whether it is finite
    ("copy to the device", "diffusers_dod/pipeline_dod.py:prepare_latents"),
    ("copy to the device", "diffusers_dod/priors.py:prepare_codes"),
    ("copy to the device", "diffusers_dod/priors.py:prepare_image_latents"),
    ("read", "diffusers_dod/priors.py:prepare_image_latents"),
}


def waits_of_a_call(pipe, **options):
    """The stops within the denoising steps, those before and after, and the output; the pipeline is moved to the device."""
    from fake_device import DEVICE, fake_device

    in_steps, around, stage = [], [], None

    def callback(pipe, step, timestep, tensors):
        nonlocal stage
        # What a stage prepares comes before its first step.
        (in_steps if stage == pipe.current_stage else around).extend(device.taken())
        stage = pipe.current_stage
        return tensors

    options = {"num_inference_steps": 3, "generator": generators(2), "guidance_interval": (0.0, 1.0)} | options
    with fake_device() as device:
        pipe.to(DEVICE)
        device.taken()
        output = pipe([1, 2], callback_on_step_end=callback, return_stages=True, **options)
        return in_steps, around + device.taken(), output


def assert_known(waits):
    """Every stop but those of diffusers' schedulers is one of a call's."""
    unknown = {wait for wait in waits if "schedulers/" not in wait.place} - OF_A_CALL
    assert not unknown, unknown


@pytest.mark.parametrize("scheduler", SCHEDULER_OF_CLASS)
@in_own_process()
def test_two_stages_with_every_scheduler(scheduler):
    pipe = tiny_pipeline(scheduler=ALL_SCHEDULERS[SCHEDULER_OF_CLASS[scheduler]]())
    in_steps, around, output = waits_of_a_call(pipe, output_type="latent")
    assert output.images.device.type == "fakegpu" and len(output.stages) == 2
    assert_known(in_steps + around)
    stops = {wait for wait in in_steps if wait.place not in RANDOM}
    assert bool(stops) == (scheduler in STOPPING), stops


CALLS = {
    "codes": (tiny_coded_pipeline, {"code_num_inference_steps": 2}),
    "codes and a stage": (tiny_coded_pipeline, {"num_stages": 2, "code_guidance_scale": 2.0}),
    "two scales": (tiny_pipeline, {"prior_guidance_scale": 1.5}),
    "the user's codes": (tiny_pipeline, {"codes": torch.ones(1, 16, 2)}),
    "the user's picture": (tiny_pipeline, {"image": torch.rand(1, 4, 8, 8)}),
    "the user's noise": (tiny_pipeline, {"latents": torch.ones(2, 4, 8, 8)}),
    "sine and cosine": (lambda: tiny_pipeline(transformer=tiny_transformer(pos_embed_type="sincos")), {}),
} | {name: (lambda name=name: tiny_pipeline(vae=tiny_vae(name)), {}) for name in ("kl", "tiny", "dc")}


@pytest.mark.parametrize("name", CALLS)
@in_own_process()
def test_a_whole_call_stops_at_its_ends_only(name):
    make, options = CALLS[name]
    in_steps, around, output = waits_of_a_call(make(), output_type="pt", **options)
    assert output.images.device.type == "fakegpu"
    assert not in_steps, in_steps
    assert_known(around)


# --- training

ON_DEVICE = {"ACCELERATE_TORCH_DEVICE": "fakegpu:0"}
ARGUMENTS = ["--train_data_dir", "x", "--output_dir", "x", "--max_train_steps", "9", "--report_to", "none"]
TRAININGS = {
    "images": [],
    "bf16": ["--mixed_precision", "bf16"],
    "checkpointing": ["--gradient_checkpointing"],
    "noise": ["--embedder_noise", "0.1", "--bottleneck_noise", "0.3", "--weighting", "sigma_sqrt"],
    "epsilon": ["--prediction_type", "epsilon"],
    "repa": ["--repa_encoder", "dinov2", "--repa_layer", "1", "--mixed_precision", "bf16"],
    "vae": ["--vae_name_or_path", "kl"],
    "latents": ["--random_flip"],
    "codes": [],
}
# The numbers of the log, before the update: those that are no numbers, or leap, keep the update out (`StepGuard`)
OF_A_STEP = [("read", "training/step.py:read")]


def training_batch(name, rows, size=16):
    """Images, or cached latents, as the loader has them."""
    batch = {"label": torch.zeros(rows, dtype=torch.long)}
    if name in ("latents", "codes"):
        flips = (rows, 2 if name == "latents" else 1, 4 if name == "latents" else 2, 8, 8)
        return batch | {"mean": torch.zeros(flips)} | ({"std": torch.ones(flips)} if name == "latents" else {})
    return batch | {"pixels": torch.zeros(rows, 3, size, size, dtype=torch.uint8)}


def vision_model():
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    return Dinov2Model(Dinov2Config(**size)).eval()


def training_models(name, args):
    channels = {"codes": 2, "vae": 4, "latents": 4}.get(name, 3)
    options = {"prediction_type": args.prediction_type} if name == "epsilon" else {}
    transformer = tiny_transformer(in_channels=channels, sample_size=16 if channels == 3 else 8, **options)
    return transformer, None if name == "codes" else tiny_embedder(in_channels=channels)


@pytest.mark.parametrize("name", TRAININGS)
@in_own_process(**ON_DEVICE)
def test_a_training_step_stops_for_its_log_only(name):
    """Both parts of an accumulated batch, the gradients' norm, the update and two averages; the step after the first."""
    from accelerate.state import AcceleratorState
    from fake_device import DEVICE, fake_device

    from diffusers_dod.training.averaging import WeightAverages
    from diffusers_dod.training.build import REPAParts, build_accelerator, build_optimizer
    from diffusers_dod.training.guard import StepGuard
    from diffusers_dod.training.options import parse_args, resolve_objective
    from diffusers_dod.training.repa import REPAEncoder, REPAProjector
    from diffusers_dod.training.step import GradientStep, StepSums, TrainingModule, draw_step, losses

    AcceleratorState._reset_state(reset_partial_state=True)
    args = parse_args([*ARGUMENTS, "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2", *TRAININGS[name]])
    args.prediction_type = args.prediction_type or "flow"
    resolve_objective(args)
    accelerator = build_accelerator(args)
    assert accelerator.device == DEVICE
    vae, repa, noise_scheduler = None, None, None
    if name == "vae":
        vae = tiny_vae()
    if name == "repa":
        encoder = REPAEncoder(vision_model(), [0.5] * 3, [0.5] * 3)
        repa = REPAParts(encoder, REPAProjector(16, 16, hidden_dim=16), (8, 8))
    if name == "epsilon":
        noise_scheduler = diffusers.DDPMScheduler()
    transformer, embedder = training_models(name, args)
    rows, guard = 4, StepGuard()
    with fake_device() as device:
        for model in (transformer, embedder):
            if model is not None and args.gradient_checkpointing:
                model.enable_gradient_checkpointing()
        module = TrainingModule(transformer, embedder, repa and repa.projector, args.repa_layer, args.repa_weight)
        module.train().to(DEVICE)
        for frozen in (vae, repa and repa.encoder):
            if frozen is not None:
                frozen.to(DEVICE)
        optimizer = accelerator.prepare(build_optimizer(args, list(module.parameters())))
        averages = WeightAverages(dict(module.named_parameters()), [0.99, 0.9])
        sums = StepSums(DEVICE)
        add_gradients = GradientStep(
            *(args, accelerator, module, transformer, embedder, vae, repa, noise_scheduler, sums, 2)
        )
        types = set()
        transformer.register_forward_hook(lambda model, inputs, output: types.add(output[0].dtype))
        waits = []
        for step in range(2):
            device.taken()
            draws = draw_step(args, step, 2 * rows, noise_scheduler)
            for part in range(2):
                batch = {k: v.to(DEVICE, non_blocking=True) for k, v in training_batch(name, rows).items()}
                own = draws.of_rows(torch.arange(part, 2 * rows, 2), DEVICE)
                add_gradients(batch, own, generators(rows))
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
            sums.add(stops=0.0)
            read = sums.read(accelerator, grad_norm)
            assert guard.reason_to_skip(losses(read)["loss"], read["grad_norm"]) is None
            optimizer.step()
            averages.step()
            optimizer.zero_grad()
            waits = device.taken()
        assert types == {torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32}
        expected = {("copy to the device", RANDOM), *OF_A_STEP}
        assert set(waits) == expected, waits
        assert [wait for wait in waits if wait.kind == "read"] == OF_A_STEP  # once
        assert averages.tensors(0.9)[next(iter(averages.parameters))].device == DEVICE


# --- what looks at samples


@in_own_process()
def test_extractors_and_metrics(tmp_path):
    from fake_device import DEVICE, fake_device
    from transformers import BitImageProcessor

    from diffusers_dod.evaluation import ImageSet, TransformersExtractor, evaluate
    from diffusers_dod.evaluation.names import METRICS

    vision_model().save_pretrained(tmp_path / "model")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "model")
    extractor = TransformersExtractor(str(tmp_path / "model"))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with fake_device() as device:
        images = torch.zeros(12, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
        extractor.to(DEVICE)
        device.taken()
        features = extractor(images)
        assert features["features"].device == DEVICE and not device.taken()
        features |= {"logits": torch.rand(12, 5, device=DEVICE), "spatial": torch.rand(12, 7, device=DEVICE)}
        results = evaluate(features, ImageSet(str(tmp_path / "images.npz")), dict(features), "inception", METRICS)
        assert {result["metric"] for result in results} > {"fd", "sfd", "is", "kid", "precision", "recall", "coverage"}


@in_own_process()
def test_pictures(tmp_path):
    from fake_device import DEVICE, fake_device

    from diffusers_dod.viz import stage_code_maps, stage_grid

    pipe = tiny_pipeline(channels=3)
    with fake_device():
        pipe.to(DEVICE)
        options = {"num_inference_steps": 1, "output_type": "latent", "return_stages": True}
        stages = pipe([1, 2], generator=generators(2), **options).stages
        maps = stage_code_maps(pipe, stages)
        grids = [stage_grid(maps, ["one", "two"]), stage_grid([pipe.decode(sample, "pil") for sample in stages])]
    assert all(grid.mode == "RGB" for grid in grids)


@in_own_process()
def test_losses_and_gradients_of_the_models_alone():
    """Without accelerate: a fused and a foreach AdamW, autocast of CUDA's rules, hidden states, dropped labels."""
    from fake_device import DEVICE, fake_device

    from diffusers_dod.training import count_prior_rows, dod_loss, drop_labels, flow_example

    transformer, embedder = tiny_transformer(), tiny_embedder()
    with fake_device() as device:
        parameters = [*transformer.to(DEVICE).parameters(), *embedder.to(DEVICE).parameters()]
        latents = torch.randn(4, 4, 8, 8, device=DEVICE)
        example = flow_example(latents, torch.randn_like(latents), torch.rand(4, device=DEVICE))
        optimizer = torch.optim.AdamW(parameters, foreach=True)
        for _ in range(2):
            device.taken()
            labels = drop_labels(torch.zeros(4, dtype=torch.long, device=DEVICE), 10, 0.1)
            with torch.autocast("fakegpu", torch.bfloat16):
                rows = count_prior_rows(4, 0.6, torch.Generator())
                loss = dod_loss(transformer, embedder, latents, labels, example, rows, hidden_states_layer=1)
            assert loss.hidden_states.dtype == torch.bfloat16 and loss.total.dtype == torch.float32
            loss.total.backward()
            optimizer.step()
            assert not device.taken()
    assert all(parameter.grad.device == DEVICE for parameter in parameters)

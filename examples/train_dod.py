"""Trains Diffusion on Diffusion (arXiv 2410.08531) on images, from scratch or from a saved pipeline.

Images come from a folder with one subfolder a class, a folder of `datasets.save_to_disk` or a dataset of the Hub.
Without a VAE the model works on pixels:

    accelerate launch examples/train_dod.py --train_data_dir digits --output_dir dod-digits --resolution 28 \
        --transformer_config '{"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}' \
        --embedder_config '{"num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4}' \
        --train_batch_size 64 --max_train_steps 5000

On the latents of a VAE, with a recipe (the paper's model and batch) and 8 GPUs:

    accelerate launch --num_processes 8 examples/train_dod.py --recipe examples/recipes/imagenet256_xl.yaml \
        --train_data_dir imagenet/train --train_batch_size 32 --dataloader_num_workers 8 --output_dir dod-xl

`output_dir` then loads with `DoDPipeline.from_pretrained`. On the way it receives `checkpoint-N` folders, sample grids in
`samples/` (rows are stages, columns classes), the logs, `training_config.json` and `environment.json`.

The same command goes on where the run was, whatever ended it; once it is finished the command says so and ends with 0.
SIGTERM and SIGINT write a checkpoint first and end with 128 plus the signal's number, 143 and 130. Bad input is one line
and status 2. A checkpoint that cannot be written, to a full disk for instance, leaves the older ones as they are: training
goes on, but for the last one, after which the status is 1. More than `--max_skipped_steps` bad updates in a row are 3.

Every random number of a step follows from the seed, the step and the row's position in the global batch. A resumed run
thus takes the steps that an unbroken one would have taken, bit by bit on the same machine, and any number of processes
and accumulation steps trains on the same rows with the same noise as long as their product with `--train_batch_size`
stays. A stream's order alone depends on the number of processes.
"""

import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from train_arguments import FREE_KEYS, BadData, BadInput, describe_environment, parse_args
from train_setup import (
    build_optimizer,
    build_pipeline,
    build_repa,
    export_pipeline,
    freeze,
    load_data,
    make_batches,
    to_features,
    to_latents,
)

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.averaging import WeightAverages, full_tensors
from diffusers_dod.checkpoints import (
    CONFIG_NAME,
    CheckpointNotWritten,
    find_checkpoint,
    load_process_state,
    register_model_hooks,
    save_checkpoint,
    trained_parameters,
)
from diffusers_dod.cpu_fsdp import enable_fsdp_on_cpu, keep_precision_in_fsdp
from diffusers_dod.flops import PEAK_TFLOPS, training_flops
from diffusers_dod.hub import BackgroundPush, find_stage_grid
from diffusers_dod.process_group import drain_process_group
from diffusers_dod.randomness import row_generators, step_generator
from diffusers_dod.repa import REPAProjector, repa_loss
from diffusers_dod.step_guard import StepGuard
from diffusers_dod.stop_request import StopRequest
from diffusers_dod.training import count_prior_rows, ddpm_example, dod_loss, flow_example


class TooManyBadSteps(Exception):
    """The guard has seen enough; printed as one line."""


logger = get_logger(__name__, log_level="INFO")
STATUS = {BadInput: 2, BadData: 2, CheckpointNotWritten: 1, TooManyBadSteps: 3}
NAMES = ("transformer", "latent_embedder")


class TrainingModule(torch.nn.Module):
    """Both models, REPA's projector and the loss as one module: one forward for DDP to synchronise and autocast to cover."""

    # FSDP shards these by themselves.
    _no_split_modules = [*DoDTransformer2DModel._no_split_modules, *DoDLatentEmbedder._no_split_modules]

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        latent_embedder: DoDLatentEmbedder,
        repa_projector: REPAProjector | None,
        repa_layer: int,
        repa_weight: float,
    ):
        super().__init__()
        self.transformer, self.latent_embedder, self.repa_projector = transformer, latent_embedder, repa_projector
        self.repa_layer, self.repa_weight = repa_layer, repa_weight

    def forward(self, latents, labels, example, prior_rows, weighting, code_noise, features):
        """Returns what to differentiate, each row's denoising loss, and REPA's loss where it takes part."""
        inputs = (latents, labels, example, prior_rows, weighting, code_noise)
        if self.repa_projector is None:
            loss = dod_loss(self.transformer, self.latent_embedder, *inputs)
            return loss.total, loss.per_sample, None
        loss = dod_loss(self.transformer, self.latent_embedder, *inputs, hidden_states_layer=self.repa_layer)
        alignment = repa_loss(self.repa_projector(loss.hidden_states), features)
        return loss.total + self.repa_weight * alignment, loss.per_sample, alignment.detach()


class StepDraws(NamedTuple):
    """What chance decides about each row of a global batch, `(rows,)` each, and how many first rows see a prior."""

    mirrored: torch.Tensor
    without_class: torch.Tensor
    times: torch.Tensor
    num_prior_rows: int


def draw_step(args, step: int, num_rows: int, noise_scheduler: DDPMScheduler | None) -> StepDraws:
    """Draws for all rows in every process, which then takes its own."""
    generator = step_generator(args.seed, step)
    prior_rows = count_prior_rows(num_rows, args.prior_drop, generator)
    mirrored = torch.rand(num_rows, generator=generator) < (0.5 if args.random_flip else 0)
    without_class = torch.rand(num_rows, generator=generator) < args.class_drop
    if noise_scheduler is not None:
        times = torch.randint(noise_scheduler.config.num_train_timesteps, (num_rows,), generator=generator)
    else:
        shape = (args.logit_mean, args.logit_std, args.mode_scale)
        times = compute_density_for_timestep_sampling(args.timestep_density, num_rows, *shape, generator=generator)
    return StepDraws(mirrored, without_class, times, prior_rows)


def make_example(args, latents, times, generators, noise_scheduler: DDPMScheduler | None):
    """What to denoise, and the weight of each row's error."""
    noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
    if noise_scheduler is not None:
        return ddpm_example(latents, noise, times, noise_scheduler), None
    # The least noise of diffusers' schedulers, for sigma_sqrt is infinite without any.
    weighting = compute_loss_weighting_for_sd3(args.weighting, times.clamp(min=1e-3))
    return flow_example(latents, noise, times), weighting


def embedder_inputs(args, latents, generators, embedder: DoDLatentEmbedder):
    """What the embedder reads, and the noise on its codes; both as they are unless noise is asked for."""
    if args.embedder_noise:
        noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
        latents = latents + args.embedder_noise * noise
    if not args.bottleneck_noise:
        return latents, None
    tokens = latents[0, 0].numel() // embedder.config.patch_size**2
    shape = (len(latents), tokens, embedder.config.bottleneck_dim)
    return latents, args.bottleneck_noise * randn_tensor(shape, generator=generators, device=latents.device)


def averaged_pipeline(
    accelerator: Accelerator, pipeline: DoDPipeline, averages: WeightAverages | None, lora_dir: Path | None = None
) -> DoDPipeline | None:
    """A plain copy with the averaged weights, or the live ones, in the main process; every process must call this."""
    weights = {name: full_tensors(getattr(pipeline, name).state_dict()) for name in NAMES}
    if averages is not None:
        averaged = full_tensors(averages.tensors(next(iter(averages.averages))))
        for name, value in averaged.items():
            model, key = name.split(".", 1)
            weights[model][key] = value
    if accelerator.is_main_process:
        return export_pipeline(pipeline, weights, lora_dir)


def validate(pipeline: DoDPipeline, accelerator: Accelerator, args, step: int) -> None:
    """Writes a grid of samples of the first classes, stage by stage, always from the same noise."""
    class_ids = list(range(min(pipeline.transformer.config.num_classes, 8))) or [None] * 8
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(class_ids))]
    with accelerator.autocast():
        stages = pipeline.to(accelerator.device)(class_ids, generator=generators, return_stages=True).stages
    grid = make_image_grid([image for stage in stages for image in stage], rows=len(stages), cols=len(class_ids))
    path = Path(args.output_dir, "samples", f"step_{step}.png")
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": np.array(grid)[None]}, step=step, **options)


def save_result(pipeline: DoDPipeline, output_dir: str, config: dict) -> None:
    """Puts the pipeline into the run's folder part by part, and last the note that it is that of the last step."""
    unfinished = Path(output_dir, "tmp-pipeline")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    pipeline.save_pretrained(unfinished)
    for part in sorted(unfinished.iterdir(), key=lambda path: path.name == DoDPipeline.config_name):
        place = Path(output_dir, part.name)
        if place.is_dir():
            shutil.rmtree(place)
        part.replace(place)
    unfinished.rmdir()
    write_config(output_dir, {**config, "step": config["max_train_steps"]})


def save_for_push(pipeline: DoDPipeline, config: dict, output_dir: str, folder: str) -> None:
    """A pipeline of the way in a folder of its own, with what its card tells."""
    for name in NAMES:  # copies; the autoencoder is the one that training goes on with
        getattr(pipeline, name).to("cpu")
    pipeline.save_pretrained(folder)
    write_config(folder, config)
    grid = find_stage_grid(Path(output_dir))
    if grid is not None:
        shutil.copy(grid, Path(folder, "stages.png"))


def write_config(output_dir: str, config: dict) -> None:
    path = Path(output_dir, CONFIG_NAME)
    temporary = path.with_name(f"tmp-{CONFIG_NAME}")
    temporary.write_text(json.dumps(config, indent=2))
    temporary.replace(path)


def finished_steps(output_dir: str) -> int | None:
    """The step whose pipeline the folder holds, if its run has come to an end."""
    path = Path(output_dir, CONFIG_NAME)
    return json.loads(path.read_text()).get("step") if path.is_file() else None


def check_prior_rows(args, accelerator: Accelerator) -> None:
    """An embedder that sees no row of a batch gets no gradient: DDP must be told, FSDP2 cannot do it."""
    if int(args.train_batch_size * (1 - args.prior_drop)) > 0:
        return
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP and args.prior_drop < 1
    if is_fsdp or args.train == ["embedder"]:
        raise BadInput(
            f"a --train_batch_size of {args.train_batch_size} with a --prior_drop of {args.prior_drop} leaves processes "
            f"without a prior, which {'FSDP' if is_fsdp else '--train embedder'} cannot do: raise one or lower the other"
        )
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def peak_flops(args, accelerator: Accelerator) -> float | None:
    """Of one device, in FLOP/s; `None` where neither the options nor the table tell."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(accelerator.device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv, __doc__)

    # 1. Accelerator, and how the global batch is dealt: see `BatchSampler`
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # a precision that the machine lacks
        raise BadInput(str(error)) from error
    try:
        enable_fsdp_on_cpu(accelerator)
    except NotImplementedError as error:
        raise BadInput(str(error)) from error
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP means FSDP2 here: set fsdp_version to 2 in accelerate's configuration")
    keep_precision_in_fsdp(accelerator)
    if accelerator.scaler is not None and args.spike_factor is not None:
        raise BadInput("--spike_factor works without fp16's gradient scaler only: take bf16")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which would look for it in a prepared dataloader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    args.mixed_precision = accelerator.mixed_precision
    set_seed(args.seed)
    check_prior_rows(args, accelerator)
    shares = accelerator.num_processes * args.gradient_accumulation_steps
    images_a_step = args.train_batch_size * shares

    # 2. Data and models
    data = load_data(args, accelerator)
    pipeline = build_pipeline(args, data)
    models, vae = [pipeline.transformer, pipeline.latent_embedder], pipeline.vae
    repa_encoder, repa_projector, token_grid = None, None, None
    if args.repa_encoder is not None:
        repa_encoder, repa_projector, token_grid = build_repa(args, data, pipeline.transformer)
    channels = models[0].config.in_channels if vae is None else 3

    # 3. What to go on from; nothing was written until here
    config = {**vars(args), "num_images": data.size, "images_a_step": images_a_step}
    # A stream's order and shards of weights belong to their number of processes.
    config["stream"] = [accelerator.num_processes, args.train_batch_size] if args.streaming else None
    config["sharding"] = (
        accelerator.distributed_type if accelerator.distributed_type in ("FSDP", "DEEPSPEED") else None
    )
    for name, model in zip(("transformer_config", "embedder_config"), models):
        config[name] = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config = json.loads(json.dumps({**config, "id2label": pipeline.config.id2label}))
    try:
        checkpoint, step = find_checkpoint(args.resume_from_checkpoint, args.output_dir, config, FREE_KEYS)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if finished_steps(args.output_dir) == args.max_train_steps and (
        checkpoint is None or step == args.max_train_steps
    ):
        accelerator.print(f"{args.output_dir} is finished: it holds the pipeline of step {step}.")
        return 0
    accelerator.wait_for_everyone()  # before the main process changes what the others read above
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        write_config(args.output_dir, config)
        Path(args.output_dir, "environment.json").write_text(json.dumps(describe_environment(), indent=2))

    # 4. Preparation
    freeze(args, pipeline)
    for model in models:
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            model.compile_repeated_blocks()
    if vae is not None:
        vae.requires_grad_(False).eval().to(accelerator.device)
    if repa_encoder is not None:
        repa_encoder.to(accelerator.device)
    module = TrainingModule(*models, repa_projector, args.repa_layer, args.repa_weight)
    optimizer = build_optimizer(args, [p for p in module.parameters() if p.requires_grad])
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps)
    module, optimizer, lr_scheduler = accelerator.prepare(module, optimizer, lr_scheduler)
    noise_scheduler, averages, guard = None, None, StepGuard(args.spike_factor, args.max_skipped_steps)
    if args.prediction_type != "flow":
        noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if args.use_ema:
        trained = {f"{name}.{key}": p for name, m in zip(NAMES, models) for key, p in trained_parameters(m).items()}
        averages = WeightAverages(trained, args.ema_decay)
    saved_models = dict(zip(NAMES, models)) | ({"repa_projector": repa_projector} if repa_projector else {})
    register_model_hooks(accelerator, saved_models, averages)
    accelerator.register_for_checkpointing(guard)
    stream_state = None
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        if args.streaming:
            stream_state = load_process_state(accelerator, checkpoint)["stream"]
        accelerator.print(f"Going on from {checkpoint}.")
    if args.report_to != "none":
        plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in config.items()}
        accelerator.init_trackers("train_dod", plain)
    flops_a_step = images_a_step * training_flops(*models, prior_share=1 - args.prior_drop)
    peak = peak_flops(args, accelerator)

    def save(step: int) -> None:
        nonlocal saved
        save_checkpoint(
            *(accelerator, args.output_dir, step, config, args.checkpoints_total_limit),
            process_state={"stream": stream_state} if args.streaming else None,
        )
        saved = step

    evaluation, push = None, None
    if args.evaluation_samples and accelerator.is_main_process:
        try:
            from train_evaluation import TrainingEvaluation  # needs torchmetrics, which training does not

            evaluation = TrainingEvaluation(args, accelerator.device)
        except (ValueError, OSError, ImportError) as error:
            raise BadData(f"--evaluation_reference, --evaluation_extractor: {error}") from error
    if args.push_to_hub and accelerator.is_main_process:
        repository = args.hub_model_id or Path(args.output_dir).resolve().name
        push = BackgroundPush(repository, license=args.hub_license, private=args.hub_private_repo)

    # 5. Training
    batches = make_batches(args, data, channels, accelerator, step, stream_state)
    # With a prior and without: losses and rows; REPA's loss; who shall stop
    totals = torch.zeros(6, device=accelerator.device)
    saved, stopped = step, None
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    with StopRequest() as stop:
        while step < args.max_train_steps and stopped is None:
            started, loading, names = time.perf_counter(), 0.0, []
            draws = draw_step(args, step, images_a_step, noise_scheduler)
            for micro_step in range(args.gradient_accumulation_steps):
                # This process's rows, and what chance decides about them
                wait = time.perf_counter()
                batch = next(batches)
                loading += time.perf_counter() - wait
                stream_state = batch.get("state")
                names += batch.get("name", [])
                rows = torch.arange(
                    micro_step * accelerator.num_processes + accelerator.process_index, images_a_step, shares
                )
                generators = row_generators(args.seed, step, rows, accelerator.device)
                batch = {
                    k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)
                }
                mirrored, without_class, times = (
                    draw[rows].to(accelerator.device, non_blocking=True) for draw in draws[:3]
                )
                prior_rows = int((rows < draws.num_prior_rows).sum())

                # Latents, features, noise and class drop
                latents = to_latents(batch, vae, mirrored, generators)
                features = None if token_grid is None else to_features(batch, repa_encoder, token_grid, mirrored)
                example, weighting = make_example(args, latents, times, generators, noise_scheduler)
                latents, code_noise = embedder_inputs(args, latents, generators, models[1])
                labels = torch.where(without_class, models[0].config.num_classes, batch["label"])

                # Loss and gradients
                with accelerator.accumulate(module):
                    with accelerator.autocast():  # accelerate's own is not around modules of FSDP2
                        loss, per_sample, alignment = module(
                            latents, labels, example, prior_rows, weighting, code_noise, features
                        )
                    accelerator.backward(loss)
                if alignment is not None:
                    totals[4] += alignment / shares
                for total, part in zip(totals[:4].view(2, 2), per_sample.split([prior_rows, len(rows) - prior_rows])):
                    total += torch.stack(
                        [part.sum(), part.new_full((), len(part))]
                    )  # filled there: no wait for a copy

            # The step, unless it would do harm
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm or float("inf"))
            grad_norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
            totals[5] = stop.signal is not None
            with_prior, with_rows, without_prior, without_rows, alignment, stops = accelerator.reduce(totals).tolist()
            totals.zero_()
            logs = {"loss": (with_prior + without_prior) / images_a_step}
            problem = guard.reason_to_skip(logs["loss"], grad_norm)
            if problem is None or accelerator.scaler is not None:  # a scaler skips by itself, to adapt
                optimizer.step()
            if problem is None and averages is not None:
                averages.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            step += 1
            if problem is not None:
                logger.warning(
                    f"Step {step} is skipped: {problem}. Its images: {', '.join(names)}", main_process_only=False
                )

            # Logs
            seconds = time.perf_counter() - started
            if with_rows:
                logs["loss_with_prior"] = with_prior / with_rows
            if without_rows:
                logs["loss_without_prior"] = without_prior / without_rows
            if token_grid is not None:
                logs["loss_repa"] = alignment
            logs.update(lr=lr_scheduler.get_last_lr()[0], grad_norm=grad_norm, skipped=guard.skipped)
            logs.update(images_per_second=images_a_step / seconds, loading_share=loading / seconds)
            if peak is not None:
                logs["mfu"] = flops_a_step / seconds / (peak * accelerator.num_processes)
            progress.update()
            progress.set_postfix(logs, refresh=False)
            accelerator.log(logs, step=step)

            # Checkpoint and samples
            if guard.exhausted:
                raise TooManyBadSteps(f"{guard.in_a_row} steps in a row were skipped, the last one for {problem}")
            if stops:
                stopped = stop.signal or signal.SIGTERM
            elif step % args.checkpointing_steps == 0:
                try:
                    save(step)
                except CheckpointNotWritten as error:
                    logger.warning(f"{error}. Training goes on.")
            validates = args.validation_steps and step % args.validation_steps == 0
            pushes = args.hub_push_checkpoints and step % args.checkpointing_steps == 0
            if (validates or pushes) and not stops:
                sampler = averaged_pipeline(accelerator, pipeline, averages)
                if validates and sampler is not None:
                    validate(sampler, accelerator, args, step)
                    if evaluation is not None:
                        accelerator.log(evaluation(sampler), step=step)
                if pushes and sampler is not None:
                    push.submit(partial(save_for_push, sampler, {**config, "step": step}, args.output_dir))

        # 6. The last checkpoint, and the pipeline in the folder itself
        progress.close()
        batches.close()
        if saved != step:
            save(step)
        if stopped is not None:
            accelerator.print(f"Stopped by {stopped.name} after step {step}; the same command goes on from there.")
            drain_process_group()
            accelerator.end_training()
            return 128 + stopped
    lora_dir = Path(args.output_dir, "lora")
    result = averaged_pipeline(accelerator, pipeline, averages, lora_dir)
    if result is not None:
        save_result(result, args.output_dir, config)
    drain_process_group()
    accelerator.end_training()
    if push is not None:  # the other processes need not wait for it
        address = push.finish(args.output_dir)
        if address is not None:
            print(f"Pushed: {address}")
    return 0


def run(argv: list[str] | None = None) -> int:
    """`main`, with what the user must know in one line; returns the exit status."""
    try:
        return main(argv)
    except (BadInput, CheckpointNotWritten, TooManyBadSteps) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, BadData):
            print(f"train_dod.py: error: {error}", file=sys.stderr)
        return STATUS[type(error)]


if __name__ == "__main__":
    sys.exit(run())

"""The training loop of `train` and `train-codes`: one function, from the options to the pipeline in the run's folder."""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..cli import bad_input
from ..data.batches import make_batches
from ..hub.background import BackgroundPush
from ..processes import end_together
from ..randomness import row_generators
from .averaging import WeightAverages
from .build import (
    Subject,
    averaged_pipeline,
    build_accelerator,
    build_optimizer,
    build_repa,
    build_subject,
    freeze,
)
from .checkpoints import (
    CheckpointNotWritten,
    find_checkpoint,
    load_guard,
    load_process_state,
    register_model_hooks,
    save_checkpoint,
    trained_parameters,
)
from .estimate import announce, make_plan
from .guard import StepGuard, TooManyBadSteps
from .options import FREE_KEYS
from .results import begin_run, describe_result, finished_steps, lock_folder, run_config, save_for_push, save_result
from .step import GradientStep, StepSums, TrainingModule, draw_step, losses
from .stopping import StopRequest
from .tracking import log_values
from .validation import build_evaluation, validate


logger = get_logger(__name__, log_level="INFO")


def train(
    args: argparse.Namespace, build: Callable[[argparse.Namespace, Accelerator], Subject] = build_subject
) -> int:
    """Trains what `build` makes of the options; returns 0, or 128 plus the number of the signal that stopped it."""
    # 1. Processes, data and models
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    device = accelerator.device
    subject = build(args, accelerator)
    pipeline, data, models = subject.pipeline, subject.data, subject.models
    transformer, embedder = models[subject.denoiser], models.get("latent_embedder")
    vae = None if data.are_latents else pipeline.vae
    repa = build_repa(args, data, transformer)
    freeze(args, subject)
    config = run_config(args, subject, accelerator)
    images_per_step = config["images_per_step"]
    shares = accelerator.num_processes * args.gradient_accumulation_steps  # dealt like cards: see `BatchSampler`
    plan = make_plan(args, accelerator, subject, images_per_step)

    # 2. The run's folder, for this run alone, and the checkpoint to resume from; nothing was written until here
    lock = None
    if accelerator.is_main_process and os.path.isdir(args.output_dir):
        lock = lock_folder(args.output_dir)
    with bad_input():
        checkpoint, step = find_checkpoint(args.resume_from_checkpoint, args.output_dir, config, FREE_KEYS)
    is_last = checkpoint is None or step == args.max_train_steps
    if finished_steps(args.output_dir) == args.max_train_steps and is_last:
        accelerator.print(f"{args.output_dir} is finished: it holds the pipeline of step {args.max_train_steps}.")
        return 0
    announce(accelerator, plan, args.max_train_steps - step)
    accelerator.wait_for_everyone()  # before the main process changes what the others read above
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        lock = lock or lock_folder(args.output_dir)
        begin_run(args.output_dir, config)

    # 3. What is trained, and how
    for model in models.values():
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            model.compile_repeated_blocks()
    if vae is not None:
        vae.requires_grad_(False).eval().to(device)
    if repa is not None and repa.encoder is not None:
        repa.encoder.to(device)
    projector = None if repa is None else repa.projector
    module = TrainingModule(transformer, embedder, projector, args.repa_layer, args.repa_weight)
    optimizer = build_optimizer(args, [p for p in module.parameters() if p.requires_grad])
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps)
    module, optimizer, lr_scheduler = accelerator.prepare(module, optimizer, lr_scheduler)
    noise_scheduler = None
    if args.prediction_type != "flow":
        noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    averages = None
    if args.ema:
        trained = {f"{name}.{key}": p for name, m in models.items() for key, p in trained_parameters(m).items()}
        averages = WeightAverages(trained, args.ema_decay)
    register_model_hooks(accelerator, models | ({} if repa is None else {"repa_projector": projector}), averages)
    guard = StepGuard(args.spike_factor, args.max_skipped_steps)

    # 4. From where, and what watches it
    stream_state = None
    if checkpoint is not None:
        # Checksums find damage, not contents that were changed along with them; torch and accelerate raise many kinds.
        with bad_input(
            Exception, what=f"{checkpoint} cannot be loaded (if it was changed, remove it to use an older one)"
        ):
            accelerator.load_state(str(checkpoint))
            accelerator.step = 0  # its count of micro steps, of a run that may have divided its steps otherwise
            load_guard(guard, checkpoint)
            if args.streaming:
                stream_state = load_process_state(accelerator, checkpoint)["stream"]
        accelerator.print(f"Resuming from {checkpoint}.")
    if args.report_to != "none":
        plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in config.items()}
        accelerator.init_trackers("train_dod", plain)
    evaluation, push = build_evaluation(args, accelerator), None
    if args.push_to_hub and accelerator.is_main_process:
        repository = args.hub_model_id or Path(args.output_dir).resolve().name
        push = BackgroundPush(repository, license=args.hub_license, private=args.hub_private_repo)
    channels = transformer.config.in_channels if vae is None else 3
    batches = make_batches(args, data, channels, accelerator, step, stream_state)
    sums, saved, stopped = StepSums(device), step, None
    add_gradients = GradientStep(
        args, accelerator, module, transformer, embedder, vae, repa, noise_scheduler, sums, shares
    )
    # With one number beside it, the bar fits 80 columns.
    options = {"desc": "Training", "dynamic_ncols": True, "disable": not accelerator.is_local_main_process}
    progress = tqdm(total=args.max_train_steps, initial=step, **options)

    def save() -> None:
        nonlocal saved
        state = {"stream": stream_state} if args.streaming else None
        limit, kept = args.checkpoints_total_limit, args.keep_checkpoint_at
        save_checkpoint(accelerator, args.output_dir, step, config, guard, limit, state, kept)
        saved = step

    with StopRequest() as stop:
        while step < args.max_train_steps and stopped is None:
            started, loading, names = time.perf_counter(), 0.0, []
            draws = draw_step(args, step, images_per_step, noise_scheduler)
            for micro_step in range(args.gradient_accumulation_steps):
                # 5. This process's rows, and their gradients
                waiting = time.perf_counter()
                batch = next(batches)
                loading += time.perf_counter() - waiting
                stream_state = batch.get("state")
                names += batch.get("name", [])
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
                share = micro_step * accelerator.num_processes + accelerator.process_index
                rows = torch.arange(share, images_per_step, shares)
                add_gradients(batch, draws.of_rows(rows, device), row_generators(args.seed, step, rows, device))

            # 6. The update, unless it would do harm
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm or float("inf"))
            grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
            sums.add(stops=float(stop.signal is not None))
            read = sums.read(accelerator, grad_norm)
            logs = losses(read)
            problem = guard.reason_to_skip(logs["loss"], read["grad_norm"])
            if problem is None or accelerator.scaler is not None:  # a scaler skips by itself, to adapt
                optimizer.step()
            if problem is None and averages is not None:
                averages.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            step += 1
            if problem is not None:
                skipped = f"Step {step} is skipped: {problem}. Its images: {', '.join(names)}"
                logger.warning(skipped, main_process_only=False)

            # 7. Logs
            seconds = time.perf_counter() - started
            if repa is not None:
                logs["loss_repa"] = read["loss_repa"]
            logs.update(lr=lr_scheduler.get_last_lr()[0], grad_norm=read["grad_norm"], skipped=guard.skipped)
            logs.update(images_per_second=images_per_step / seconds, loading_share=loading / seconds)
            if plan.peak is not None:
                logs["mfu"] = plan.flops_per_step / seconds / (plan.peak * accelerator.num_processes)
            progress.update()
            progress.set_postfix({"loss": f"{logs['loss']:.3g}"}, refresh=False)
            log_values(accelerator, logs, step)

            # 8. Checkpoint, samples and metrics
            if guard.exhausted:
                raise TooManyBadSteps(f"{guard.in_a_row} updates in a row were skipped, the last because {problem}")
            checkpoints = step % args.checkpointing_steps == 0 or step in args.keep_checkpoint_at
            if read["stops"]:
                stopped = stop.signal or signal.SIGTERM
                continue
            if checkpoints:
                try:
                    save()
                except CheckpointNotWritten as error:
                    logger.warning(f"{error}. Training continues.")
            validates = args.validation_steps and step % args.validation_steps == 0
            pushes = args.hub_push_checkpoints and checkpoints
            sampler = averaged_pipeline(accelerator, subject, averages) if validates or pushes else None
            if sampler is not None and validates:
                validate(sampler, evaluation, accelerator, args, step)
            if sampler is not None and push is not None and pushes:
                push.submit(partial(save_for_push, sampler, {**config, "step": step}, args.output_dir))

        # 9. The last checkpoint
        progress.close()
        batches.close()
        if saved != step:
            save()
        if stopped is not None:
            accelerator.print(f"Stopped by {stopped.name} after step {step}. To resume, repeat the command.")
            end_together(accelerator)
            return 128 + stopped

    # 10. The pipeline in the folder itself, and on the Hub
    result = averaged_pipeline(accelerator, subject, averages, Path(args.output_dir, "lora"))
    if result is not None:
        save_result(result, args.output_dir, config)
        accelerator.print(describe_result(args.output_dir))
    end_together(accelerator)
    if push is not None:  # the other processes need not wait for it
        push.finish(args.output_dir)
    return 0

"""Sampling written out plainly, as the reference of the pipeline's: no batched guidance, a new scheduler each stage."""

import inspect

import torch


def per_stage(value, stage):
    return value[stage] if isinstance(value, list) else value


@torch.no_grad()
def plain_sample(
    pipe,
    make_scheduler,
    class_ids,
    generator,
    num_stages=2,
    steps=3,
    scale=1.5,
    interval=(0.0, 1.0),
    drop="class",
    prior_scale=None,
):
    """Latents of every stage, `num_stages` times `(images, channels, height, width)`."""
    transformer, embedder = pipe.transformer, pipe.latent_embedder
    config = transformer.config
    labels = torch.tensor(class_ids)
    null = torch.full_like(labels, config.num_classes)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    stages = []
    for stage in range(num_stages):
        prior = embedder(stages[-1]).prior_tokens if stages else None
        scheduler = make_scheduler()
        scheduler.set_timesteps(per_stage(steps, stage))
        latents = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        start, stop = per_stage(interval, stage)
        class_scale, own_prior_scale = per_stage(scale, stage), per_stage(prior_scale, stage)
        number = len(scheduler.timesteps)

        for i, timestep in enumerate(scheduler.timesteps):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)

            def predict(ids, tokens, scaled=scaled, timestep=timestep):
                output = transformer(scaled, timestep.expand(len(ids)), ids, encoder_hidden_states=tokens).sample
                return output[:, : config.in_channels]

            prediction = predict(labels, prior)
            if start * number <= i < stop * number:
                if own_prior_scale is not None and prior is not None:
                    neither, prior_only = predict(null, None), predict(null, prior)
                    class_part = class_scale * (prediction - prior_only)
                    prediction = neither + own_prior_scale * (prior_only - neither) + class_part
                elif prior is not None or drop != "prior":
                    weak = {"class": (null, prior), "prior": (labels, None), "both": (null, None)}[drop]
                    weak = predict(*weak)
                    prediction = weak + class_scale * (prediction - weak)
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        stages.append(latents)
    return stages

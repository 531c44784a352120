"""DoD as blocks of Modular Diffusers; every repository carries them in one file, `block.py`.

DoDStages
    inputs      class labels and sizes -> class ids, checked
    prior       codes of the user's own or of the code model, or a picture of the user's own
    stages      for each stage
        embed       the sample of the stage before, or codes -> prior tokens
        denoise     noise -> sample, guided by the `guider`
    decode      the last sample -> images
"""

import json
import math
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ClassifierFreeGuidance,
    ComponentSpec,
    ConfigSpec,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor

from .arguments import (
    check_count,
    check_generator,
    check_per_stage,
    check_sample,
    check_size,
    check_steps,
    check_tensor,
    per_stage,
)
from .autoencoding import decode_latents, make_image_processor, vae_spatial_factor
from .compatibility import check_code_model, check_components, check_loaded, check_scheduler, check_weak_model
from .denoising import Denoising
from .guidance import GuiderGuidance, ScaleGuidance, check_guidance
from .labels import ClassLabelsMixin, synonyms
from .latent_embedder_dod import DoDLatentEmbedder
from .priors import PriorImage, PriorInputsMixin
from .repository import (
    BLOCK_CONFIG_NAME,
    BLOCK_MODULE,
    BLOCK_NAME,
    MODEL_CLASSES,
    MODULAR_INDEX_NAME,
    json_text,
    modular_class,
    modular_files,
    resolve_index,
    standalone_source,
)
from .transformer_dod import DoDTransformer2DModel


# `modular_model_index.json` names classes by a module that is loaded already: this one, of the package or of a repository.
sys.modules[BLOCK_MODULE] = sys.modules[__name__]

GENERATOR = InputParam(
    "generator", torch.Generator | list[torch.Generator], description="Source of all noise, one or one for each image."
)
CODES = InputParam(
    "codes", torch.Tensor, description="Codes that the first stage sees, `(images, rows * columns, bottleneck_dim)`."
)
CODE_NOISE_LEVEL = InputParam(
    "code_noise_level", float, description="Noise on the codes, for an embedder that reads its level; 0.3 by default."
)
MODELS = [
    ComponentSpec("transformer", DoDTransformer2DModel, "Denoiser of all stages."),
    ComponentSpec("latent_embedder", DoDLatentEmbedder, "Makes prior tokens of latents."),
]
VAE = ComponentSpec("vae", AutoencoderKL, "Image autoencoder; none is pixel space.")
SCHEDULER = ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)
CODE_MODEL = [
    ComponentSpec("code_transformer", DoDTransformer2DModel, "Model of the codes."),
    ComponentSpec("code_scheduler", FlowMatchEulerDiscreteScheduler, "Scheduler of the codes."),
]
GUIDANCE = [
    ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        "Any of diffusers' guiders that `DoDPipeline` takes.",
        config=FrozenDict({"guidance_scale": 1.25, "start": 0.25, "stop": 0.75}),
        default_creation_method="from_config",
    ),
    ComponentSpec("weak_transformer", DoDTransformer2DModel, "A weaker model, which makes the second branch."),
]


class Preparation(ClassLabelsMixin, PriorInputsMixin):
    """What [`DoDPipeline`] makes of its arguments, for the components of a modular pipeline.

    Raises:
        ValueError: for components that are missing or do not fit each other.
    """

    def __init__(self, components: ModularPipeline):
        self.transformer, self.latent_embedder = components.transformer, components.latent_embedder
        self.vae, self.code_transformer = components.vae, components.code_transformer
        self.code_scheduler = components.code_scheduler
        if self.transformer is None or self.latent_embedder is None:
            raise ValueError("The models are not loaded: call `load_components()` first.")
        check_components(self.transformer.config, self.latent_embedder.config, self.vae)
        if self.code_transformer is not None:
            check_code_model(self.code_transformer.config, self.transformer.config, self.latent_embedder.config)
        if components.weak_transformer is not None:
            check_weak_model(components.weak_transformer.config, self.transformer.config)
        self.labels = synonyms(components.config.id2label or {})
        self.spatial_factor = vae_spatial_factor(self.vae)
        self.image_processor = make_image_processor(self.vae, self.transformer.config)


class DoDInputStep(ModularPipelineBlocks):
    """Class labels and sizes to class ids; every argument is checked here."""

    @property
    def description(self) -> str:
        return "Step that turns class labels into class ids and checks all arguments against the models."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*MODELS, VAE, SCHEDULER, *CODE_MODEL, *GUIDANCE]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("id2label", None, "Class id to name.")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "class_labels", Any, description="Ids or names, one or a list; None is an unconditional sample."
            ),
            InputParam("num_images_per_prompt", int, 1, description="Images per label."),
            InputParam("num_stages", int, description="2 by default; from codes 1, the stages after the codes."),
            InputParam(
                "num_inference_steps", int | list[int], 30, description="Steps, one entry per stage or one for all."
            ),
            InputParam("height", int, description="Height in pixels, by default the model's."),
            InputParam("width", int, description="Width in pixels, by default the model's."),
            InputParam("latents", torch.Tensor, description="Standard normal noise for the first stage that runs."),
            InputParam(
                "prior_source",
                str,
                description="`codes` (default with a code model or `codes`) or `stage` (otherwise and with `image`).",
            ),
            InputParam("image", PriorImage, description="Your own picture in the place of stage 1's sample."),
            InputParam(
                "guidance_drop", str, description="What guidance's second branch goes without, as in `DoDPipeline`."
            ),
            InputParam("output_type", str, "pil", description="`pil`, `np`, `pt` or `latent`."),
            GENERATOR,
            CODES,
            CODE_NOISE_LEVEL,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("class_ids", torch.Tensor, "Class of each image.")]

    def __call__(self, components: ModularPipeline, state: Any) -> tuple[ModularPipeline, Any]:
        block = self.get_block_state(state)
        prepared = Preparation(components)
        check_loaded(components.components)
        config, embedder = prepared.transformer.config, prepared.latent_embedder.config
        label_ids = prepared.prepare_class_labels(block.class_labels)
        check_count("num_images_per_prompt", block.num_images_per_prompt)
        batch_size = len(label_ids) * block.num_images_per_prompt
        block.prior_source = prepared.choose_prior_source(block.prior_source, block.codes, block.image)
        if block.num_stages is None:
            block.num_stages = 1 if block.prior_source == "codes" else 2
        check_count("num_stages", block.num_stages)
        if block.image is not None and block.num_stages < 2:
            raise ValueError("`image` replaces stage 1, so `num_stages` must be at least 2.")
        check_per_stage(block.num_stages, num_inference_steps=block.num_inference_steps)
        check_steps(block.num_inference_steps, block.num_stages)
        check_generator(block.generator, batch_size)
        prepared.check_code_noise_level(block.code_noise_level)

        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if torch.is_tensor(block.latents) and block.latents.ndim == 4:
            height, width = block.latents.shape[-2:]
        block.height = height * prepared.spatial_factor if block.height is None else block.height
        block.width = width * prepared.spatial_factor if block.width is None else block.width
        patch_size = config.patch_size
        if block.num_stages > 1 or block.prior_source == "codes":
            patch_size = math.lcm(patch_size, embedder.patch_size)
        check_size(block.height, block.width, prepared.spatial_factor * patch_size)
        if block.latents is not None:
            shape = (batch_size, *prepared._latent_shape(block.height, block.width))
            check_tensor("latents", block.latents, shape)
        check_scheduler(type(components.scheduler), components.scheduler.config, config)
        check_guidance(
            components.guider, prepared.transformer, components.weak_transformer, None, None, block.guidance_drop, None
        )
        prepared.check_output_type(block.output_type)

        block.class_ids = torch.tensor(label_ids, device=components._execution_device)
        block.class_ids = block.class_ids.repeat_interleave(block.num_images_per_prompt)
        self.set_block_state(state, block)
        return components, state


class DoDPriorStep(ModularPipelineBlocks):
    """What stands for the first stage's sample: codes, or a user's picture."""

    @property
    def description(self) -> str:
        return "Step that takes the first prior from the code model, from given codes, or from a picture."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*MODELS, VAE, *CODE_MODEL, *GUIDANCE]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("code_guidance_scale", 1.0, "Class guidance of the code model by default.")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("class_ids", torch.Tensor, required=True),
            InputParam("height", int, required=True),
            InputParam("width", int, required=True),
            InputParam("num_images_per_prompt", int, 1),
            InputParam("prior_source", str, required=True),
            InputParam("image", PriorImage),
            InputParam("code_num_inference_steps", int, 30, description="Steps of the code model."),
            InputParam("code_guidance_scale", float, description="Class guidance of the code model."),
            GENERATOR,
            CODES,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("sample", torch.Tensor, "The picture's latents, if there is one.")]

    def __call__(self, components: ModularPipeline, state: Any) -> tuple[ModularPipeline, Any]:
        block = self.get_block_state(state)
        prepared = Preparation(components)
        transformer, device, batch_size = components.transformer, block.class_ids.device, len(block.class_ids)
        where = (block.height, block.width, transformer.dtype, device)
        block.sample = None
        if block.codes is not None:
            block.codes = prepared.prepare_codes(block.codes, batch_size, *where)
        elif block.prior_source == "codes":
            block.codes = self.generate_codes(components, prepared, block)
        if block.image is not None:
            block.sample = prepared.prepare_image_latents(block.image, batch_size, block.num_images_per_prompt, *where)
        self.set_block_state(state, block)
        return components, state

    def generate_codes(self, components: ModularPipeline, prepared: Preparation, block: Any) -> torch.Tensor:
        """Codes of the code model, guided by the class in every step."""
        model, scheduler = components.code_transformer, components.code_scheduler
        scale = block.code_guidance_scale
        if scale is None:
            scale = components.config.code_guidance_scale
        prepared.check_code_generation(block.height, block.width, block.code_num_inference_steps, scale)
        grid = components.latent_embedder.code_grid(*prepared._latent_shape(block.height, block.width)[1:])
        shape = (len(block.class_ids), model.config.in_channels, *grid)
        noise = randn_tensor(shape, generator=block.generator, device=block.class_ids.device, dtype=model.dtype)
        guidance = ScaleGuidance(model, "class", lambda: (scale, None), (0.0, 1.0))
        run = Denoising(scheduler, noise, block.code_num_inference_steps, block.generator)
        codes = run.latents
        for index in range(len(run.timesteps)):
            codes = run.step(index, codes, guidance, block.class_ids, None)
        return components.latent_embedder.denormalize_codes(codes)


class DoDEmbedStep(ModularPipelineBlocks):
    """Within the loop over stages: the sample of the stage before, or codes, to prior tokens."""

    @property
    def description(self) -> str:
        return "Step within the loop over stages that makes prior tokens of the stage before, or of codes."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*MODELS, VAE]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("class_ids", torch.Tensor, required=True),
            InputParam("height", int, required=True),
            InputParam("width", int, required=True),
            InputParam("sample", torch.Tensor),
            GENERATOR,
            CODES,
            CODE_NOISE_LEVEL,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("prior_tokens", torch.Tensor, "What the transformer sees of the prior.")]

    def __call__(self, components: ModularPipeline, block: Any, stage: int) -> tuple[ModularPipeline, Any]:
        block.prior_tokens = None
        if block.sample is None and block.codes is None:
            return components, block
        where = (len(block.class_ids), block.height, block.width, components.transformer.dtype, block.class_ids.device)
        code_noise = Preparation(components).prepare_code_noise(block.code_noise_level, *where, block.generator)
        if block.sample is not None:
            block.prior_tokens, codes = components.latent_embedder(block.sample, return_dict=False, **code_noise)
            block.codes = codes if block.codes is None else block.codes
        else:
            factor = vae_spatial_factor(components.vae)
            size = (block.height // factor, block.width // factor)
            block.prior_tokens = components.latent_embedder.decode(block.codes, *size, **code_noise)
        return components, block


class DoDDenoiseStep(ModularPipelineBlocks):
    """Within the loop over stages: fresh noise to the stage's sample."""

    @property
    def description(self) -> str:
        return "Step within the loop over stages that denoises one stage, guided by the `guider`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*MODELS, VAE, SCHEDULER, *GUIDANCE]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("class_ids", torch.Tensor, required=True),
            InputParam("height", int, required=True),
            InputParam("width", int, required=True),
            InputParam("num_stages", int, required=True),
            InputParam("num_inference_steps", int | list[int], 30),
            InputParam("latents", torch.Tensor),
            InputParam("prior_tokens", torch.Tensor),
            InputParam("guidance_drop", str),
            GENERATOR,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("sample", torch.Tensor, "Latents of the last stage.")]

    def __call__(self, components: ModularPipeline, block: Any, stage: int) -> tuple[ModularPipeline, Any]:
        model, weak = components.transformer, components.weak_transformer
        device, factor = block.class_ids.device, vae_spatial_factor(components.vae)
        shape = (len(block.class_ids), model.config.in_channels, block.height // factor, block.width // factor)
        if block.latents is None:
            noise = randn_tensor(shape, generator=block.generator, device=device, dtype=model.dtype)
        else:
            noise = block.latents.to(device=device, dtype=model.dtype)
        block.latents = None  # later stages draw theirs
        steps = per_stage(block.num_inference_steps, block.num_stages)[stage - 1]
        drop = block.guidance_drop or ("class" if weak is None else "nothing")
        guidance: GuiderGuidance | ScaleGuidance
        if components.guider is None:
            guidance = ScaleGuidance(model, drop, lambda: (1.0, None), (0.0, 1.0))
        else:
            guidance = GuiderGuidance(model, drop, components.guider, weak)
        run = Denoising(components.scheduler, noise, steps, block.generator)
        block.sample = run.latents
        for index in range(len(run.timesteps)):
            block.sample = run.step(index, block.sample, guidance, block.class_ids, block.prior_tokens)
        return components, block


class DoDStageLoop(LoopSequentialPipelineBlocks):
    """All stages, each from fresh noise."""

    block_classes = [DoDEmbedStep, DoDDenoiseStep]
    block_names = ["embed", "denoise"]

    @property
    def description(self) -> str:
        return "Loop over the stages: each restarts from noise and sees the prior tokens of the one before."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("num_stages", int, required=True), InputParam("image", PriorImage)]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("stage_samples", list[torch.Tensor], "Latents of every stage, the first that ran first.")]

    def __call__(self, components: ModularPipeline, state: Any) -> tuple[ModularPipeline, Any]:
        block = self.get_block_state(state)
        block.stage_samples = []
        first_stage = 1 if block.image is None else 2
        for stage in self.progress_bar(range(first_stage, block.num_stages + 1)):
            components, block = self.loop_step(components, block, stage=stage)
            block.stage_samples.append(block.sample)
        self.set_block_state(state, block)
        return components, state


class DoDDecodeStep(ModularPipelineBlocks):
    """The last stage's sample to images."""

    @property
    def description(self) -> str:
        return "Step that decodes the last stage's sample to images."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*MODELS, VAE, SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("sample", torch.Tensor, required=True), InputParam("output_type", str, "pil")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", Any, "Images in the form that `output_type` names.")]

    def __call__(self, components: ModularPipeline, state: Any) -> tuple[ModularPipeline, Any]:
        block = self.get_block_state(state)
        block.images = block.sample
        check_sample(block.sample, components.scheduler)
        if block.output_type != "latent":
            processor = make_image_processor(components.vae, components.transformer.config)
            images = decode_latents(components.vae, block.sample)
            block.images = processor.postprocess(images, output_type=block.output_type)
        self.set_block_state(state, block)
        return components, state


class DoDStages(SequentialPipelineBlocks):
    """Class-conditional generation in stages (Yue et al. 2024, arXiv 2410.08531) as Modular Diffusers blocks.

    With the same `guider`, the images are bit-identical to those of [`DoDPipeline`]. The defaults differ: where a saved
    pipeline has no guider, the stages are guided by `ClassifierFreeGuidance(guidance_scale=1.25, start=0.25, stop=0.75)`.

    Examples:
        ```py
        >>> from diffusers_dod import DoDStages

        >>> pipe = DoDStages().init_pipeline("examples/pretrained/digits")
        >>> pipe.load_components()
        >>> images = pipe(class_labels=[3, 7]).images
        ```
    """

    block_classes = [DoDInputStep, DoDPriorStep, DoDStageLoop, DoDDecodeStep]
    block_names = ["inputs", "prior", "stages", "decode"]

    @property
    def description(self) -> str:
        return "Class-conditional images in stages by Diffusion on Diffusion (arXiv 2410.08531)."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("images", Any, "Images in the form that `output_type` names.")]

    def init_pipeline(self, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> ModularPipeline:
        """Makes a pipeline of these blocks without weights; its `load_components()` loads them.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                what [`DoDPipeline`] saved or pushed. Only its `model_index.json` is read; no code there is run. Without
                it, add the components with `update_components`.
            kwargs: `components_manager` and `collection`, as in diffusers.

        Raises:
            ValueError: if it is another pipeline's, or a component's class is of a module that was not imported before.
        """
        if pretrained_model_name_or_path is None:
            return super().init_pipeline(**kwargs)
        source = str(pretrained_model_name_or_path)
        index = DiffusionPipeline.load_config(source)
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and name[0] != "_"}
        own = {name: modular_class(*entry) for name, entry in entries.items() if entry[1] in MODEL_CLASSES}
        absent = {
            name for name, entry in entries.items() if entry[0] is None
        }  # diffusers would look for their folders
        others = {name: entry for name, entry in index.items() if name not in own and name not in absent}
        index = resolve_index(others, ["DoDPipeline"], "", source) | own
        return ModularPipeline(
            blocks=deepcopy(self), pretrained_model_name_or_path=source, config_dict=index, **kwargs
        )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the blocks' code, which `ModularPipeline.save_pretrained` leaves out: call this one after it.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if need be, with or without saved components.
            kwargs: not used.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        source = standalone_source(Path(str(sys.modules[type(self).__module__].__file__)))
        (folder / BLOCK_NAME).write_text(source, encoding="utf-8")
        (folder / BLOCK_CONFIG_NAME).write_text(
            json_text(modular_files({}, None)[BLOCK_CONFIG_NAME]), encoding="utf-8"
        )
        if (folder / MODULAR_INDEX_NAME).is_file():
            # diffusers names the models by the module that they were in, which is gone when the folder is loaded.
            index = json.loads((folder / MODULAR_INDEX_NAME).read_text(encoding="utf-8"))
            for name, entry in index.items():
                if isinstance(entry, list) and entry[2]["type_hint"][1] in MODEL_CLASSES:
                    hint = modular_class(*entry[2]["type_hint"])
                    own = hint if entry[0] is not None else [None, None]  # of a model that was not loaded
                    index[name] = [*own, {**entry[2], "type_hint": hint}]
            (folder / MODULAR_INDEX_NAME).write_text(json_text(index), encoding="utf-8")

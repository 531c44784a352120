"""diffusers' own common pipeline tests on DoDPipeline; needs DIFFUSERS_CHECKOUT."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_embedder, tiny_transformer, tiny_vae
from tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from tests.pipelines.testing_utils import (
    BasePipelineTesterConfig,
    FirstBlockCacheTesterMixin,
    GroupOffloadTesterMixin,
    LayerwiseCastingTesterMixin,
    MagCacheTesterMixin,
    PipelineOffloadTesterMixin,
    PipelineTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
)

from diffusers_dod import DoDPipeline


class DoDPipelineTesterConfig(BasePipelineTesterConfig):
    pipeline_class = DoDPipeline
    required_input_params_in_call_signature = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS | {
        "num_stages",
        "guidance_scale",
        "height",
        "width",
        "image",
    }
    batch_input_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    callback_cfg_params = frozenset()
    output_shape = (3, 16, 16)
    num_stages = 2

    def get_dummy_components(self, num_layers=2):
        return {
            "transformer": tiny_transformer(num_layers=num_layers),
            "latent_embedder": tiny_embedder(),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": tiny_vae("kl"),
            "code_transformer": None,
            "code_scheduler": None,
            "guider": None,
            "weak_transformer": None,
        }

    def get_dummy_inputs(self):
        return {
            "class_labels": 1,
            "num_stages": self.num_stages,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "guidance_interval": (0.0, 1.0),
            "generator": self.get_generator(),
            "output_type": "pt",
        }


class SafetensorsPipeline(DoDPipeline):
    """Saves safetensors also where pickled weights are asked for, which `DoDPipeline` saves and does not load."""

    def save_pretrained(self, save_directory, safe_serialization=True, **kwargs):
        super().save_pretrained(save_directory, **kwargs)


class TestDoDPipeline(DoDPipelineTesterConfig, PipelineTesterMixin):
    # These load what they saved with `safe_serialization=False`.
    pickling = {
        "test_save_load_local",
        "test_save_load_optional_components",
        "test_loading_with_variants",
        "test_loading_with_incorrect_variants_raises_error",
        "test_torch_dtype_dict",
    }

    @pytest.fixture(autouse=True)
    def save_safetensors(self, request):
        if request.node.name in self.pickling:
            self.pipeline_class = SafetensorsPipeline


# diffusers' MemoryTesterMixin, taken apart: two of its tests need no accelerator.
class TestDoDPipelineOffload(DoDPipelineTesterConfig, PipelineOffloadTesterMixin):
    pass


class TestDoDPipelineGroupOffload(DoDPipelineTesterConfig, GroupOffloadTesterMixin):
    pass


class TestDoDPipelineLayerwiseCasting(DoDPipelineTesterConfig, LayerwiseCastingTesterMixin):
    pass


class TestDoDPipelinePyramidAttentionBroadcast(DoDPipelineTesterConfig, PyramidAttentionBroadcastTesterMixin):
    # Each stage starts the cache anew, and one test compares the cache's count with the whole call's.
    num_stages = 1


class TestDoDPipelineFirstBlockCache(DoDPipelineTesterConfig, FirstBlockCacheTesterMixin):
    pass


class TestDoDPipelineTaylorSeerCache(DoDPipelineTesterConfig, TaylorSeerCacheTesterMixin):
    pass


class TestDoDPipelineMagCache(DoDPipelineTesterConfig, MagCacheTesterMixin):
    pass

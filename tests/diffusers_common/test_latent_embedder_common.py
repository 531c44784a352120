"""diffusers' common model tests on `DoDLatentEmbedder`. It runs once per stage, so it has no feature caches."""

import torch
from random_start import RandomStartEmbedder
from tests.models.testing_utils import (
    AttentionBackendTesterMixin,
    AttentionTesterMixin,
    BaseModelTesterConfig,
    LoraHotSwappingForModelTesterMixin,
    LoraTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import enable_full_determinism, torch_device


enable_full_determinism()


class EmbedderConfig(BaseModelTesterConfig):
    model_class = RandomStartEmbedder
    main_input_name = "latents"
    output_shape = (16, 32)

    def get_init_dict(self):
        return {
            "sample_size": 8,
            "patch_size": 4,
            "output_patch_size": 2,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "bottleneck_dim": 2,
            "output_dim": 32,
        }

    def get_dummy_inputs(self, height=8, width=8):
        generator = torch.Generator().manual_seed(0)
        return {"latents": torch.randn(2, 4, height, width, generator=generator).to(torch_device)}


class TestModel(EmbedderConfig, ModelTesterMixin):
    pass


class TestAttention(EmbedderConfig, AttentionTesterMixin):
    pass


class TestAttentionBackend(EmbedderConfig, AttentionBackendTesterMixin):
    pass


class TestTraining(EmbedderConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"RandomStartEmbedder"})


class TestMemory(EmbedderConfig, MemoryTesterMixin):
    pass


class TestCompile(EmbedderConfig, TorchCompileTesterMixin):
    different_shapes_for_compilation = [(8, 12), (16, 4), (12, 20)]


class TestLora(EmbedderConfig, LoraTesterMixin):
    pass


class TestLoraHotSwapping(EmbedderConfig, LoraHotSwappingForModelTesterMixin):
    different_shapes_for_compilation = [(8, 12), (16, 4), (12, 20)]

"""diffusers' common model tests on `DoDTransformer2DModel`."""

import torch
from random_start import RandomStartTransformer
from tests.models.testing_utils import (
    AttentionBackendTesterMixin,
    AttentionTesterMixin,
    BaseModelTesterConfig,
    ContextParallelAttentionBackendsTesterMixin,
    ContextParallelTesterMixin,
    FasterCacheTesterMixin,
    FirstBlockCacheTesterMixin,
    LoraHotSwappingForModelTesterMixin,
    LoraTesterMixin,
    MagCacheTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
    TensorParallelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import enable_full_determinism, torch_device


enable_full_determinism()


class TransformerConfig(BaseModelTesterConfig):
    model_class = RandomStartTransformer
    main_input_name = "hidden_states"
    output_shape = (4, 8, 8)

    def get_init_dict(self):
        return {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_classes": 10,
        }

    def get_dummy_inputs(self, height=8, width=8, batch_size=2):
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(batch_size, 4, height, width, generator=generator),
            "timestep": torch.tensor([100.0, 900.0])[:batch_size],
            "class_labels": torch.tensor([3, 10])[:batch_size],
            "encoder_hidden_states": torch.randn(batch_size, height * width // 4, 32, generator=generator),
        }
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class TestModel(TransformerConfig, ModelTesterMixin):
    pass


class TestAttention(TransformerConfig, AttentionTesterMixin):
    pass


class TestAttentionBackend(TransformerConfig, AttentionBackendTesterMixin):
    pass


class TestTraining(TransformerConfig, TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"RandomStartTransformer"})


class TestMemory(TransformerConfig, MemoryTesterMixin):
    pass


class TestCompile(TransformerConfig, TorchCompileTesterMixin):
    different_shapes_for_compilation = [(8, 12), (16, 4), (12, 20)]


class TestLora(TransformerConfig, LoraTesterMixin):
    pass


class TestLoraHotSwapping(TransformerConfig, LoraHotSwappingForModelTesterMixin):
    different_shapes_for_compilation = [(8, 12), (16, 4), (12, 20)]


# These three want two accelerators; `tests/test_parallel.py` has two processes on a CPU.
class TestContextParallel(TransformerConfig, ContextParallelTesterMixin):
    pass


class TestContextParallelAttentionBackends(TransformerConfig, ContextParallelAttentionBackendsTesterMixin):
    pass


class TestTensorParallel(TransformerConfig, TensorParallelTesterMixin):
    pass


class TestPyramidAttentionBroadcast(TransformerConfig, PyramidAttentionBroadcastTesterMixin):
    pass


class TestFirstBlockCache(TransformerConfig, FirstBlockCacheTesterMixin):
    pass


class TestMagCache(TransformerConfig, MagCacheTesterMixin):
    pass


class TestTaylorSeerCache(TransformerConfig, TaylorSeerCacheTesterMixin):
    pass


class TestFasterCache(TransformerConfig, FasterCacheTesterMixin):
    # Without it FasterCache halves the batch by itself, for which it must know the model's arguments.
    FASTER_CACHE_CONFIG = {**FasterCacheTesterMixin.FASTER_CACHE_CONFIG, "is_guidance_distilled": True}

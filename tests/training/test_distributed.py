"""The same global batch in one process, in accumulated parts, and in two processes with DDP and with FSDP2."""

import shutil

import pytest
import torch
from helpers import ON_CPU
from training_runs import NAMES, arguments, assert_equal_tensors, finish, start, start_together, weights, write_digits

from diffusers_dod import DoDPipeline


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
# A share of 0.3 makes the count of rows with a prior a matter of chance: 5 or 6 of 8.
OPTIONS = ("--resolution", 14, "--random_flip", "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--seed", 3)
OPTIONS += ("--lr_warmup_steps", 3, "--ema_decay", 0.9, "--class_drop", 0.5, "--prior_drop", 0.3)
OPTIONS += ("--checkpointing_steps", 10, "--max_train_steps", 20, "--embedder_noise", 0.1, "--bottleneck_noise", 0.1)
needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch's FSDP2 needs a GPU: 2.6 has none on CPUs"
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return ("--train_data_dir", write_digits(tmp_path_factory.mktemp("data"), counts=(5, 3, 3)), *OPTIONS)


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    argv = arguments(folder / "run", *options, "--train_batch_size", 8)
    assert finish(start(argv, folder / "log", **ON_CPU)) == 0, (folder / "log").read_text()
    return folder / "run"


def assert_close(run, reference):
    """Both results differ by at most 1e-5 of their norm, and by much less than the training changed them."""
    names = [*NAMES, *(f"{name}_ema_0.9" for name in NAMES)]
    for folder, models in (("", NAMES), ("checkpoint-20", names[2:])):
        ours, theirs = weights(run / folder, *models), weights(reference / folder, *models)
        assert ours.keys() == theirs.keys()
        for model in models:
            keys = [key for key in ours if key.startswith(f"{model}.")]
            a, b = (torch.cat([tensors[key].flatten().double() for key in keys]) for tensors in (ours, theirs))
            assert (a - b).norm() <= 1e-5 * b.norm(), (model, float((a - b).norm() / b.norm()))
    early, late = (weights(reference / f"checkpoint-{step}", *names[2:]) for step in (10, 20))
    assert all((late[key] - early[key]).norm() > 0 for key in late)
    assert DoDPipeline.from_pretrained(run)(0, num_inference_steps=2).images


@pytest.mark.parametrize("batch_size, accumulation", [(2, 4), (1, 8)])
def test_accumulated_gradients_are_those_of_the_large_batch(options, one_process, tmp_path, batch_size, accumulation):
    options += ("--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation)
    assert finish(start(arguments(tmp_path / "run", *options), tmp_path / "log", **ON_CPU)) == 0
    assert_close(tmp_path / "run", one_process)


@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=needs_fsdp)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume(options, one_process, tmp_path, environment):
    options += ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--validation_steps", 20)
    assert start_together(arguments(tmp_path / "run", *options), tmp_path, 2, **environment) == [0, 0], (
        tmp_path / "log-0"
    ).read_text()
    assert_close(tmp_path / "run", one_process)
    assert (tmp_path / "run" / "samples" / "step_20.png").is_file()
    sharded = list((tmp_path / "run" / "checkpoint-10").glob("optimizer_0/*.distcp"))
    assert len(sharded) == (2 if environment else 0)
    # Killed after step 10
    shutil.copytree(tmp_path / "run" / "checkpoint-10", tmp_path / "resumed" / "checkpoint-10")
    assert start_together(arguments(tmp_path / "resumed", *options), tmp_path, 2, **environment) == [0, 0]
    assert "Resuming from" in (tmp_path / "log-0").read_text()
    assert_equal_tensors(weights(tmp_path / "resumed"), weights(tmp_path / "run"))


@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=needs_fsdp)], ids=["ddp", "fsdp2"])
def test_two_processes_in_bfloat16_train_as_one_in_bfloat16(options, tmp_path, environment):
    """FSDP2 takes the same numbers to low precision as autocast alone does, and no others."""
    runs = {"one": ("--train_batch_size", 8), "two": ("--train_batch_size", 4)}
    runs = {
        name: arguments(tmp_path / name, *options, *batch, "--mixed_precision", "bf16") for name, batch in runs.items()
    }
    assert finish(start(runs["one"], tmp_path / "log", **ON_CPU)) == 0, (tmp_path / "log").read_text()
    assert start_together(runs["two"], tmp_path, 2, **environment) == [0, 0], (tmp_path / "log-0").read_text()
    one, two, before = (weights(tmp_path / name) for name in ("one", "two", "one/checkpoint-10"))
    difference, change = (sum((one[key] - other[key]).square().sum() for key in one).sqrt() for other in (two, before))
    assert difference <= 0.05 * change, (difference, change)


def test_a_run_goes_on_with_another_number_of_processes(options, one_process, tmp_path):
    shutil.copytree(one_process / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    options += ("--train_batch_size", 4)
    assert start_together(arguments(tmp_path / "run", *options), tmp_path, 2) == [0, 0]
    assert "Resuming from" in (tmp_path / "log-0").read_text()
    assert_close(tmp_path / "run", one_process)


def test_a_run_goes_on_with_another_split_of_its_steps(options, one_process, tmp_path):
    """The checkpoint counts 10 micro steps, no multiple of the 4 that make a step now."""
    shutil.copytree(one_process / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    options += ("--train_batch_size", 2, "--gradient_accumulation_steps", 4)
    assert finish(start(arguments(tmp_path / "run", *options), tmp_path / "log", **ON_CPU)) == 0
    assert "Resuming from" in (tmp_path / "log").read_text()
    assert_close(tmp_path / "run", one_process)


@needs_fsdp
def test_rows_without_a_prior_in_a_whole_process_are_refused_where_they_cannot_be_synchronised(options, tmp_path):
    command = arguments(tmp_path / "run", *options, "--train_batch_size", 1)
    assert start_together(command, tmp_path, 2, **FSDP) == [2, 2]
    assert "leaves processes without a prior, which FSDP cannot do" in (tmp_path / "log-0").read_text()
    assert not (tmp_path / "run").exists()

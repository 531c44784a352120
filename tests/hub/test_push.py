"""Pushing and downloading, with the real client in processes of their own against a small Hub on 127.0.0.1."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import numpy as np
import pytest
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from hub_server import SOURCE, HubServer
from huggingface_hub import ModelCard

import diffusers_dod
from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder
from diffusers_dod.hub.__main__ import main


SAMPLE = """
import numpy, torch
def sample(pipe, **arguments):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other sums with others
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.5} | arguments
    images = pipe([3, 1], generator=torch.Generator().manual_seed(0), **arguments).images
    torch.set_num_threads(threads)
    return images
"""
# The client before 1.0 gives up when a download breaks off; the same call then resumes.
AGAIN = """
def again(load, *arguments, **options):
    try:
        return load(*arguments, **options)
    except Exception as error:
        assert "Connection broken" in str(error), error
        return load(*arguments, **options)
"""
# What a user without this package has; the tests run with it installed.
WITHOUT_PACKAGE = """
import importlib.util, os, sys
sys.path = [path for path in sys.path if path and not os.path.isdir(os.path.join(path, "diffusers_dod"))]
assert importlib.util.find_spec("diffusers_dod") is None
"""


def start(hub, home, arguments, **environment):
    variables = hub.environment(home, **environment)
    return subprocess.run([sys.executable, *map(str, arguments)], env=variables, capture_output=True, text=True)


def run_code(hub, home, code, **environment):
    """Runs `code` with an empty or a used cache in `home`; returns the process, which must have ended well."""
    done = start(hub, home, ["-c", SAMPLE + AGAIN + textwrap.dedent(code)], **environment)
    assert done.returncode == 0, done.stderr
    return done


def push(hub, home, *arguments, **environment):
    return start(hub, home, ["-m", "diffusers_dod.hub", "push", *arguments], **environment)


def sample_here(pipe):
    """`SAMPLE` in this process."""
    scope = {}
    exec(SAMPLE, scope)
    return scope["sample"](pipe)


def three_million_parameters():
    transformer = tiny_transformer(num_layers=5, num_attention_heads=6, attention_head_dim=32)
    embedder = tiny_embedder(output_dim=192)
    names = {0: "tench, Tinca tinca", 3: "Hüpfball"}
    return tiny_pipeline(vae=tiny_vae("kl"), transformer=transformer, latent_embedder=embedder, id2label=names)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """A folder that was pushed to user/model, and its images for seed 0."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = three_million_parameters()
    pipe.save_pretrained(folder / "first")
    # Saved again, its configs name the folder that it was loaded from.
    diffusers_dod.DoDPipeline.from_pretrained(folder / "first").save_pretrained(folder)
    (folder / "training_config.json").write_text(
        json.dumps({"learning_rate": 1e-4, "prior_drop": 0.5, "train_data_dir": "/home/me/secret", "seed": 0})
    )
    (folder / "evaluation.json").write_text(
        json.dumps(
            {"reference": "mnist", "num_samples": 50, "extractor": "a small CNN"}
            | {"results": [{"metric": "fid", "name": "FID (a small CNN)", "value": 12.5, "stage": 2}]}
        )
    )
    hub.cut_upload = True
    done = push(hub, tmp_path_factory.mktemp("home"), folder, "user/model", "--license", "mit", "--variant", "fp16")
    assert done.returncode == 0, done.stderr
    assert not hub.cut_upload
    return folder, sample_here(pipe)


def test_push_is_one_commit_that_passes_the_check(hub, pushed, capsys):
    folder, _ = pushed
    assert len(hub.repositories["user/model"].commits) == 2  # the empty repository's and the push's
    files = hub.files("user/model")
    assert {"README.md", "model_index.json", "pipeline.py", "transformer/diffusers_dod.py"} <= set(files)
    assert {"block.py", "modular_config.json", "modular_model_index.json"} <= set(files)
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in files
    assert not any(b"/home/me" in content or str(folder).encode() in content for content in files.values())
    assert main(["check", str(folder), "--license", "mit"]) == 0, capsys.readouterr().out
    parameters = sum(p.numel() for p in three_million_parameters().transformer.parameters())
    assert 2.9e6 < parameters < 3.3e6


def test_dry_run_asks_the_hub_nothing(hub, pushed, capsys):
    folder, _ = pushed
    requests = len(hub.requests)
    assert main(["push", str(folder), "user/never", "--license", "mit", "--dry-run"]) == 0
    size = (folder / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert f"{size:,}  transformer/diffusion_pytorch_model.safetensors" in capsys.readouterr().out
    assert DoDPipeline.from_pretrained(folder).push_to_hub("user/never", license="mit", dry_run=True) is None
    assert len(hub.requests) == requests


def test_machine_with_the_package_gets_the_same_images(hub, pushed, tmp_path):
    hub.cut_download = True
    code = f"""
        from diffusers_dod import DoDPipeline
        pipe = again(DoDPipeline.from_pretrained, "user/model")
        assert pipe.get_label_ids('Tinca tinca') == [0]
        numpy.save({str(tmp_path / "images.npy")!r}, sample(pipe))
    """
    done = run_code(hub, tmp_path / "home", code)
    assert not hub.cut_download
    assert np.array_equal(np.load(tmp_path / "images.npy"), pushed[1])
    snapshot = list((tmp_path / "home/hub").glob("*/snapshots/*"))[0]
    assert not list(snapshot.rglob("*.py")) and not list(snapshot.rglob("*.fp16.*"))  # neither code nor a variant
    assert "not expected" not in done.stderr


def test_machine_without_the_package_gets_the_same_images(hub, pushed, tmp_path):
    """Refused without trust; with it loaded, saved, loaded again, and then loaded by the package."""
    folder, images = pushed
    hub.cut_download = True
    numpy_file, again = str(tmp_path / "images.npy"), str(tmp_path / "again")
    np.save(numpy_file, images)
    code = f"""
        import sys
        from diffusers import AutoModel, ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline
        for kind in (DiffusionPipeline, ModularPipeline):
            try:
                kind.from_pretrained("user/model")
                raise SystemExit("it was loaded without trust")
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
        for name in ("transformer", "latent_embedder"):
            try:
                AutoModel.from_pretrained("user/model", subfolder=name)
                raise SystemExit("it was loaded without trust")
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
        assert not any("diffusers_modules" in name for name in sys.modules)
        pipe = again(DiffusionPipeline.from_pretrained, "user/model", trust_remote_code=True)
        assert numpy.array_equal(sample(pipe), numpy.load({numpy_file!r}))
        assert pipe.get_label_ids('Tinca tinca') == [0]
        for name in ("transformer", "latent_embedder"):
            model = AutoModel.from_pretrained("user/model", subfolder=name, trust_remote_code=True)
            assert type(model).__name__ == type(getattr(pipe, name)).__name__
            pipe.register_modules(**{{name: model}})
        assert numpy.array_equal(sample(pipe), numpy.load({numpy_file!r}))
        pipe.save_pretrained({again!r})
        pipe = DiffusionPipeline.from_pretrained({again!r}, trust_remote_code=True)
        assert numpy.array_equal(sample(pipe), numpy.load({numpy_file!r}))
        # The pipeline's own class loads, too.
        pipe = type(pipe).from_pretrained({again!r})
        assert numpy.array_equal(sample(pipe), numpy.load({numpy_file!r}))
        # The same as blocks.
        modular = ModularPipeline.from_pretrained("user/model", trust_remote_code=True)
        modular.load_components()
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
        pipe.guider = modular.guider
        options = {{"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}}
        images = modular(class_labels=["Hüpfball", 1], output="images", **options)
        assert numpy.array_equal(images, sample(pipe, guidance_scale=None))
        assert not numpy.array_equal(images, numpy.load({numpy_file!r}))
    """
    done = run_code(hub, tmp_path / "home", WITHOUT_PACKAGE + textwrap.dedent(code))
    assert not hub.cut_download
    assert "Expected types" not in done.stderr
    for path in ("pipeline.py", "transformer/diffusers_dod.py", "latent_embedder/diffusers_dod.py"):
        assert Path(again, path).read_text() == Path(folder, path).read_text()
    assert np.array_equal(sample_here(diffusers_dod.DoDPipeline.from_pretrained(again)), images)


def test_ways_of_loading_with_the_package(hub, pushed, tmp_path):
    """Revision, variant, dtypes, single models, cache only, and saving again what was loaded."""
    folder, images = pushed
    sharded = tmp_path / "sharded"
    diffusers_dod.DoDPipeline.from_pretrained(folder).save_pretrained(sharded, max_shard_size="2MB")
    assert list(sharded.glob("transformer/*-00002-of-*.safetensors"))
    numpy_file = str(tmp_path / "images.npy")
    np.save(numpy_file, images)
    code = f"""
        import glob, os
        from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
        from diffusers_dod.hub import push_folder
        expected = numpy.load({numpy_file!r})

        def cached(pattern):
            return glob.glob(os.path.join(os.environ["HF_HOME"], "hub/*/snapshots/*", pattern))

        half = DoDPipeline.from_pretrained("user/model", variant="fp16", dtype=torch.float16)
        assert {{p.dtype for p in half.transformer.parameters()}} == {{torch.float16}}
        assert cached("transformer/*.fp16.safetensors") and not cached("transformer/diffusion_pytorch_model.safetensors")
        assert not cached("*.py") and not cached("*/*.py")

        dtypes = {{"transformer": torch.bfloat16, "default": torch.float32}}
        mixed = DoDPipeline.from_pretrained("user/model", torch_dtype=dtypes)
        assert mixed.transformer.dtype == torch.bfloat16 and mixed.latent_embedder.dtype == torch.float32

        push_folder({str(sharded)!r}, "user/sharded", license="mit", revision="v2")
        pipe = DoDPipeline.from_pretrained("user/sharded", revision="v2")
        assert numpy.array_equal(sample(pipe), expected)
        pipe = DoDPipeline.from_pretrained("user/sharded", revision="v2", local_files_only=True)
        assert numpy.array_equal(sample(pipe), expected)

        transformer = DoDTransformer2DModel.from_pretrained("user/model", subfolder="transformer")
        embedder = DoDLatentEmbedder.from_pretrained("user/sharded", subfolder="latent_embedder", revision="v2")
        pipe = DoDPipeline.from_pretrained("user/model", transformer=transformer, latent_embedder=embedder)
        assert pipe.transformer is transformer and numpy.array_equal(sample(pipe), expected)

        for number in range(2):
            target = os.path.join(os.environ["HF_HOME"], f"again{{number}}")
            pipe.save_pretrained(target)
            pipe = DoDPipeline.from_pretrained(target)
            assert numpy.array_equal(sample(pipe), expected)
        assert pipe.get_label_ids("Hüpfball") == [3]
    """
    run_code(hub, tmp_path / "home", code)
    assert hub.files("user/sharded", "main") == {}  # the branch has it, `main` is as it was
    modular = json.loads(hub.files("user/sharded", "v2")["modular_model_index.json"])["transformer"][2]
    assert (modular["pretrained_model_name_or_path"], modular["revision"]) == ("user/sharded", "v2")
    offline = f"""
        from diffusers_dod import DoDPipeline
        pipe = DoDPipeline.from_pretrained("user/model")
        assert numpy.array_equal(sample(pipe), numpy.load({numpy_file!r}))
    """
    requests = len(hub.requests)
    run_code(hub, tmp_path / "home", offline, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == requests


def test_card_of_the_push(hub, pushed, tmp_path):
    """Its head is what the Hub's parser takes, and its snippets run as they stand."""
    card = ModelCard(hub.files("user/model")["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("FID (a small CNN)", 12.5, "mnist")
    assert result.metric_args == {"num_samples": 50, "extractor": "a small CNN", "stage": 2}
    assert "| learning_rate | 0.0001 |" in card.text and "secret" not in card.text
    with_package, without_package = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    image = """
import os
size = os.path.getsize("sample.png")
os.remove("sample.png")
"""
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{WITHOUT_PACKAGE}\n{without_package}{image}"
    code += f"sys.path.insert(0, {SOURCE!r})\n{with_package}{image}"
    run_code(hub, tmp_path / "home", code)


def test_push_that_breaks_leaves_nothing_and_the_next_one_resumes(hub, tmp_path):
    folder = tmp_path / "pipeline"
    tiny_pipeline(transformer=tiny_transformer(num_classes=3), vae=tiny_vae("kl")).save_pretrained(folder)
    hub.faults = {"lfs_upload": [403], "commit": [500]}
    first = len(hub.requests)
    code = f"""
        from diffusers_dod import DoDPipeline
        from diffusers_dod.hub.__main__ import main
        push = ["push", {str(folder)!r}, "user/broken", "--license", "mit", "--private"]
        assert [main(push), main(push), main(push)] == [2, 2, 0]
        try:
            DoDPipeline.from_pretrained("user/broken", token=False)
            raise SystemExit("a private repository was loaded without a token")
        except OSError as error:
            assert "401" in str(error), error
        assert DoDPipeline.from_pretrained("user/broken").transformer.config.num_classes == 3
    """
    done = run_code(hub, tmp_path / "home", code)
    assert "403" in done.stderr and "500" in done.stderr
    repository = hub.repositories["user/broken"]
    assert repository.private and len(repository.commits) == 2  # the empty one and the third push's
    attempts = " ".join(hub.requests[first:]).split("POST /api/repos/create")[1:]
    sent = [re.findall(r"PUT /lfs-upload/(\w+)", attempt) for attempt in attempts]
    # Every large file once and the one refusal: what arrived by one attempt is not sent by the next.
    assert len(sum(sent, [])) == len(set(sum(sent, []))) + 1 and len(set(sent[0])) > 1 and sent[2] == []
    done = push(hub, tmp_path, folder, "user/broken", "--license", "mit", HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and "401" in done.stderr


def test_second_push_replaces_the_first(hub, pushed, tmp_path):
    """Weights and code of an earlier push go with the same commit, a stranger's file stays; a pull request leaves `main`."""
    folder, _ = pushed
    hub.put("user/replaced", {"notes.txt": b"mine", "transformer/diffusion_pytorch_model.bf16.safetensors": b"old"})
    hub.put("user/replaced", {"pipeline.py": b"old", "vae/diffusion_pytorch_model.safetensors": b"old"})
    before = hub.files("user/replaced")
    code = f"""
        from diffusers_dod import DoDPipeline
        from diffusers_dod.hub.__main__ import main
        main(["push", {str(folder)!r}, "user/replaced", "--license", "mit", "--create-pr", "--no-code"])
        pipe = DoDPipeline.from_pretrained("user/replaced", revision="refs/pr/1")
        # diffusers' own ways to push take the same road.
        print(pipe.push_to_hub("user/by-method", license="mit"))
        pipe.save_pretrained({str(tmp_path / "saved")!r}, push_to_hub=True, repo_id="user/by-saving", license="mit")
    """
    done = run_code(hub, tmp_path / "home", code)
    assert "discussions/1" in done.stdout and f"{hub.endpoint}/user/repo/commit/" in done.stdout
    for name in ("user/by-method", "user/by-saving"):
        pushed_files = hub.files(name)
        assert f'from_pretrained("{name}", trust_remote_code=True)' in pushed_files["README.md"].decode()
        assert {"pipeline.py", "transformer/diffusers_dod.py"} <= set(pushed_files)
    assert hub.files("user/replaced") == before
    proposed = hub.files("user/replaced", "refs/pr/1")
    assert proposed["notes.txt"] == b"mine"
    assert not any(path.endswith(".py") or ".bf16." in path for path in proposed)
    assert "trust_remote_code" not in proposed["README.md"].decode()
    assert json.loads(proposed["model_index.json"])["_class_name"] == "DoDPipeline"


EVIL = "open({marker!r}, 'w').write('it was run')\n"


def evil_repositories(folder, marker):
    """Three repositories that want to run code: their files by name, and what the refusal must say."""
    tiny_pipeline().save_pretrained(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    index = json.loads(files["model_index.json"])
    evil = EVIL.format(marker=marker).encode()

    class Pickled:
        def __reduce__(self):
            return exec, (evil.decode(),)

    weights = "transformer/diffusion_pytorch_model"
    pickled = {name: content for name, content in files.items() if not name.startswith(weights)}
    pickled |= {f"{weights}.bin": pickle.dumps({"proj_out.weight": Pickled()})}
    foreign = json.dumps({**index, "scheduler": ["evil", "EvilScheduler"]}).encode()
    stranger = json.dumps({**index, "_class_name": ["pipeline", "EvilPipeline"]}).encode()
    return {
        "pickled": (pickled, "no safetensors weights for `transformer`"),
        "foreign": ({**files, "model_index.json": foreign, "scheduler/evil.py": evil, "evil.py": evil}, "import evil"),
        "stranger": ({**files, "model_index.json": stranger, "pipeline.py": evil}, "trust_remote_code=True"),
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_pipeline_of_any_scheduler_is_in_order(tmp_path, scheduler):
    tiny_pipeline(scheduler=scheduler).save_pretrained(tmp_path)
    assert check_folder(tmp_path, "mit") == []


def test_repositories_that_want_to_run_code(hub, tmp_path):
    marker = str(tmp_path / "marker")
    expected = {}
    for name, (files, message) in evil_repositories(tmp_path / "good", marker).items():
        hub.put(f"user/{name}", files)
        for path, content in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        expected |= {f"user/{name}": message, str(tmp_path / name): message}
        assert check_folder(tmp_path / name, "mit"), name
    # The same code is no hindrance where the class is ours: it is not even downloaded.
    files = evil_repositories(tmp_path / "good", marker)["stranger"][0]
    files["model_index.json"] = files["model_index.json"].replace(b"EvilPipeline", b"DoDPipeline")
    files["transformer/diffusers_dod.py"] = EVIL.format(marker=marker).encode()
    hub.put("user/other-code", files)
    code = f"""
        import os
        from diffusers import DiffusionPipeline
        from diffusers_dod import DoDPipeline
        for source, message in {expected!r}.items():
            for trust in ({{}}, {{"trust_remote_code": True}}):
                try:
                    DoDPipeline.from_pretrained(source, **trust)
                    raise SystemExit(f"{{source}} was loaded")
                except ValueError as error:
                    assert message in str(error), error
        DoDPipeline.from_pretrained("user/other-code")
        try:
            DiffusionPipeline.from_pretrained("user/other-code")
            raise SystemExit("code was run without trust")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        assert not os.path.exists({marker!r})
        # The marker works: trusted code is run.
        try:
            DiffusionPipeline.from_pretrained("user/other-code", trust_remote_code=True)
        except AttributeError:
            pass
        assert os.path.exists({marker!r})
    """
    run_code(hub, tmp_path / "home", code, PYTHONPATH=f"{SOURCE}{os.pathsep}{tmp_path / 'foreign'}")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:{port}"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_a_push_without_a_network_is_one_line(environment, hub, pushed, tmp_path):
    environment = {name: value.format(port=free_port()) for name, value in environment.items()}
    done = push(hub, tmp_path, pushed[0], "user/nowhere", "--license", "mit", **environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffusers-dod hub: error: ") and "repeat the push" in line
    assert "user/nowhere" not in hub.repositories


def test_whatever_the_hub_does_is_one_line_and_a_bug_is_a_traceback(empty_hub, pushed, tmp_path):
    """It closes the connection or refuses, at first and later; its last answer is a success that lacks what it must hold."""
    empty_hub.faults = {"create_repository": [None, 403, 500], "lfs_upload": [403], "commit": [None, 500, 200]}
    code = f"""
from diffusers_dod.hub.__main__ import main
push = ["push", {str(pushed[0])!r}, "user/x", "--license", "mit"]
print([main(push) for _ in range(6)], flush=True)
main(push)
"""
    done = start(empty_hub, tmp_path / "home", ["-c", code], HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert done.returncode == 1 and done.stdout == "[2, 2, 2, 2, 2, 2]\n", done.stderr
    lines, _, traceback = done.stderr.partition("Traceback")
    upload = r"Error while uploading .*\(403 .*\)"  # the client's own error, with its cause
    advice = r"\. To resume, repeat the push: large files that arrived are not sent again"
    for line, text in zip(lines.splitlines(), ("", "403 ", "500 ", upload, "", "500 "), strict=True):
        assert re.fullmatch(f"diffusers-dod hub: error: .*{text}.*{advice}", line), line
    assert traceback.endswith("KeyError: 'commitUrl'\n") and not any(empty_hub.faults.values())


def test_a_push_takes_no_room_for_weights_and_commits_once(empty_hub, pushed, tmp_path):
    """No file may grow past a limit, which stands for a disk without space: one below the weights' size is enough."""
    weights = pushed[0] / "transformer/diffusion_pytorch_model.safetensors"
    code = f"""
        import resource
        from diffusers_dod.hub.__main__ import main
        for limit, status in ((1_000, 2), ({weights.stat().st_size - 1}, 0)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            assert main(["push", {str(pushed[0])!r}, "linked", "--license", "mit"]) == status
    """
    done = run_code(empty_hub, tmp_path / "home", code, HF_HUB_DISABLE_PROGRESS_BARS="1")
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffusers-dod hub: error: ") and "File too large" in line
    assert len(empty_hub.repositories["user/linked"].commits) == 2  # the empty repository's and the push's
    files = empty_hub.files("user/linked")
    assert files["transformer/diffusion_pytorch_model.safetensors"] == weights.read_bytes()
    assert {"README.md", "model_index.json", "pipeline.py", "evaluation.json"} <= set(files)


def test_a_pull_request_against_a_branch_is_refused(pushed, capsys):
    assert main(["push", str(pushed[0]), "user/x", "--license", "mit", "--create-pr", "--revision", "v2"]) == 2
    assert "leave out either" in capsys.readouterr().err


OLD = {
    "vae/diffusion_pytorch_model.safetensors": True,
    "vae/config.json": True,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": True,
    "transformer/deep/old.json": True,
    "pipeline.py": True,
    "stages.png": True,
    "evaluation.json": True,
    "notes.txt": False,
    "LICENSE": False,
    ".gitattributes": False,
    "vaes/other.json": False,
    "block.py": True,
    "modular_config.json": True,
    "modular_model_index.json": True,
    "extra/pipeline.py": False,
    "transformer.txt": False,
    "pytorch_lora_weights.safetensors": False,
}


def test_what_an_earlier_push_left_goes_with_the_one_commit(hub, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    hub.put("user/old", dict.fromkeys(OLD, b"old"))
    before = len(hub.repositories["user/old"].commits)
    done = push(hub, tmp_path / "home", tmp_path / "pipeline", "user/old", "--license", "mit", "--no-code")
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories["user/old"].commits) == before + 1
    files = hub.files("user/old")
    assert {path: path not in files for path in OLD} == OLD
    assert json.loads(files["model_index.json"])["vae"] == [None, None]


def test_a_code_model_goes_along_and_away(hub, tmp_path):
    """Pushed with its code, loaded by the package and by diffusers alone; a push without one deletes it."""
    pipe = tiny_coded_pipeline()
    pipe.save_pretrained(tmp_path / "coded")
    images = sample_here(pipe)
    np.save(tmp_path / "images.npy", images)
    assert push(hub, tmp_path, tmp_path / "coded", "user/coded", "--license", "mit").returncode == 0
    files = hub.files("user/coded")
    assert {"code_transformer/diffusers_dod.py", "code_scheduler/scheduler_config.json"} <= set(files)
    assert "| code model | " in files["README.md"].decode() and "num_stages" not in files["README.md"].decode()
    code = f"""
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained("user/coded", trust_remote_code=True)
        assert numpy.array_equal(sample(pipe), numpy.load({str(tmp_path / "images.npy")!r}))
    """
    run_code(hub, tmp_path / "home", WITHOUT_PACKAGE + textwrap.dedent(code))
    code = f"""
        from diffusers_dod import DoDPipeline
        pipe = DoDPipeline.from_pretrained("user/coded")
        assert pipe.code_transformer is not None
        assert numpy.array_equal(sample(pipe), numpy.load({str(tmp_path / "images.npy")!r}))
    """
    run_code(hub, tmp_path / "home", code)
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    assert push(hub, tmp_path, tmp_path / "plain", "user/coded", "--license", "mit").returncode == 0
    assert not any(path.startswith("code_") for path in hub.files("user/coded"))

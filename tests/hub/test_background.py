"""A push beside a training: nothing that happens to it reaches the training. By real pushes to a small Hub."""

import shutil
import subprocess
import sys
import textwrap
import time


START = """
import shutil, sys
from diffusers_dod.hub import BackgroundPush
_, saved, finished = sys.argv
def save(folder):
    shutil.copytree(saved, folder, dirs_exist_ok=True)
"""


def start(hub, tmp_path, code, *folders):
    """A process that runs `code`, with an empty folder for its temporary ones."""
    (tmp_path / "temporary").mkdir()
    environment = {"TMPDIR": str(tmp_path / "temporary"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", START + textwrap.dedent(code), *map(str, folders)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=hub.environment(tmp_path / "home", **environment), **options)


def test_pushes_one_after_another_beside_the_training(empty_hub, saved, folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nthe last")
    code = """
        push = BackgroundPush("user/model", license="mit")
        push.submit(save)
        push.submit(save)  # left out
        push.finish(finished)
    """
    empty_hub.gate.clear()
    lines, asked = [], []
    with start(empty_hub, tmp_path, code, saved, folder) as process:
        for line in process.stdout:
            lines.append(line)
            if "still runs" in line:
                time.sleep(1)  # `finish` waits meanwhile
                asked = list(empty_hub.requests)
                empty_hub.gate.set()
    assert process.returncode == 0, lines
    assert asked.count("POST /api/repos/create") <= 2  # by the beginning and by the first push
    assert sum("still runs" in line for line in lines) == 1 and lines[-1].startswith(f"Pushed: {empty_hub.endpoint}/")
    _, first, last = empty_hub.repositories["user/model"].commits.values()
    assert b"license: mit" in first["README.md"].content and last["README.md"].content.endswith(b"the last")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_fails_is_a_warning_and_a_bug_in_saving_is_not(empty_hub, saved, tmp_path):
    """The disk is full, nothing was saved, the Hub closes the connection or refuses; at last the saving itself is wrong."""
    folder = shutil.copytree(saved, tmp_path / "my run")
    empty_hub.faults["create_repository"] = [403, None, 500]
    code = """
        import resource
        from diffusers.utils.logging import disable_progress_bar
        from diffusers_dod import DoDPipeline
        disable_progress_bar()
        pipe = DoDPipeline.from_pretrained(saved)
        push = BackgroundPush("user/model", license="mit", private=True)
        for limit in (20, 2_000):  # no file may grow past it; of a config, and of the weights
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            push.submit(pipe.save_pretrained)
            assert push.running is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for save in (lambda folder: None, save):
            push.submit(save)
            push.running.result()
        assert push.finish(finished) is None
        push.submit(lambda folder: 1 / 0)
    """
    with start(empty_hub, tmp_path, code, saved, folder) as process:
        output = process.stdout.read()
    assert process.returncode == 1 and output.endswith("ZeroDivisionError: division by zero\n"), output
    created, *unsaved, empty, closed, refused, hint = output.partition("Traceback")[0].splitlines()
    assert created.startswith("user/model cannot be made on the Hub, so pushes will fail: 403 ")
    assert all(line.startswith("The model could not be saved for a push to user/model: ") for line in unsaved)
    assert "[Errno 27]" in unsaved[0] and "I/O error" in unsaved[1] and len(unsaved) == 2
    assert all(line.startswith("The push to user/model failed: ") for line in (empty, closed, refused))
    assert "was not pushed" in empty and "500 " in refused
    assert hint == f"To try again: `diffusers-dod hub push '{folder}' user/model --license mit --private`"
    assert not any(empty_hub.faults.values()) and not empty_hub.repositories
    assert list((tmp_path / "temporary").iterdir()) == []

"""A push beside a training: nothing that happens to it reaches the training."""

import logging
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffusers_dod.hub import background
from diffusers_dod.hub.background import BackgroundPush


class Hub:
    """Takes the place of `HfApi.create_repo` and `push_folder`."""

    def __init__(self):
        self.pushed, self.threads, self.error = [], [], None
        self.gate = threading.Event()
        self.gate.set()

    def create_repo(self, api, repo_id, **options):
        if self.error is not None:
            raise self.error

    def push_folder(self, folder, repo_id, **options):
        self.gate.wait(60)
        self.threads.append(threading.current_thread())
        if self.error is not None:
            raise self.error
        self.pushed.append((sorted(path.name for path in Path(folder).iterdir()), options))
        return "https://address"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(
        background.HfApi, "create_repo", lambda *arguments, **options: hub.create_repo(*arguments, **options)
    )
    monkeypatch.setattr(background, "push_folder", hub.push_folder)
    background.logger.addHandler(handler := logging.Handler())
    hub.messages = []
    handler.emit = lambda record: hub.messages.append(record.getMessage())
    yield hub
    background.logger.removeHandler(handler)


def save(folder):
    Path(folder, "weights").write_text("1")


def test_pushes_one_after_another_in_a_thread(hub, tmp_path):
    (tmp_path / "last").write_text("2")
    push = BackgroundPush("user/model", license="mit")
    hub.gate.clear()
    push.submit(save)
    push.submit(save)  # left out
    hub.gate.set()
    assert push.finish(tmp_path) == "https://address"
    assert [names for names, _ in hub.pushed] == [["weights"], ["last"]]
    assert hub.pushed[0][1] == {"license": "mit"}
    assert hub.threads[0] is not threading.main_thread() and hub.threads[1] is threading.main_thread()
    assert len(hub.messages) == 1 and "still runs" in hub.messages[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        PermissionError("no"),
        ConnectionError("no route\nmore lines"),
        FileNotFoundError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_is_a_warning(error, hub, tmp_path):
    def save_fails(folder):
        Path(folder, "half").write_text("")
        scratch.append(folder)
        raise error

    scratch: list[str] = []
    hub.error = error
    push = BackgroundPush("user/model", license="mit", private=True)
    push.submit(save_fails)
    assert push.running is None and not Path(scratch[0]).exists()
    push.submit(save)
    assert push.finish(tmp_path / "my run") is None
    created, saved, failed, failed_again, hint = hub.messages
    assert "cannot be made" in created and "could not be saved" in saved and "\n" not in created + saved
    assert failed.startswith("The push to user/model failed: ") and failed_again == failed
    assert hint == f"To try again: `diffusers-dod hub push '{tmp_path / 'my run'}' user/model --license mit --private`"


def test_a_bug_in_saving_is_no_warning(hub):
    def save_fails(folder):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        BackgroundPush("user/model").submit(save_fails)

"""A push beside a training."""

import shlex
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi
from safetensors import SafetensorError

from ..cli import first_line
from .push import push_folder


logger = logging.get_logger(__name__)


class BackgroundPush:
    """Pushes a model in the background while training continues. A push that fails is only logged as a warning.

        push = BackgroundPush("user/model", license="mit")
        push.submit(pipeline.save_pretrained)  # in the loop: saves now, uploads in a thread
        push.finish("outputs/mine")            # at the end: waits for that, then pushes the finished folder

    Args:
        repo_id (`str`): repository; one that cannot be made is logged at once, not after the training.
        kwargs: arguments of [`push_folder`].
    """

    def __init__(self, repo_id: str, **kwargs: Any):
        self.repo_id, self.arguments = repo_id, kwargs
        self.api = HfApi(token=kwargs.get("token"), library_name="diffusers-dod")
        self.running: Future | None = None
        try:
            self.api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
        except Exception as error:  # whatever the network or the server did, the training is worth more
            logger.warning(f"{repo_id} cannot be made on the Hub, so pushes will fail: {first_line(error)}")

    def submit(self, save: Callable[[str], Any]) -> None:
        """Saves the model by `save(folder)` and pushes the folder; does neither while an earlier push still runs."""
        if self.running is not None and not self.running.done():
            logger.warning(f"An earlier push to {self.repo_id} still runs, so this one is left out.")
            return
        try:
            scratch = tempfile.TemporaryDirectory()
            try:
                save(scratch.name)
            except BaseException:
                scratch.cleanup()
                raise
        except (OSError, SafetensorError) as error:  # a full disk
            logger.warning(f"The model could not be saved for a push to {self.repo_id}: {first_line(error)}")
            return
        self.running = self.api.run_as_future(self._push_and_delete, scratch)

    def finish(self, folder: str | Path) -> str | None:
        """Waits for the push that runs, then pushes a folder; returns the commit's address, `None` if it failed."""
        if self.running is not None:
            self.running.result()
        address = self._push(folder)
        if address is None:
            command = ["diffusers-dod", "hub", "push", str(folder), self.repo_id]
            command += ["--license", self.arguments["license"]] if self.arguments.get("license") else []
            command += ["--private"] if self.arguments.get("private") else []
            logger.warning(f"To try again: `{shlex.join(command)}`")
        else:
            print(f"Pushed: {address}")
        return address

    def _push_and_delete(self, scratch: tempfile.TemporaryDirectory) -> None:
        with scratch as folder:
            self._push(folder)

    def _push(self, folder: str | Path) -> str | None:
        try:
            return push_folder(folder, self.repo_id, **self.arguments)
        except Exception as error:
            logger.warning(f"The push to {self.repo_id} failed: {error}")
            return None

"""A saved pipeline that each test may change, and a Hub without anything on it."""

import shutil
from pathlib import Path

import pytest
from helpers import tiny_pipeline, tiny_vae
from hub_server import HubServer


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(vae=tiny_vae("kl")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


@pytest.fixture
def empty_hub():
    with HubServer() as server:
        yield server

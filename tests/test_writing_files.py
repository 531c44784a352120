"""Files that are removed, and files that will have to be written."""

import os

import pytest

from diffusers_dod.evaluation.__main__ import main as evaluate
from diffusers_dod.evaluation.probe import main as probe
from diffusers_dod.files import check_writable, remove


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to a folder", "broken link", "nothing"])
def test_what_is_removed_is_gone_and_what_it_leads_to_is_not(kind, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    path = tmp_path / "path"
    if kind == "file":
        path.write_text("")
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "link").symlink_to(tmp_path / "kept")
    elif kind != "nothing":
        path.symlink_to(
            {"link to a file": "kept/file", "link to a folder": "kept", "broken link": "nowhere"}[kind],
        )
    remove(path)
    assert sorted(os.listdir(tmp_path)) == ["kept"] and (tmp_path / "kept" / "file").read_text() == "kept"


UNWRITABLE = ["folder", "missing/file", "file/below", "loop/file", "x" * 300]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("what is there")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_file_that_cannot_be_written_is_found_out_before(name, place, capsys):
    with pytest.raises(OSError):
        check_writable(place / name)
    # By the commands before they look at anything else
    assert evaluate(["--samples", "none", "--reference", "none", "--output", str(place / name)]) == 2
    assert probe(["--model", "none", "--train_data_dir", "none", "--output", str(place / name)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(place / name) in line or "tmp-" in line for line in lines)


def test_a_file_that_can_be_written_stays_as_it_is(place):
    check_writable(place / "file")
    check_writable(place / "new")
    assert (place / "file").read_text() == "what is there"
    assert sorted(os.listdir(place)) == ["file", "folder", "loop"]

"""Checks what a wheel and an sdist hold: `release_contents.py WHEEL SDIST`, from the repository's root."""

import sys
import tarfile
import zipfile
from pathlib import Path


NO_PYTHON = ("py.typed", "conversion/imagenet_labels.txt", "demo/painting.js", "demo/style.css", "hub/model_card.md")


def main(wheel: str, sdist: str) -> None:
    package = Path("src/diffusers_dod")
    expected = {
        path.relative_to("src").as_posix(): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    others = {name for name in expected if not name.endswith(".py")}
    assert others == {f"diffusers_dod/{name}" for name in NO_PYTHON}, others
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    information = {name: content for name, content in found.items() if ".dist-info/" in name}
    assert {name: content for name, content in found.items() if name not in information} == expected, sorted(found)
    license_file = next(content for name, content in information.items() if name.endswith("/LICENSE"))
    assert license_file == Path("LICENSE").read_bytes()
    metadata = next(content for name, content in information.items() if name.endswith("/METADATA")).decode()
    for line in ("License-Expression: Apache-2.0", "Requires-Dist: diffusers>=", "Project-URL: Paper", "Keywords: "):
        assert line in metadata, line
    scripts = next(content for name, content in information.items() if name.endswith("/entry_points.txt")).decode()
    assert "diffusers-dod = diffusers_dod.__main__:main" in scripts

    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        root = archive.getnames()[0].partition("/")[0]
        for name, content in expected.items():
            assert archive.extractfile(f"{root}/src/{name}").read() == content, name
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names, names


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the documentation says without commands: links, options, messages, supported combinations."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import diffusers_dod


ROOT = Path(__file__).parents[2]
PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name not in ("model_card.md",)]
SOURCES = [path for top in ("src", "examples", "study", "benchmarks") for path in ROOT.glob(f"{top}/**/*.py")]
# What a cell of docs/support.md says of a combination that has a test
WORDS = {"yes", "refused", "used", "ignored", "loads and saves"}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)", without_code(page.read_text()))
    for link in links:
        if link.startswith(("https://", "http://", "#")) and not link.startswith("#"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        if page.name != "README.md":
            assert f"]({page.relative_to(ROOT).as_posix()}" in readme, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_files_that_are_named_exist(page):
    text = page.read_text()
    source = "\n".join(path.read_text() for path in SOURCES)
    # Of other programs
    foreign = {"--config_file", "--nproc_per_node", "--editable", "--dry-run", "--help", "--machine_rank"}
    foreign |= {"--no-compile", "--no-install-recommends"}
    # Within a name `-` and `_` are the same; switches also have a `--no-`.
    names = set(re.findall(r'"--([a-z][\w-]*)"', source))
    names |= {f"no-{name}" for name in re.findall(r'"--(\w+)",\s*action=(?:SWITCH|switch|argparse\.Bool)', source)}
    names = {name.replace("-", "_") for name in names}
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - foreign:
        assert option[2:].replace("-", "_") in names, option
    for name in set(re.findall(r"\b(?:examples|tests|benchmarks|docs|src)/[\w/.]*\w\.\w+", text)):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name


def messages() -> list[str]:
    """The texts in our sources, with `…` for what is filled in."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("`", "") for text in found]


def test_messages_are_ours():
    rows = (ROOT / "docs/troubleshooting.md").read_text().partition("## Messages")[2].splitlines()
    quoted = [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows if row.startswith("| `")]
    ours = messages()
    assert len(quoted) > 10
    for message in quoted:
        parts = [re.escape(part) for part in message.split("…")]
        assert any(re.search(".*".join(parts), text) for text in ours), message


class Collection:
    """A plugin of pytest that keeps the names of what a run would run."""

    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


def support_cells() -> dict[tuple[str, str, str], str]:
    """The cells of docs/support.md by heading, row and column, in the tables whose cells `support.yaml` has tests for."""
    cells, tests = {}, yaml.safe_load((ROOT / "tests/documentation/support.yaml").read_text())
    for section in (ROOT / "docs/support.md").read_text().split("\n## ")[1:]:
        heading = section.splitlines()[0]
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            columns, _, *rows = ([cell.strip() for cell in row.strip()[1:-1].split("|")] for row in table.splitlines())
            if any(row[0] in tests.get(heading, {}) for row in rows):
                cells |= {
                    (heading, row[0], column): cell for row in rows for column, cell in zip(columns[1:], row[1:])
                }
    return cells


def test_every_cell_of_the_support_matrix_has_a_test():
    tests = yaml.safe_load((ROOT / "tests/documentation/support.yaml").read_text())
    named = {
        (h, row, column): test for h, rows in tests.items() for row, of in rows.items() for column, test in of.items()
    }
    cells = support_cells()
    told = {where for where, cell in cells.items() if cell not in ("", "untested")}
    assert told == set(named), told ^ set(named)
    assert len(told) > 100 and {cells[where].rstrip(" ¹²") for where in told} <= WORDS
    collection = Collection()
    files = sorted({name.partition("::")[0] for name in named.values()})
    pytest.main(
        ["--collect-only", "--quiet", f"--rootdir={ROOT}", *(str(ROOT / file) for file in files)], [collection]
    )
    # Of a parametrized test a cell may name all
    collected = {name for test in collection.names for name in (test, test.partition("[")[0])}
    assert set(named.values()) <= collected, set(named.values()) - collected


def test_the_examples_of_the_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for value in (
        diffusers_dod.DoDTransformer2DModel,
        diffusers_dod.DoDLatentEmbedder,
        diffusers_dod.DoDPipeline.__call__,
    ):
        example = re.search(r"```py\n(.*?)```", value.__doc__, re.DOTALL)[1]
        names = {}
        exec(re.sub(r"^ *>>> ", "", example, flags=re.MULTILINE), names)
        assert names["torch"]
    assert (tmp_path / "three.png").exists()


def test_the_drawing_is_that_of_its_script():
    assert load(ROOT / "docs/draw_method.py").draw() == (ROOT / "docs/images/method.svg").read_text()


def test_versions_and_authors_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diffusers_dod.__version__
    assert diffusers_dod.__version__ in (ROOT / "CHANGELOG.md").read_text()
    names = [
        f"{author['family-names']}, {author['given-names']}" for author in citation["preferred-citation"]["authors"]
    ]
    for page in ("README.md", "model_card.md"):
        assert f"author={{{' and '.join(names)}}}" in (ROOT / page).read_text()


@pytest.mark.parametrize(
    "config", sorted((ROOT / "examples/accelerate_configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_accelerate_reads_its_configurations(config):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(config)).num_processes > 1

"""A hook of mkdocs: the README is the first page, links out of `docs/` lead to the repository, docstrings are linked."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
IMAGES = ("study/results/*.png", "examples/pretrained/*/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # From the root's point of view to that of `docs/`
    index = re.sub(r"\]\((?!https?:|#)(?!docs/)", "](../", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=index))
    for path in (path for pattern in IMAGES for path in ROOT.glob(pattern)):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    markdown = re.sub(r"(!\[[^\]]*\]\()\.\./", r"\1", markdown).replace("](../README.md", "](index.md")
    if config.repo_url:
        return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)  # no address yet: the text alone


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Renders diffusers' notation in docstrings: types as code, [`name`] as a link to what the page describes.

    The default of a parameter has a column of its own.
    """

    def types(match: re.Match) -> str:
        text = re.sub(r"(, \*optional\*)?(, defaults to .*)?$", "", match[1])
        return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)

    html = re.sub(r"<code>([^<`]*`[^<]*)</code>", types, html)
    anchors = re.findall(r'id="(diffusers_dod\.[\w.]+)"', html)

    def link(match: re.Match) -> str:
        name = match[1].lstrip("~")
        text = f"<code>{name.rpartition('.')[2] if '~' in match[1] else name}</code>"
        found = [anchor for anchor in anchors if f".{anchor}".endswith(f".{name}")]
        return f'<a href="#{found[0]}">{text}</a>' if found else text

    return re.sub(r"\[<code>(~?[\w.]+)</code>\]", link, html)

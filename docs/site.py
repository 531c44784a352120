"""A hook of mkdocs: the README is the site's first page, and links out of `docs/` lead to the repository."""

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

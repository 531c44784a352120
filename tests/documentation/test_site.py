"""The documentation's site; `make docs` builds it whole."""

import runpy
from pathlib import Path


HOOK = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "site.py"))


def test_diffusers_notation_of_docstrings_is_rendered():
    anchors = '<h3 id="diffusers_dod.DoDPipeline"></h3><h4 id="diffusers_dod.DoDPipeline.decode"></h4>'
    written = {
        "<code>`int` or pair of `int`, defaults to 32</code>": "<code>int</code> or pair of <code>int</code>",
        "<code>`str`, *optional*, defaults to `None`</code>": "<code>str</code>",
        "<code>[`DoDPipeline`], *optional*</code>": '<a href="#diffusers_dod.DoDPipeline"><code>DoDPipeline</code></a>',
        "[<code>~DoDPipeline.decode</code>]": '<a href="#diffusers_dod.DoDPipeline.decode"><code>decode</code></a>',
        "[<code>SchedulerMixin</code>]": "<code>SchedulerMixin</code>",
        "<code>[0, 1]</code>": "<code>[0, 1]</code>",
    }
    for source, expected in written.items():
        assert HOOK["on_page_content"](anchors + source, None, None, None) == anchors + expected

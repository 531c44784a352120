"""Draws the README's picture of the demo: its page for a model, with four samples of a class from seed 0.

    python docs/draw_demo.py

Needs the extras `demo` and `test`, and Debian's package chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from diffusers_dod import DoDPipeline
from diffusers_dod.demo.page import build, launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/pretrained/letters", help="folder or Hub repository")
    parser.add_argument("--class_name", default="R", help="name of the class")
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.png"))
    args = parser.parse_args()

    page_of_model = build(DoDPipeline.from_pretrained(args.model), args.model)
    _, address, _ = launch(page_of_model, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1200, "height": 600})
        page.goto(address)
        page.get_by_label("Class", exact=True).click()
        page.get_by_role("option", name=args.class_name, exact=True).click()
        page.get_by_label("4", exact=True).first.check()
        page.get_by_label("New seed each time").uncheck()
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function(
            "document.querySelectorAll('#samples img.sample').length == 4 && !document.querySelector('#status progress')"
        )
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=args.output, full_page=True)
        browser.close()
    page_of_model.close()


if __name__ == "__main__":
    main()

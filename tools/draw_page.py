"""Draw docs/figures/page_light.png, page_dark.png and page_phone.png: the page of `ship-ds serve`
as Chromium shows it after an instruction, examples and an adapter.

    ship-ds serve --run runs/quickstart --port 8000 &
    python tools/draw_page.py --address http://127.0.0.1:8000
"""

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
INSTRUCTION = "keep the numbers greater than 4"
EXAMPLES = "3 9 5 -> 9 5\n1 8 2 -> 8\n7 0 6 4 -> 7 6"
LARGEST_BYTES = 200_000
VIEWS = {
    "page_light": ("light", 1280, 2800),
    "page_dark": ("dark", 1280, 1400),
    "page_phone": ("light", 360, 1800),
}
"""Name of the figure -> colours, width and height of the window."""


def use(page: Page) -> None:
    """Ask it everything that it can be asked."""
    page.wait_for_selector("#map circle.known")
    page.fill("#instruction", INSTRUCTION)
    with page.expect_download(timeout=120_000) as download:
        page.click("#download")
    page.click("#answer")
    page.wait_for_selector("#instruction-status:has-text('agreement')", timeout=120_000)
    page.fill("#examples", EXAMPLES)
    page.click("#induce")
    page.wait_for_selector("#candidates tr", timeout=300_000)
    # Read by the browser when it is sent, so the files stay until then.
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(download.value.path()) as archive:
            archive.extractall(folder)
        names = ("adapter_config.json", "adapter_model.safetensors")
        page.set_input_files("#files", [next(Path(folder).glob(f"*/{name}")) for name in names])
        page.click("#explain")
        page.wait_for_selector("#explained tr", timeout=300_000)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


def draw(address: str, folder: Path) -> None:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, (scheme, width, height) in VIEWS.items():
            context = chromium.new_context(
                color_scheme=scheme,  # type: ignore[arg-type]
                viewport={"width": width, "height": 900},
                accept_downloads=True,
            )
            page = context.new_page()
            page.goto(address)
            use(page)
            path = folder / f"{name}.png"
            page.screenshot(path=path, full_page=True)
            # A page of few colours: a palette takes a third of the bytes.
            with Image.open(path) as picture:
                cut = picture.crop((0, 0, width, min(height, picture.height)))
                cut.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
            context.close()
            if path.stat().st_size > LARGEST_BYTES:
                sys.exit(f"{path}: {path.stat().st_size} bytes, more than {LARGEST_BYTES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args()
    draw(options.address, options.out)


if __name__ == "__main__":
    main()

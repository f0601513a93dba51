"""The pictures of `pipeline/review/README.md`, taken of made-up runs: `python -m tests.support.review_pictures`."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.support.devtools import Page, browser
from tests.support.made_up_runs import make_chain
from tests.support.runs import ROOT, run_module

FOLDER = ROOT / "pipeline" / "review" / "pictures"
# name: (width, height of what is shown, dark, the part that it begins with)
PICTURES = {
    "wide-light.png": (1280, 1500, False, "header"),
    "wide-dark.png": (1280, 1500, True, "#time"),
    "phone-light.png": (390, 1700, False, "header"),
    "phone-dark.png": (390, 1700, True, "#evaluations"),
}
_COLOURS = 256  # of a palette: a quarter of the bytes, and nobody sees it


def take(page: Page, address: str, name: str) -> bytes:
    """One picture, as PNG."""
    width, height, dark, begin = PICTURES[name]
    page.look(width, height, dark=dark, phone=width < 800)
    page.open(address, "document.documentElement?.dataset.ready")
    page.value(f"document.querySelector('{begin}').scrollIntoView({{behavior: 'instant'}})")
    page.wait("charts.every((each) => !each.visible || !each.stale)")
    page.value("new Promise((then) => setTimeout(then, 1500))")  # charts that came into view are drawn
    written = io.BytesIO()
    seen = Image.open(io.BytesIO(page.picture(whole=False))).convert("RGB")
    seen.quantize(_COLOURS, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return written.getvalue()


def main() -> None:
    """Write them all."""
    with tempfile.TemporaryDirectory(prefix="review-") as root, browser() as page:
        make_chain(Path(root))
        done = run_module("pipeline", "review", root)
        assert done.returncode == 0, done.stderr
        for name in PICTURES:
            content = take(page, (Path(root) / "review.html").as_uri(), name)
            (FOLDER / name).write_bytes(content)
            print(f"{FOLDER.relative_to(ROOT) / name}: {len(content) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

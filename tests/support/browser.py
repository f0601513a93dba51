"""Pages as a browser that has not been there before shows them: Debian's chromium, without a window."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
import time

import pytest

from tests.support.processes import PATIENCE_SECONDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; .ci/run installs it")
_VIRTUAL_MS = 60_000  # a page's own clock, which stands still while it waits for the server


def shown(address: str, expected: str) -> str:
    """The text of a page as soon as it holds `expected`; a fresh profile each time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        text = _text(address)
        if expected in text:
            return text
        assert time.monotonic() < end, f"{address} does not show {expected!r}: {text[:2000]}"


def _text(address: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *(f"--user-data-dir={profile}", "--no-first-run", "--no-proxy-server"),
                *(f"--virtual-time-budget={_VIRTUAL_MS}", "--dump-dom", address),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", done.stdout, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())

"""A folder behind a web server that knows byte ranges."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


class _Files(http.server.SimpleHTTPRequestHandler):
    """A folder with byte ranges, as nginx serves it; `server.lists` says whether it shows what is in it."""

    server: Any

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if path.is_dir() and not self.server.lists:
            self.send_error(403)
        elif asked and path.is_file():
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            body = path.read_bytes()[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web_server(folder: Path, lists: bool = True) -> Iterator[str]:
    """Its address while the block runs; `lists`: it shows what is in a folder."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
    server.lists = lists
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

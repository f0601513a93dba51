#!/usr/bin/env bash
# fsspec 2026.9.0: over http(s), `info` says "file not found" of a server that refuses, fails or is not there.
#
# One would guess: FileNotFoundError is a 404. A 403, a 500 and a refused connection are other errors.
# What happens: `info` turns all of them into FileNotFoundError with the URL as its text; what the server said is only in
#   the error's __cause__. Reading the same URL (`cat_file`) does tell them apart.
# Whom it hurts: code that answers FileNotFoundError with "check the path", or takes it for "not written yet" and goes
#   on: a login that has run out, or a server that is down for a minute, looks like an absent file.
# Instead: look at __cause__ (aiohttp's ClientResponseError has the status) before believing it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5

cat > try.py <<'PYTHON'
import http.server
import sys
import threading

import fsspec


class Answers(http.server.BaseHTTPRequestHandler):
    """The status that the path names."""

    def do_GET(self):
        self.send_error(int(self.path[1:]))

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}"
print("fsspec", fsspec.__version__)


def asked(call, url):
    """-> the error's type and its cause's."""
    system, path = fsspec.url_to_fs(url)
    try:
        call(system, path)
    except Exception as error:
        return type(error).__name__, type(error.__cause__).__name__
    return "no error", ""


seen = []
for what, url in (("404", f"{base}/404"), ("403", f"{base}/403"), ("500", f"{base}/500"), ("refused", "http://127.0.0.1:9/x")):
    info = asked(lambda system, path: system.info(path), url)
    read = asked(lambda system, path: system.cat_file(path), url)
    print(f"{what:8} info: {info[0]} (cause {info[1]})   cat_file: {read[0]}")
    seen.append((info[0], read[0] == "FileNotFoundError"))
if seen != [("FileNotFoundError", number == 0) for number in range(4)]:
    sys.exit("no longer so: info gave FileNotFoundError for all four, cat_file for the 404 alone")
PYTHON
venv/bin/python -I try.py

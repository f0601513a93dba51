"""TCP ports of this host: read from a word, free or not."""

from __future__ import annotations

import errno
import socket


class PortError(ValueError):
    """A port that cannot be used; the text names the variable that asked for it."""


def read_port(name: str, text: str) -> int:
    """The port that variable `name` holds as `text`. Raises PortError."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise PortError(f"{name}={text}: a port is a number from 1 to 65535")
    return int(text)


def require_free(name: str, port: int, address: str = "") -> None:
    """Raises PortError where nothing can listen on `port` of `address` ("": of all addresses of this host)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is just closing is in nobody's way
        try:
            probe.bind((address, port))
        except OSError as error:
            why = (
                "is in use on this host" if error.errno == errno.EADDRINUSE else f"is not to be had ({error.strerror})"
            )
            raise PortError(f"{name}={port}: the port {why}: end what listens there, or choose another") from None


def any_free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]

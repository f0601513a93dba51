"""Ports: read from words, and whether they are free."""

import socket

import pytest

from pipeline.ranks.ports import PortError, any_free_port, read_port, require_free


def test_a_port_is_read() -> None:
    assert (read_port("PORT", "1"), read_port("PORT", "65535")) == (1, 65535)
    for text in ("abc", "", "0", "65536", "-1", "80.5", "1e3", "²"):
        with pytest.raises(PortError, match=f"PORT={text}: a port is a number from 1 to 65535"):
            read_port("PORT", text)


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_in_use_is_told(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        for asked in ("", "127.0.0.1"):
            with pytest.raises(PortError, match=f"PORT={port}: the port is in use on this host"):
                require_free("PORT", port, asked)
    require_free("PORT", port)
    require_free("PORT", any_free_port())

"""Users and passwords inside URIs: taken out before anything is shown, logged, stored or sent."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO
from urllib.parse import unquote

# `user:password@` in front of a host. A password may hold an @, and, where it should be %2F, a slash.
_USER = re.compile(r"""(?<=://)(?:[^/?#\s'"]*@|[^/?#\s'":@]*:(?!\d{1,5}(?:[/?#]|$))[^\s'"@]*@)""")
# Parameters of presigned and of database URLs; names as S3, Google, Azure, libpq and SQL Server drivers write them.
_PARAMETER = re.compile(
    r"""(?<=[?&;])([\w.-]*(?:passw(?:or)?d|pwd|token|secret|signature|credential|api_?key|accesskeyid)|sig|uid|user)=[^&;\s'"]+""",
    re.IGNORECASE,
)
_SHORTEST = 3  # a password of fewer letters is no good one, and stands in many words


def without_credentials(text: str, *uris: str | None) -> str:
    """`text` with the user and password of each URI in it taken out, and values of secret parameters as `***`.

    A password of `uris` is taken out wherever it stands: libraries repeat it apart from its URI.
    """
    for uri in uris:
        for password in _passwords(uri or ""):
            text = text.replace(password, "***")
    return _PARAMETER.sub(r"\1=***", _USER.sub("", text))


class _Clean:
    """A text stream that writes without credentials, and else is the stream that it was made of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_credentials(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_out_of_output() -> None:
    """From now on nothing that Python writes to stdout or stderr shows credentials: tracebacks and libraries too."""
    sys.stdout, sys.stderr = _Clean(sys.stdout), _Clean(sys.stderr)


def _passwords(uri: str) -> list[str]:
    user = _USER.search(uri)
    secret = user[0][:-1].partition(":")[2] if user else ""
    found = {secret, unquote(secret)}
    return sorted((each for each in found if len(each) >= _SHORTEST), key=len, reverse=True)

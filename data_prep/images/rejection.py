"""Why an image cannot be used, in words."""

import re

REASONS = ("empty", "html", "truncated", "too_small", "too_large", "too_long", "damaged", "undecodable")
WORD = re.compile(r"[^\W\d_]{3}")


class ImageRejected(ValueError):
    """This image cannot be used: `reason` is one of REASONS, `detail` free text, sizes are the source's or None."""

    def __init__(self, reason: str, detail: str, width: int | None = None, height: int | None = None) -> None:
        super().__init__(reason, detail, width, height)  # all of them, or it could not be pickled
        self.reason, self.detail, self.width, self.height = reason, detail, width, height

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def words(error: BaseException) -> str:
    """What a decoder's exception says, in one line and in words: a KeyError's text is a bare number or name."""
    text = " ".join(str(error).split())
    if WORD.search(text) and not isinstance(error, LookupError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

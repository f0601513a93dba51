"""Images that belong to no class: told before the work where listing shows them, and counted after it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.sources.layout import lookalikes, offer_to_rename
from data_prep.storage import DataPrepError

if TYPE_CHECKING:
    from data_prep.sources.chunking import Source


class RejectError(DataPrepError):
    """Too many images are rejected, or the archive is damaged. The work done is kept."""

    exit_code = 3


def offer_of(names: Sequence[str], *, begun: bool = False) -> str:
    """What to say of the images `names` without a class; `begun`: there is a build with other settings."""
    offer = offer_to_rename(lookalikes(names))
    return f"{offer}{' (with --force)' if offer and begun else ''}"


def notes_of_lost(sources: "Sequence[Source]", max_reject: float) -> list[str]:
    """A line for each source with images outside of its classes. Raises RejectError where they alone are more than
    `max_reject` of all, before any image is read.
    """
    notes = []
    for source in sources:
        found = source.lost_images()
        if not found.count:
            continue
        offer = offer_of(found.names)
        text = f"{found.count:,} images of {source.path} lie in no class, such as {found.names[0]}"
        if found.of and found.count / found.of > max_reject:
            raise RejectError(
                f"{text}: {found.count / found.of:.1%} of its {found.of:,} images, more than --max-reject "
                f"{max_reject:.1%} allows: {offer or 'name their folders by WordNet ids, or raise it'}"
            )
        notes.append(f"note: {text}: they are left out{f'; {offer}' if offer else ''}")
    return notes

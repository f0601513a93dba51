"""Images that belong to no class: told before the work where listing shows them, and counted after it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.sources.layout import lookalikes, offer_to_rename, split_of_folder, way_to_class
from data_prep.sources.streams import SourceError
from data_prep.storage import DataPrepError

if TYPE_CHECKING:
    from data_prep.sources.chunking import Source


class RejectError(DataPrepError):
    """Too many images are rejected, or the archive is damaged. The work done is kept."""

    exit_code = 3


def refuse_other_classes(source: "Source", val: set[str], train: set[str]) -> None:
    """Raise SourceError where none of the validation classes of `source` is in train; empty: they are not known yet."""
    if val and train and not val & train:
        raise SourceError(
            f"no usable validation images in {source.path}: none of its {len(val):,} classes, such as {min(val)}, is "
            f"in train, whose first is {min(train)}: give train's own"
        )


def offer_of(names: Sequence[str], *, begun: bool = False) -> str:
    """What to say of the images `names` without a class; `begun`: there is a build with other settings."""
    offer = offer_to_rename(lookalikes(names))
    return f"{offer}{' (with --force)' if offer and begun else ''}"


def notes_of_lost(sources: "Sequence[Source]", max_reject: float) -> list[str]:
    """A line for each source with images outside of its classes. Raises RejectError where they alone are more than
    `max_reject` of all, before any image is read; SourceError, whatever their share, where they may be a split.
    """
    notes = []
    for source in sources:
        found = source.lost_images()
        if not found.count:
            continue
        refuse_lost_split(source, found.names)
        offer = offer_of(found.names)
        text = f"{found.count:,} images of {source.path} lie in no class, such as {found.names[0]}"
        if found.of and found.count / found.of > max_reject:
            raise RejectError(
                f"{text}: {found.count / found.of:.1%} of its {found.of:,} images, more than --max-reject "
                f"{max_reject:.1%} allows: {offer or 'name their folders by WordNet ids, or raise it'}"
            )
        notes.append(f"note: {text}: they are left out{f'; {offer}' if offer else ''}")
    return notes


def refuse_lost_split(source: "Source", names: Sequence[str]) -> None:
    """Raise SourceError where images lie in folders of classes that lie in a folder beside the splits, or in one for a
    split beside classes.
    """
    splits = source.split_folders()
    train = next((name for name in splits if split_of_folder(name) == "train"), "")
    for name in names:
        way = way_to_class(name, rename=True)
        if not way:
            continue
        top = f"{source.path}/{way[0]}"
        if train and not any(split_of_folder(part) for part in way):
            raise SourceError(
                f"{top} holds class folders, and is no split by its name: rename it to val, or give "
                f"--source {source.path}/{train} --val-source {top}"
            )
        if not splits and split_of_folder(way[0]) in ("train", "val"):
            raise SourceError(
                f"{top} holds class folders, and lies beside others: move it out of there, and give it as a source of "
                "its own (--val-source)"
            )

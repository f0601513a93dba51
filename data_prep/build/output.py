"""The output folder of a build: one writer at a time, what is there already, what an interrupted build left."""

import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.build.gather import SHARD_RECORDS
from data_prep.build.lost import RejectError, offer_of
from data_prep.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry, index_path
from data_prep.shards.info import INFO_NAME, info_bytes
from data_prep.sources.layout import is_lost_image
from data_prep.storage import TEMP_MARK, Folder, LostWorkError, is_url
from data_prep.writer import BUILD_FOLDER, BUILD_RECORD, OUR_FILES, ShardError, clear_unfinished

LOST_RECORD = "lost.json"


@dataclass
class BuildResult:
    """`notes` are lines for the user."""

    manifest: Manifest
    already_built: bool
    notes: list[str] = field(default_factory=list)


class Output:
    """The folder (or URL) of a data set, and the folder of unfinished work: OUTPUT/.data_prep, or one inside `work`."""

    def __init__(self, url: str | Path, work: str | Path | None = None):
        self.folder = Folder(url)
        self.work = self.folder.folder(BUILD_FOLDER)
        if work:
            # A folder of our own in there: it is removed at the end, and other builds may use the same --work.
            path = self.folder.url if is_url(url) else os.path.abspath(url)
            self.work = Folder(work).folder(f"data_prep-{hashlib.sha256(path.encode()).hexdigest()[:12]}")

    def __str__(self) -> str:
        return self.folder.url

    def begin(self, name: str, wanted: dict[str, Any], *, force: bool) -> None:
        """Make ready for a build, or for going on with one of the same settings. With `force` it begins anew, but goes
        on with a build that was begun by `force`: the same command finishes that, too.
        """
        identity = {"name": name, "settings": wanted, "force": force}
        if force and self.folder.exists(MANIFEST_NAME):
            self.clear()
        if self.work.exists(BUILD_RECORD):
            there = json.loads(self.work.read(BUILD_RECORD))
            differing = _differing(there["name"], there["settings"], name, wanted)
            usable = not self.work.exists(LOST_RECORD) and there.get("force", False)
            if not differing and (not force or usable):
                self.clear_unfinished()
                return
            if not force:
                raise ShardError(
                    f"{self} holds an unfinished build with other settings: {', '.join(differing)}: give those to "
                    "finish it, --force to begin anew, or another --output"
                )
        foreign = [found for found in self.folder.names() if OUR_FILES.fullmatch(found)]
        if foreign and not self.work.exists(BUILD_RECORD) and not force:
            raise ShardError(
                f"{self} holds {foreign[0]} but neither {MANIFEST_NAME} nor an unfinished build: give --force to "
                "replace such files, or choose another --output"
            )
        self.clear()
        self.work.write(BUILD_RECORD, json.dumps(identity, indent=1).encode())

    def already_built(self, name: str, wanted: dict[str, Any]) -> BuildResult:
        """The finished build. Raises ShardError when it has other settings, or files of it are missing."""
        manifest = Manifest.load(self.folder.url)
        differing = _differing(manifest.name, manifest.settings, name, wanted)
        if differing:
            raise ShardError(
                f"{self} holds a dataset built with other settings: {', '.join(differing)}: "
                "give --force to replace it, or choose another --output"
            )
        for split in manifest.splits.values():
            for entry in [*split.shards, *split.betons]:
                indexed = entry in split.betons or self.folder.exists(str(index_path(entry.file)))
                if self.folder.size(entry.file) != entry.bytes or not indexed:
                    raise ShardError(
                        f"{self.folder.join(entry.file)} or its index is missing or has another size than "
                        f"{MANIFEST_NAME} says: give --force to build the dataset anew (`python -m data_prep index "
                        f"--upgrade {self}` makes an index again)"
                    )
        self._remove_work()  # of a run that was killed between the manifest and the end
        lacks = manifest.format_version < FORMAT_VERSION or not self.folder.exists(INFO_NAME)
        note = f"it lacks what came with format {FORMAT_VERSION}: `python -m data_prep index --upgrade {self}` adds it"
        return BuildResult(manifest, True, [note] if lacks else [])

    def finished_shards(self) -> dict[str, ShardEntry]:
        """Shards that an interrupted run has written."""
        records = self.work.folder(SHARD_RECORDS)
        entries = [ShardEntry.model_validate_json(records.read(name)) for name in records.names("*.json")]
        return {
            entry.file: entry
            for entry in entries
            if self.folder.size(entry.file) == entry.bytes and self.folder.exists(str(index_path(entry.file)))
        }

    def judge(self, chunks: list[str], *, max_reject: float, salvage: bool) -> list[str]:
        """Raise RejectError when the archive is damaged (unless `salvage`), or when the share of rejected images, those
        of no class among them, passes `max_reject`. Returns notes for the user.
        """
        images = rejected = 0
        damage: list[str] = []
        lost: list[str] = []
        reasons: Counter[str] = Counter()
        for name in chunks:
            columns = ["action", "reason", "name", "detail", "sha256"]
            table = pq.read_table(io.BytesIO(self.work.folder("chunks").read(f"{name}.parquet")), columns=columns)
            decoded = pc.and_(pc.is_valid(table.column("sha256")), pc.not_equal(table.column("action"), "skipped"))
            images += pc.sum(decoded).as_py() or 0
            for row in table.filter(pc.equal(table.column("action"), "rejected")).to_pylist():
                if row["reason"] == "damaged_archive":
                    damage.append(f"{row['name']}: {row['detail']}")
                elif row["sha256"] is not None or is_lost_image(row["name"], row["reason"]):
                    rejected += 1
                    reasons[row["reason"]] += 1
                    if row["sha256"] is None:
                        images += 1
                        lost.append(row["name"])
        if damage and not salvage:
            raise RejectError(
                f"the source is damaged in {len(damage)} place(s), first {damage[0]}: fetch it again; or give "
                "--salvage to go on without what cannot be read (what is done is kept)"
            )
        if images and rejected / images > max_reject:
            most = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
            offer = offer_of(lost, begun=True)
            raise RejectError(
                f"{rejected:,} of {images:,} images are rejected ({rejected / images:.1%}: {most}), more than "
                f"--max-reject {max_reject:.1%} allows: {f'{offer}; or ' if offer else ''}look at the source, or raise "
                "it (what is done is kept)"
            )
        offer = offer_of(lost)
        left_out = f"{len(lost):,} images belong to no class and are left out, such as {lost[0]}" if lost else ""
        return [f"{left_out}{f'; {offer}' if offer else ''}"] if lost else []

    def first_reject(self, chunks: list[str], split: str = "train") -> str:
        """Why nothing of a split is usable, by the first example."""
        for name in chunks:
            table = pq.read_table(io.BytesIO(self.work.folder("chunks").read(f"{name}.parquet")))
            for row in table.filter(pc.equal(table.column("split"), split)).slice(0, 1).to_pylist():
                return f"the first file, {row['name']}, is {row['action']}: {row['reason']} {row['detail']}".rstrip()
        return "it holds no files"

    def finish(self, manifest: Manifest) -> None:
        """Write `_info.json` and the manifest, which makes the data set whole; then drop the unfinished work."""
        self.folder.write(INFO_NAME, info_bytes(manifest))
        self.folder.write(MANIFEST_NAME, manifest.to_bytes())
        self._remove_work()

    def lost(self, error: LostWorkError) -> None:
        """Note that the unfinished work is not whole, so that --force does not go on with it."""
        self.work.write(LOST_RECORD, json.dumps({"error": str(error)}).encode())

    def _remove_work(self) -> None:
        # The record first: without it what else is there counts for nothing.
        self.work.remove(BUILD_RECORD)
        self.work.remove_all()

    def clear(self) -> None:
        """Remove what an interrupted or earlier build left. The manifest goes first: without it nothing else counts."""
        self.folder.remove(MANIFEST_NAME)
        self.clear_unfinished()
        for name in self.folder.names():
            if OUR_FILES.fullmatch(name):
                self.folder.remove(name)
        self._remove_work()

    def clear_unfinished(self) -> None:
        """Remove the temporary files of killed runs; only for the sole writer of the folder."""
        if self.folder.is_local:
            clear_unfinished(Path(self.folder.url))
        if self.work.is_local:
            for path in Path(self.work.url).rglob(f".*{TEMP_MARK}*"):
                path.unlink(missing_ok=True)


def _differing(name_there: str, there: dict[str, Any], name_now: str, now: dict[str, Any]) -> list[str]:
    def compared(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        # A source may be moved or renamed: only its content counts.
        content = {key: (settings.get(key) or {}).get("fingerprint", "none") for key in ("source", "val_source")}
        return {"name": name, **settings, **content}

    old, new = compared(name_there, there), compared(name_now, now)
    return [
        f"{key} ({old.get(key)} there, {new.get(key)} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]

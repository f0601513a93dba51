"""The output folder of a build: what is there already, whether what was read is good enough, and the end."""

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.build.lost import RejectError, offer_of
from data_prep.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from data_prep.shards.info import INFO_NAME, info_bytes
from data_prep.sources.layout import is_lost_image
from data_prep.writer import BuildFolder


@dataclass
class BuildResult:
    """`notes` are lines for the user."""

    manifest: Manifest
    already_built: bool
    notes: list[str] = field(default_factory=list)


class Output(BuildFolder):
    """The folder (or URL) of a data set of classified images that is built."""

    def already_built(self, name: str, wanted: dict[str, Any]) -> BuildResult:
        """The finished build. Raises ShardError when it has other settings, or files of it are missing."""
        manifest = Manifest.load(self.folder.url)
        self.refuse_other(manifest.name, manifest.settings, name, wanted)
        advice = f" (`python -m data_prep index --upgrade {self}` makes an index again)"
        for split in manifest.splits.values():
            self.refuse_incomplete(split.shards, indexed=True, advice=advice)
            self.refuse_incomplete(split.betons, indexed=False, advice=advice)
        self.remove_work()  # of a run that was killed between the manifest and the end
        lacks = manifest.format_version < FORMAT_VERSION or not self.folder.exists(INFO_NAME)
        note = f"it lacks what came with format {FORMAT_VERSION}: `python -m data_prep index --upgrade {self}` adds it"
        return BuildResult(manifest, True, [note] if lacks else [])

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
        self.remove_work()

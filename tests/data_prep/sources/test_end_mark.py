"""A source that is cut between two of its files lacks classes or images, and no header tells: its end mark does."""

import gzip
import tarfile
from pathlib import Path

import pytest

from tests.support.archives import WNIDS, archive, class_images, shard, tar_bytes


def before_last(path: Path) -> bytes:
    """A tar up to its last member."""
    with tarfile.open(path) as tar:
        return path.read_bytes()[: tar.getmembers()[-1].offset]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["tars", "folders"])
def test_a_source_without_its_end_is_told(
    tmp_path: Path, kind: str, packed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.tar"
    if kind == "tars":
        archive(whole, 6)
    else:
        whole.write_bytes(tar_bytes({f"{w}/{name}": data for w in WNIDS for name, data in class_images(w, 6).items()}))
    cut = before_last(whole)
    source = tmp_path / ("source.tar.gz" if packed else "source.tar")
    source.write_bytes(gzip.compress(cut) if packed else cut)
    assert shard(source, tmp_path / "set", "--val-per-class", "1") == 3
    said = capsys.readouterr()
    assert "it ends without the zeros that end a tar" in said.out + said.err
    assert shard(source, tmp_path / "set", "--val-per-class", "1", "--salvage") == 0
    assert shard(whole, tmp_path / "whole", "--val-per-class", "1") == 0

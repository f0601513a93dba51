"""What a launch on several hosts hands to its ranks: their command with the resolved configuration, and their
environment, in a folder of the run folder that its owner alone may read.

Nothing of it stands on a command line, where a remote shell would change it, and `ps` show it. (pdsh puts a host's
number in place of %n, a shell takes a & b apart: ranks would train with different configurations.)
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = ".launch"  # of the run folder
VARIABLE = "PIPELINE_HANDOVER"  # the folder, for the rank that removes it
HOSTS_VARIABLE = "PIPELINE_HOSTS"  # their names, in the order of their ranks: "node1:8 node2:8"
_CONFIG, _LAUNCH = "config.yaml", "launch.json"
_VISIBLE_SECONDS = 30.0  # a network file system may show a new folder late
_OLD_SECONDS = 24 * 3600.0


class HandoverError(ValueError):
    """A host that does not find what the launching host has written down for it."""


@dataclass(frozen=True)
class Handover:
    """arguments: of `python -m pipeline`; environment: what each rank has besides its host's own."""

    arguments: list[str]
    environment: dict[str, str]


def write(run_dir: Path, command: str, config: str, options: Sequence[str], environment: Mapping[str, str]) -> Path:
    """Write down a launch: `config` is the resolved one, as YAML. Returns the folder. Raises OSError."""
    above = run_dir.absolute() / FOLDER
    above.mkdir(parents=True, exist_ok=True)
    for old in above.iterdir():  # of launches that were killed before their ranks met
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(old)
    try:
        folder = Path(tempfile.mkdtemp(dir=above))  # for its owner alone
    except FileNotFoundError:  # another launch has just removed what was empty
        above.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=above))
    (folder / _CONFIG).write_text(config, encoding="utf-8")
    handover = Handover([command, str(folder / _CONFIG), *options], {**environment, VARIABLE: str(folder)})
    temporary = folder / f"{_LAUNCH}.part"
    temporary.write_text(json.dumps(asdict(handover)), encoding="utf-8")
    temporary.rename(folder / _LAUNCH)
    return folder


def read(folder: Path, seconds: float = _VISIBLE_SECONDS) -> Handover:
    """What `write` left; waits for it. Raises HandoverError."""
    until = time.monotonic() + seconds
    while True:
        try:
            return Handover(**json.loads((folder / _LAUNCH).read_text(encoding="utf-8")))
        except FileNotFoundError:
            if time.monotonic() > until:
                raise HandoverError(
                    f"{os.uname().nodename} does not see {folder}, which the launching host has written: output_root "
                    f"has to be on a file system that all hosts share, at the same path"
                ) from None
            time.sleep(0.5)
        except (OSError, ValueError, TypeError) as error:
            raise HandoverError(f"{os.uname().nodename} cannot read {folder / _LAUNCH}: {error}") from None


def run_dir_of(folder: Path) -> Path:
    """The run folder that a launch is written down in."""
    return folder.parent.parent


def remove(folder: Path) -> None:
    """All ranks have read it, or none is left."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def as_word(folder: Path) -> str:
    """A path as one word that no shell and no launcher reads anything into."""
    return base64.urlsafe_b64encode(os.fsencode(folder)).decode()


def from_word(word: str) -> Path:
    """The path that `as_word` was given."""
    return Path(os.fsdecode(base64.urlsafe_b64decode(word)))

"""What the webdataset library opens: its lists of URLs, its `gopen`, its file cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

import fsspec
from webdataset.cache import FileCache
from webdataset.gopen import Pipe, gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from data_prep.credentials import without_credentials
from pipeline.config.data import Data
from pipeline.config.sections import ConfigError
from pipeline.data.shards import DataError

# gopen's own way to s3:// and the like is none: fsspec has them, where the folders of indexed sets are read too.
_BY_FSSPEC = ("s3", "s3a", "az", "abfs", "abfss", "gcs", "hdfs", "webhdfs", "oss", "memory")
_TAR = re.compile(r"([^/\s'\"]+\.(?:tar|tgz)(?:\.\w+)?)", re.IGNORECASE)


def _open_by_fsspec(url: str, *_: Any) -> BinaryIO:
    return cast(BinaryIO, fsspec.open(url, "rb").open())


for _scheme in _BY_FSSPEC:
    gopen_schemes.setdefault(_scheme, _open_by_fsspec)


def expand(key: str, spec: str) -> tuple[str, ...]:
    """The shards of webdataset's list of URLs: joined by ::, with braces. Raises ConfigError, which names `key`."""
    try:
        urls = tuple(os.path.expanduser(url) for url in expand_urls(spec))
    except (AssertionError, ValueError) as error:  # a WDS_ variable that is not set, braces that do not close
        raise ConfigError(f"{key} {without_credentials(spec)}: {error}") from None
    twice = next((url for url in urls if urls.count(url) > 1), None) if len(set(urls)) < len(urls) else None
    glob = next((url for url in urls if "*" in url and not url.startswith("pipe:")), None)
    if glob is not None:
        raise ConfigError(
            f"{key} {without_credentials(glob)}: a stream takes no *: name the shards by braces, as "
            "NAME-{000000..000123}.tar, or give their folder"
        )
    if twice is not None:
        raise ConfigError(f"{key} names {without_credentials(twice)} twice: name each shard once")
    return urls


def shard_name(url: str) -> str:
    """The file name in a URL: of `pipe:aws s3 cp s3://bucket/in22k-000000.tar -` it is in22k-000000.tar."""
    return (_TAR.findall(url) or [url.rpartition("/")[2] or url])[-1]


def beside(url: str, name: str) -> str | None:
    """The URL of another file in the folder of a shard; None where the URL does not show one."""
    places = list(_TAR.finditer(url))
    return url[: places[-1].start()] + name + url[places[-1].end() :] if places else None


def open_url(url: str) -> BinaryIO:
    """A shard as a stream, by webdataset's `gopen`. Raises DataError, in which the shard is named."""
    try:
        stream = gopen(url)
    except Exception as error:  # each way has its own
        raise unopened(url, error) from None
    return cast(BinaryIO, _Command(stream) if isinstance(stream, Pipe) else stream)


class _Command:
    """What a command writes, and whether it has failed, told when all of it was read.

    webdataset 1.0.2 looks at each read whether the command has ended, and throws away what it has just read where that
    failed: how many samples come before the error is chance, and so is whether there is one.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._pipe.stream.read(size))
        if size and not data:
            status = self._pipe.proc.wait()
            if status not in self._pipe.ignore_status:
                command = (self._pipe.args[0][0] if isinstance(self._pipe.args[0][0], str) else "curl").split()[0]
                raise OSError(f"the command that reads it has failed: {command}, exit code {status}")
        return data

    def close(self) -> None:
        self._pipe.close()


def unopened(url: str, error: BaseException) -> DataError:
    """The error of a shard that cannot be opened, or read on."""
    text = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"shard {without_credentials(url)} cannot be read: {without_credentials(text)}")


def read_json(url: str) -> Any:
    """A small JSON file. Raises DataError; FileNotFoundError where there is none, as far as that can be told."""
    if url.startswith("pipe:"):  # that there may be none is no news
        url = f"pipe:({url.removeprefix('pipe:')}) 2>/dev/null"
    try:
        with closing(open_url(url)) as stream:
            data = stream.read()
    except (OSError, DataError) as error:
        raise FileNotFoundError(str(error)) from None
    try:
        return json.loads(data)
    except ValueError as error:
        if not data.strip():  # curl and shells write nothing where they fail
            raise FileNotFoundError(url) from None
        raise DataError(f"{without_credentials(url)} is no JSON ({error}): write it again, or remove it") from None


class Opener:
    """Opens shards; with data.stream_cache those that are not local by way of webdataset's cache of files.

    That names its files by the last part of a URL: shards of one name in two folders would be one file. Here names
    have a digest of the whole, and one thread of a process fetches a shard that several want.
    """

    def __init__(self, data: Data) -> None:
        self._cache: Callable[[str], str] | None = None
        self._fetching = threading.Lock()
        self._folder = data.cache_folder.expanduser() / "stream" if data.stream_cache else None
        if self._folder is not None:
            self._cache = FileCache(
                str(self._folder), url_to_name=_cache_name, validator=None, cache_size=int(data.cache_gb * 1e9)
            ).get_file

    def __call__(self, url: str) -> BinaryIO:
        """A shard from its beginning. Raises DataError."""
        if self._cache is None or is_local(url):
            return open_url(url)
        try:
            with self._fetching:
                path = self._cache(url)
            return open(path, "rb")
        except Exception as error:  # each way has its own
            raise unopened(url, error) from None

    def forget(self, url: str) -> None:
        """What is kept of a shard is not whole: the next that wants it fetches it anew."""
        if self._folder is not None and not is_local(url):
            (self._folder / _cache_name(url)).unlink(missing_ok=True)


def _cache_name(url: str) -> str:
    return f"{hashlib.sha256(without_credentials(url).encode()).hexdigest()[:16]}-{shard_name(url)}"


def is_local(url: str) -> bool:
    """Whether a shard is a file here."""
    return urlparse(url).scheme in ("", "file")


def names(urls: Sequence[str]) -> tuple[str, ...]:
    """The file names of shards, in their order."""
    return tuple(map(shard_name, urls))

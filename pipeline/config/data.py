"""The section `data` of a configuration: which sets, read how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_serializer, model_validator

from data_prep.credentials import without_credentials
from pipeline.config.fields import (
    Count,
    DatasetPath,
    LocalText,
    Positive,
    Section,
    StreamPath,
    is_stream_of_urls,
)


class MixedSet(Section):
    """One of several data sets, and its share of the samples in relation to the others'."""

    path: DatasetPath
    weight: Positive

    _no_credentials = field_serializer("path")(without_credentials)


class Data(Section):
    """Which shards, read how."""

    path: Annotated[
        Annotated[DatasetPath, Tag("path")] | Annotated[tuple[MixedSet, ...], Field(min_length=2), Tag("sets")],
        Discriminator(lambda value: "sets" if isinstance(value, list | tuple) else "path"),
    ] = Field(
        description="folder or fsspec URL (s3://bucket/in22k) made by `python -m data_prep shard`, or of plain "
        "WebDataset tars indexed by `python -m data_prep index`; or several: [{path: data/in22k, weight: 0.7}, "
        "{path: data/own, weight: 0.3}]"
    )
    format: Literal["webdataset", "ffcv"] = Field(description="which files of that folder to read")
    reader: Literal["indexed", "stream"] = Field(
        default="indexed",
        description="of webdataset shards. indexed: each sample by a seek, exactly shuffled; stream: from end to end "
        "by the webdataset library, for tars that cannot be indexed or sought in: path is then a folder, or "
        "webdataset's URLs, as pipe:aws s3 cp s3://bucket/in22k-{000000..001419}.tar -",
    )
    stream_val: StreamPath | None = Field(
        default=None, description="with stream, where path is not a folder: URLs of the validation shards; null: none"
    )
    stream_classes: LocalText | None = Field(
        default=None,
        description="with stream: WordNet ids in the order of the class numbers, as init.label_space takes them: "
        "fall11, a text file, ...; null: the folder says them",
    )
    stream_samples_per_epoch: Count | None = Field(
        default=None, description="with stream: training samples of an epoch; null: _info.json beside the shards says"
    )
    stream_shuffle_samples: Count = Field(
        default=1000, description="with stream: samples of each lane that are shuffled, and held in memory, at a time"
    )
    stream_cache: bool = Field(
        default=False, description="with stream: keep shards that are not local in cache_folder, up to cache_gb"
    )
    resolution: Count = Field(description="side of the square input, pixels; a multiple of 32")
    resolution_by_epoch: dict[Annotated[int, Field(ge=0)], Count] | None = Field(
        description="progressive resolution, {0: 160, 30: 224}: from that epoch on; ends at data.resolution, at which "
        "is evaluated. null: data.resolution throughout"
    )
    workers_per_rank: Annotated[int, Field(ge=0)] = Field(
        description="per rank; 0: the rank itself. webdataset with augment.where=host: processes; else, and in "
        "evaluation, threads of one data process"
    )
    shuffle_lanes: Count = Field(
        description="equal parts of each global batch, each read from shards of its own: nodes whose number divides "
        "it share no shard; see pipeline/data/order.py"
    )
    shuffle_window_shards: Count = Field(description="shards that a lane is shuffled over at a time")
    on_bad_sample: Literal["raise", "skip"] = Field(
        description="a training image that does not decode. skip: another takes its place; RUN/bad_samples/ lists it",
    )
    bad_samples_max: Annotated[int, Field(ge=0)] = Field(
        description="with skip: the run ends when an epoch has had more than these, over all ranks"
    )
    cache_folder: Path = Field(  # a ~ is read on the host that caches
        default=Path("~/.cache/hornet-pretraining/shards"),
        description="where shards of a remote path are kept, per host",
    )
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        default=100.0, description="bound of that folder, 10^9 bytes; what does not fit is read by ranged requests"
    )
    ffcv_cache: Literal["auto", "os", "process"] = Field(
        default="auto",
        description="os: the .beton is mapped, pages are shared by ranks and kept by the system; process: each rank "
        "reads whole pages ahead into its own memory; auto: os where the file fits into RAM",
    )

    @field_serializer("path", "stream_val")
    def _no_credentials(self, path: Any) -> Any:
        if isinstance(path, tuple):
            return [each.model_dump(mode="json") for each in path]
        return path and without_credentials(path)

    @property
    def sets(self) -> tuple[MixedSet, ...]:
        """The data sets of `path`; one where it is a text."""
        return (MixedSet(path=self.path, weight=1.0),) if isinstance(self.path, str) else self.path

    @property
    def folder(self) -> str:
        """`path` where it is one: what several cannot be is refused before."""
        assert isinstance(self.path, str)
        return self.path

    @property
    def shown_path(self) -> str:
        """`path` for messages."""
        return " + ".join(each.path for each in self.sets)

    @property
    def how_to_check(self) -> str:
        """What to do where images or shards are bad, for messages."""
        if self.reader == "stream":
            return "copy their shards again"
        return "to check: " + ", ".join(f"`python -m data_prep verify {each.path}`" for each in self.sets)

    @property
    def is_remote(self) -> bool:
        return any("://" in each.path for each in self.sets)

    @property
    def largest_resolution(self) -> int:
        """The side of the largest training images of the run, pixels."""
        return max((self.resolution_by_epoch or {0: self.resolution}).values())

    def resolution_at(self, epoch: int) -> int:
        """The side of training images in `epoch`, pixels."""
        stages = self.resolution_by_epoch or {0: self.resolution}
        return stages[max(start for start in stages if start <= epoch)]

    @model_validator(mode="after")
    def _resolutions_fit_the_strides(self) -> Data:
        stages = self.resolution_by_epoch
        sides = {"data.resolution": self.resolution}
        sides |= {f"data.resolution_by_epoch, epoch {epoch}:": side for epoch, side in (stages or {}).items()}
        for name, side in sides.items():
            if side % 32:
                raise ValueError(
                    f"{name} {side} is not a multiple of 32, HorNet's total stride; "
                    f"nearest: {max(32, round(side / 32) * 32)}"
                )
        if stages is not None and (0 not in stages or stages[max(stages)] != self.resolution):
            raise ValueError(
                f"data.resolution_by_epoch {stages} must begin at epoch 0 and end at data.resolution {self.resolution}"
            )
        return self

    @model_validator(mode="after")
    def _stream_keys_fit(self) -> Data:
        streamed = self.reader == "stream"
        if not isinstance(self.path, str):
            if streamed or self.format == "ffcv":
                key = "data.reader=stream" if streamed else "data.format=ffcv"
                raise ValueError(
                    f"data.path lists {len(self.path)} sets, which are mixed by seeks into webdataset shards: take one "
                    f"of them, or leave {key}"
                )
            paths = [each.path for each in self.path]
            if len(set(paths)) < len(paths):
                raise ValueError("data.path lists a set twice: list it once, with the sum of the weights")
            return self
        if streamed and self.format == "ffcv":
            raise ValueError("data.reader stream reads tars: set data.format=webdataset, or data.reader=indexed")
        urls = is_stream_of_urls(self.path)
        if urls and not streamed:
            raise ValueError(
                f"data.path {without_credentials(self.path)} is a list of shards: set data.reader=stream, or give the "
                f"folder they lie in"
            )
        for key in ("stream_val", "stream_classes", "stream_samples_per_epoch"):
            if not streamed and getattr(self, key) is not None:
                raise ValueError(f"data.{key} is for data.reader=stream, which is {self.reader}: set one of the two")
        if not urls and (self.stream_val is not None or self.stream_samples_per_epoch is not None):
            raise ValueError(
                "data.stream_val and data.stream_samples_per_epoch are for URLs of shards in data.path: a folder says "
                "itself what is in it; set both to null"
            )
        if urls and self.stream_classes is None:
            raise ValueError(
                "data.stream_classes is needed where data.path is a list of shards: a file with a WordNet id a line in "
                "the order of the class numbers, or a name of `python -m data_prep labels --list`"
            )
        return self

    @model_validator(mode="after")
    def _ffcv_reads_local_files(self) -> Data:
        if self.format == "ffcv" and self.is_remote:
            raise ValueError(
                f"data.format ffcv reads local files, data.path is {self.path}: copy the .beton to a local folder, or "
                f"set data.format=webdataset"
            )
        return self

"""The sections of a configuration: every key with its type, its bounds, and its relations to those beside it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)

from data_prep.credentials import without_credentials
from pipeline.config.fields import (
    Count,
    DatasetPath,
    Fraction,
    LocalPath,
    LocalText,
    Positive,
    StreamPath,
    is_stream_of_urls,
)


class ConfigError(ValueError):
    """The configuration cannot be run. The message names the file and key, and what to change."""


class Section(BaseModel):
    # Deferred: sections are built as parts of Config, and then only where a configuration is loaded.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


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


class Augment(Section):
    """Training augmentation, in timm's terms."""

    where: Literal["host", "device"] = Field(
        description="host: timm's transforms on PIL images in data workers; device: workers decode, crop and mirror, "
        "the rest runs batched on the accelerator"
    )
    repeats: Count = Field(description="repeated augmentation: views of each sample in a row; 1: none")
    crop_area_min: Fraction = Field(description="random-resized crop: smallest share of the image's area")
    horizontal_flip: Fraction
    rand_augment: str | None = Field(description="timm's RandAugment string, or null")
    color_jitter: Annotated[float, Field(ge=0)] = Field(
        description="used only where rand_augment is null (as timm does)"
    )
    random_erasing: Fraction
    interpolation: Literal["bicubic", "bilinear"]
    mixup_alpha: Annotated[float, Field(ge=0)]
    cutmix_alpha: Annotated[float, Field(ge=0)]
    label_smoothing: Fraction


Checkpointing = Literal["none", "selective", "selective_mlp", "block", "stage"]
_STAGES = 4


def _one_or_one_a_stage(value: Any) -> Any:
    known = get_args(Checkpointing)
    given = [value] if isinstance(value, str) else value
    fits = isinstance(given, list | tuple) and len(given) in (1, _STAGES)
    if not fits or any(each not in known for each in given):
        raise ValueError(
            f"model.checkpointing {value!r}: one of {', '.join(known)}, or a list of {_STAGES} of them, one a stage"
        )
    return given[0] if len(given) == 1 else tuple(given)


# What pipeline/models/variants.py registers with timm, whose import takes seconds that a wrong name need not wait for.
MODELS = (
    *("hornet_nano_gf", "hornet_tiny_7x7", "hornet_tiny_gf", "hornet_small_7x7", "hornet_small_gf", "hornet_base_7x7"),
    *("hornet_base_gf", "hornet_base_gf_img384", "hornet_large_7x7", "hornet_large_gf", "hornet_large_gf_img384"),
)


class Model(Section):
    """A model of timm's registry and what to build it with."""

    name: str
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]
    layer_scale_init: Positive
    checkpointing: Annotated[Checkpointing | tuple[Checkpointing, ...], BeforeValidator(_one_or_one_a_stage)] = Field(
        description="what is kept for the backward pass, of all stages or a list of four. selective: outputs of matrix "
        "products and convolutions; selective_mlp: without the MLP's hidden layer (11 % more FLOPs); block, stage: "
        "inputs of each block or of the stage (33 % more)"
    )
    compile: bool = Field(description="torch.compile each block; minutes at the start, and a C++ compiler on the host")

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in MODELS:
            near = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"model.name {name!r} is not known; {hint}There are {', '.join(MODELS)}")
        return name


class Optimizer(Section):
    """AdamW and its schedule: linear warm-up, then cosine, per step."""

    lr_peak: Positive = Field(description="learning rate at the end of warm-up, for the global batch as it is")
    lr_final: Annotated[float, Field(ge=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="not applied to biases, norms and layer scales")
    betas: tuple[Fraction, Fraction]
    eps: Positive
    clip_grad_norm: Annotated[float, Field(ge=0)] = Field(
        description="L2 norm bound of the accumulated gradient; 0: none"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        description="learning rate factor per layer; null: none"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(description="per step; null: no EMA")


class Train(Section):
    """How long, in which pieces."""

    epochs: Count
    global_batch: Count = Field(description="images per optimizer step, over all ranks and accumulation steps")
    micro_batch: Count = Field(description="images per rank and forward pass; accumulation follows from it")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="bf16: autocast over fp32 weights; auto: bf16 on a GPU, fp32 on a CPU"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        description="DeepSpeed ZeRO stage: what ranks share instead of each holding it. 0: nothing, 1: optimizer state "
        "and EMA, 2: gradients too, 3: weights too"
    )

    @model_validator(mode="after")
    def _batches_divide(self) -> Train:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch {self.global_batch} is not divisible by train.micro_batch {self.micro_batch}"
            )
        return self

    def bf16_on(self, device_type: str) -> bool:
        """Whether a "cuda" or "cpu" runs under bf16 autocast; weights, gradients and optimizer state stay fp32."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")

    def accumulation_steps(self, ranks: int) -> int:
        """Forward passes per optimizer step on each of `ranks` ranks. Raises ConfigError where that is not whole."""
        if self.global_batch % (ranks * self.micro_batch):
            raise ConfigError(
                f"train.global_batch {self.global_batch} is not divisible by {ranks} ranks x train.micro_batch "
                f"{self.micro_batch} = {ranks * self.micro_batch}; change one of them"
            )
        return self.global_batch // (ranks * self.micro_batch)


class Evaluate(Section):
    """Accuracy over the validation split, every image once."""

    every_epochs: Count | None = Field(description="and after the last one; null: never, for sets without validation")
    micro_batch: Count
    resize: Literal["crop", "warp"] = Field(
        description="crop: shorter side to resolution / crop_ratio, then the centre; warp: whole image to the square"
    )
    crop_ratio: Annotated[float, Field(gt=0, le=1)]


class Init(Section):
    """Where the weights come from before the first step."""

    checkpoint: LocalPath | None = Field(
        description="a run folder, one of its checkpoints, or a weight file; null: random"
    )
    weights: Literal["ema", "model"] = Field(
        default="ema",
        description="which of the two, where both are there; a file with `model` alone serves for ema too",
    )
    label_space: LocalText = Field(
        default="checkpoint",
        description="classes of the loaded head; checkpoint: as our checkpoints say; none: keep the fresh head; else "
        "published-22k, another name that `python -m data_prep labels` knows, a data set, or a text file with a "
        "WordNet id a line",
    )


class Guard(Section):
    """Steps that would harm the weights, and ranks that hang."""

    mode: Literal["off", "skip", "rewind"] = Field(
        description="skip: no update from a step whose loss or gradient is not finite or a spike; rewind: and after "
        "steps_in_a_row of them, back to the weights of the last checkpoint, past those batches"
    )
    window_steps: Annotated[int, Field(ge=20)] = Field(description="steps that a spike is measured against")
    z_max: Positive = Field(description="a spike is more than these robust standard deviations above the median")
    steps_in_a_row: Count = Field(
        description="left out one after the other: rewind; with skip, and off (not finite ones), end the run"
    )
    rewinds_max: Annotated[int, Field(ge=0)] = Field(description="with rewind: one more ends the run")
    stall_seconds: Positive = Field(
        description="a rank without any progress for so long: every rank writes its stacks, and the run ends"
    )


class Checkpoint(Section):
    """When to write what an interrupted run continues from, and what to keep."""

    every_steps: Count = 1000
    keep_last: Count = 2
    keep_every_steps: Count | None = Field(default=None, description="kept for good: steps divisible by this")
    best_metric: Literal["top1", "top5", "val_loss"] | None = Field(
        default=None, description="the best so far is written at its evaluation, and kept"
    )


class Tracking(Section):
    """Logging and MLflow."""

    log_every_steps: Count = 50
    experiment: str = "hornet"
    uri: str | None = Field(
        default=None,
        description="MLflow tracking URI; null: MLFLOW_TRACKING_URI, and without that the SQLite file mlflow.db in "
        "output_root",
    )

    @field_serializer("uri")
    def _no_credentials(self, uri: str | None) -> str | None:
        return uri and without_credentials(uri)

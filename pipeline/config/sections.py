"""The sections of a configuration but for `data` (data.py): every key with its type, its bounds, its relations."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from data_prep.credentials import without_credentials
from pipeline.config.fields import Count, Fraction, LocalPath, LocalText, Positive, Section


class ConfigError(ValueError):
    """The configuration cannot be run. The message names the file and key, and what to change."""


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


class Backbone(Section):
    """A model of timm's registry and what to build it with."""

    name: str
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]
    layer_scale_init: Positive
    checkpointing: Annotated[Checkpointing | tuple[Checkpointing, ...], BeforeValidator(_one_or_one_a_stage)] = Field(
        description="what is kept for the backward pass, of all stages or a list of four. selective: outputs of matrix "
        "products and convolutions; selective_mlp: without the MLP's hidden layer (11 % more FLOPs); block, stage: "
        "inputs of each block or of the stage (33 % more)"
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in MODELS:
            near = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"model.name {name!r} is not known; {hint}There are {', '.join(MODELS)}")
        return name


class Model(Backbone):
    """A net that classifies."""

    compile: bool = Field(description="torch.compile each block; minutes at the start, and a C++ compiler on the host")
    cuda_graphs: bool = Field(
        default=False,
        description="on a GPU, forward and backward of a micro-batch as one CUDA graph each: what a host too slow to "
        "launch the kernels gains by",
    )


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
        description="a run folder, one of its checkpoints, a weight file, a folder that timm reads, or of MLflow "
        "models:/NAME@best, models:/NAME/3, runs:/ID; null: random"
    )
    weights: Literal["ema", "model"] = Field(
        default="ema",
        description="which of the two, where both are there; a file with `model` alone serves for ema too",
    )
    label_space: LocalText = Field(
        default="checkpoint",
        description="classes of the loaded head; checkpoint: as it says, or a file by the number of its rows; none: "
        "keep the fresh head; else published-22k, another name that `python -m data_prep labels` knows, a data set, or "
        "a text file with a WordNet id a line",
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
    best_metric: Literal["top1", "top5", "miou", "box_ap", "mask_ap", "val_loss"] | None = Field(
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

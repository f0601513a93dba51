"""What GPUs and links could give, from data sheets; and what was measured on them, where a file says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.sections import ConfigError
from pipeline.records.flops import listed_fp32_peak, listed_peak

GB, GIB = 1e9, 2**30
RATES_FILE = Path(__file__).parents[2] / "tests" / "gpu" / "gpu_rates.json"
_Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Gpu:
    """One kind. `driver_name`: as records/flops.py looks up its peak; `memory`: bytes that the driver leaves; rates in
    bytes/s: of its memory, of one direction to its neighbours in the node, of its share of the node's network.
    """

    kind: str
    driver_name: str
    memory: int
    memory_rate: float
    node_rate: float
    network_rate: float
    per_node: int = 8

    @property
    def has_kernels(self) -> bool:
        """Whether our Triton kernels run there: sm_80 and later."""
        return self.kind != "v100"

    def peak_flops(self, bf16: bool) -> float:
        """FLOP/s of the data sheet, dense."""
        found = listed_peak(self.driver_name, bf16)
        assert found is not None, self.driver_name
        return found

    @property
    def fp32_flops(self) -> float:
        """FLOP/s of its plain fp32 units, where depthwise convolutions run."""
        found = listed_fp32_peak(self.driver_name)
        assert found is not None, self.driver_name
        return found


# Memory as nvidia-smi shows it, GiB; TB/s of it; GB/s to the neighbours, one direction: NVLink's, or PCIe's less its
# overhead; Gbit/s of network a GPU, as nodes are commonly built (DGX and HGX: a 400 or 200 Gbit/s port a GPU).
# Source: NVIDIA's data sheets of each product, and of DGX A100, H100, H200, B200 and GB200 NVL72.
_KINDS: tuple[tuple[str, str, float, float, float, float, int], ...] = (
    ("h100", "NVIDIA H100 80GB HBM3", 79.1, 3.35, 450, 400, 8),
    ("h100-pcie", "NVIDIA H100 PCIe", 79.1, 2.0, 50, 200, 8),
    ("h200", "NVIDIA H200", 139.8, 4.8, 450, 400, 8),
    ("gh200", "NVIDIA GH200 480GB", 95.0, 4.0, 50, 200, 1),
    ("b200", "NVIDIA B200", 178.3, 7.7, 900, 400, 8),
    ("gb200", "NVIDIA GB200", 184.0, 8.0, 900, 400, 4),
    ("a100", "NVIDIA A100-SXM4-80GB", 79.3, 2.04, 300, 200, 8),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", 39.4, 1.56, 300, 200, 8),
    ("l40s", "NVIDIA L40S", 44.4, 0.864, 25, 100, 8),
    ("l4", "NVIDIA L4", 22.0, 0.3, 12, 25, 8),
    ("a10", "NVIDIA A10", 22.1, 0.6, 25, 25, 4),
    ("v100", "Tesla V100-SXM2-32GB", 31.7, 0.9, 150, 25, 8),
)
GPUS: Mapping[str, Gpu] = {
    kind: Gpu(kind, name, round(gib * GIB), tbs * 1e12, node * GB, gbps / 8 * GB, per_node)
    for kind, name, gib, tbs, node, gbps, per_node in _KINDS
}


def gpu(kind: str) -> Gpu:
    """Raises ConfigError for one that the table lacks."""
    found = GPUS.get(kind.lower())
    if found is None:
        raise ConfigError(f"--gpu {kind!r} is not known: there are {', '.join(GPUS)}")
    return found


class _Measured(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainRate(_Measured):
    """Images/s of one GPU in whole training steps, waiting for no data."""

    model: str
    resolution: int
    policy: str  # model.checkpointing; a list's joined by commas
    precision: Literal["bf16", "fp32"]
    images_per_second: _Positive
    micro_batch: int | None = None


class GpuRates(_Measured):
    """What was measured on one kind of GPU."""

    gpu: str
    gemm_tflops: dict[Literal["bf16", "tf32", "fp32"], _Positive] = {}
    train: list[TrainRate] = []
    all_reduce_gbs: dict[int, _Positive] = Field(
        default={}, description="by number of GPUs: bus bandwidth as nccl-tests prints it, GB/s"
    )

    def train_rate(self, model: str, resolution: int, policy: str, precision: str) -> float | None:
        """The measured images/s of this net, if it was; the fastest where there are several."""
        wanted = (model, resolution, policy, precision)
        found = [
            each.images_per_second
            for each in self.train
            if (each.model, each.resolution, each.policy, each.precision) == wanted
        ]
        return max(found, default=None)


class RatesFile(_Measured):
    """The whole file, JSON or YAML: {"gpus": [{"gpu": "h200", "gemm_tflops": {"bf16": 780}, "train": [...],
    "all_reduce_gbs": {"8": 360}}]}.
    """

    gpus: list[GpuRates]


def measured(path: Path | None, kind: str) -> GpuRates | None:
    """What the file says of this kind, None where nothing; with no `path`, tests/gpu's own where there is one.

    Raises ConfigError where the file cannot be read or is not of the schema.
    """
    chosen = path if path is not None else RATES_FILE if RATES_FILE.exists() else None
    if chosen is None:
        return None
    try:
        text = chosen.read_text(encoding="utf-8")
        tree = json.loads(text) if chosen.suffix == ".json" else yaml.safe_load(text)
        known = RatesFile.model_validate(tree)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gpu-rates {chosen} cannot be read: {error}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the whole"
        raise ConfigError(
            f"--gpu-rates {chosen}: {where}: {fault['msg'].lower()}; `python -m pipeline plan --help` shows one"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        what = "JSON" if chosen.suffix == ".json" else "YAML"
        raise ConfigError(f"--gpu-rates {chosen} is not valid {what}: {' '.join(str(error).split())}") from None
    unknown = [each.gpu for each in known.gpus if each.gpu not in GPUS]
    if unknown:
        raise ConfigError(f"--gpu-rates {chosen}: gpu {unknown[0]!r} is not known: there are {', '.join(GPUS)}")
    return next((each for each in known.gpus if each.gpu == kind), None)

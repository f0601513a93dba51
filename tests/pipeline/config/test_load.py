"""Configuration: the shipped files are complete and run, mistakes are one clear line."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.kinds import load_any
from pipeline.config.load import Config, known_keys, load
from pipeline.config.sections import Checkpointing, ConfigError
from pipeline.dense.segmentor import Segmentor
from pipeline.detection.detector import build_detector
from pipeline.models.build import build_model
from pipeline.models.stage import POLICIES
from tests.support.runs import ROOT

DENSE = sorted((ROOT / "configs").glob("*segment*.yaml"))
DETECT = sorted((ROOT / "configs").glob("*detect*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*DENSE, *DETECT})
DEMO = ROOT / "configs" / "demo_pretrain.yaml"
# Published settings by file: lr, weight decay, clip, drop path, epochs, batch, layer decay, EMA.
PUBLISHED = {
    "pretrain_hornet_l_in22k_384": (4e-3, 0.1, 5, 0.2, 90, 4096, None, None),
    "pretrain_hornet_l_in22k_224": (4e-3, 0.1, 5, 0.2, 90, 4096, None, None),
    "pretrain_hornet_l_gf_in22k_224": (4e-3, 0.1, 1, 0.2, 90, 4096, None, None),
    "finetune_hornet_l_in1k_384": (5e-5, 1e-8, 1, 0.4, 30, 512, 0.7, 0.9999),
    "finetune_hornet_l_gf_in1k_384": (5e-5, 1e-8, 1, 0.4, 30, 512, 0.7, 0.9999),
}


def flat_keys(tree: dict, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    """Complete (no key left to a default), valid, read back equal, and the model they name can be built."""
    assert flat_keys(yaml.safe_load(path.read_text())) == set(known_keys())
    config = load(path)
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config
    with torch.device("meta"):
        model = build_model(config.model, 21_841, config.data.resolution)
    if "hornet_l" in path.stem:
        assert sum(p.numel() for p in model.parameters()) > 190e6
        with torch.device("meta"):
            logits = model.eval()(torch.empty(1, 3, config.data.resolution, config.data.resolution))
        assert logits.shape == (1, 21_841)
    for ranks in (2,) if "demo" in path.stem else (8, 16, 32):
        assert config.train.accumulation_steps(ranks) >= 1


@pytest.mark.parametrize("path", DENSE, ids=lambda path: path.stem)
def test_shipped_segmentations(path: Path) -> None:
    """As the classifications; with the published settings that all sizes share."""
    assert flat_keys(yaml.safe_load(path.read_text())) == set(known_keys(SegmentConfig))
    config = load(path, [], SegmentConfig)
    assert load_any(path) == config
    assert SegmentConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
    for ranks in (2,) if "demo" in path.stem else (1, 2, 4, 8):
        assert config.train.accumulation_steps(ranks) >= 1
    if "demo" in path.stem:
        return
    o, a = config.optimizer, config.augment
    assert (o.lr_peak, o.weight_decay, o.betas, config.train.global_batch) == (1e-4, 0.05, (0.9, 0.999), 16)
    queries = config.model.head == "mask2former"
    share = 1.0 if queries else 0.75
    assert (a.scale_min, a.scale_max, a.class_share_max, a.horizontal_flip) == (0.5, 2.0, share, 0.5)
    assert (config.model.head_channels, config.model.auxiliary_weight) == ((256, 0.0) if queries else (512, 0.4))
    assert abs(config.train.epochs * (20_210 // 16) - 160_000) < 1000
    assert config.evaluate.stride_px == config.data.resolution * 2 // 3
    with torch.device("meta"):
        net = Segmentor(config.model, 150, config.data.resolution).eval()
        logits = net(torch.empty(1, 3, 512, 512))
    assert logits.shape == ((1, 150, 512, 512) if queries else (1, 150, 128, 128))


@pytest.mark.parametrize("path", DETECT, ids=lambda path: path.stem)
def test_shipped_detections(path: Path) -> None:
    """As the classifications; with the settings that the published recipe and ours share."""
    assert flat_keys(yaml.safe_load(path.read_text())) == set(known_keys(DetectConfig))
    config = load(path, [], DetectConfig)
    assert load_any(path) == config
    assert DetectConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
    for ranks in (2,) if "demo" in path.stem else (1, 2, 4, 8):
        assert config.train.accumulation_steps(ranks) >= 1
    if "demo" not in path.stem:
        assert (config.train.global_batch, config.optimizer.lr_peak, config.model.channels) == (16, 1e-4, 256)
        with torch.device("meta"):
            net = build_detector(config.model, 80, config.data.resolution)
        assert sum(p.numel() for p in net.parameters()) > 200e6
    if "cascade" in path.stem:
        o = config.optimizer
        assert (o.weight_decay, o.layer_decay, config.model.drop_path_rate, config.train.epochs) == (0.05, 0.7, 0.7, 36)
        assert (config.augment.scale_min, config.augment.scale_max, config.data.resolution) == (0.1, 2.0, 1024)
        assert (config.evaluate.short_side_px, config.evaluate.long_side_max_px) == (800, 1333)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    config = load(ROOT / "configs" / f"{name}.yaml")
    o, t = config.optimizer, config.train
    found = (o.lr_peak, o.weight_decay, o.clip_grad_norm, config.model.drop_path_rate)
    assert (*found, t.epochs, t.global_batch, o.layer_decay, o.ema_decay) == PUBLISHED[name]
    augment = config.augment
    assert (augment.rand_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.mixup_alpha, augment.cutmix_alpha) == ((0.0, 0.0) if "finetune" in name else (0.8, 1.0))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optimizer.lr_peek=1"], ["'optimizer.lr_peek'", "did you mean 'optimizer.lr_peak'"]),
        (["train.lr_peak=1"], ["'train.lr_peak'", "did you mean 'optimizer.lr_peak'"]),
        (["lr_peak"], ["'lr_peak'", "key.sub=value"]),
        (["train.epochs=many"], ["train.epochs = 'many'", "integer"]),
        (["train.global_batch=100"], ["100", "32", "not divisible"]),
        (["data.resolution=65"], ["65", "multiple of 32", "64"]),
        (["data.resolution_by_epoch={0: 40, 9: 64}"], ["epoch 0: 40", "multiple of 32", "32"]),
        (["data.resolution_by_epoch={0: 32, 9: 96}"], ["must begin at epoch 0 and end at data.resolution 64"]),
        (["data.resolution_by_epoch={2: 32, 9: 64}"], ["must begin at epoch 0"]),
        (["data.resolution_by_epoch={0: 32, 18: 64}"], ["epoch 18", "train.epochs is 18"]),
        (["data.shuffle_lanes=3"], ["train.global_batch 64 is not divisible by data.shuffle_lanes 3"]),
        (["data.format=ffcv", "data.path=s3://bucket/set"], ["ffcv reads local files", "s3://bucket/set"]),
        (["train.micro_batch=1"], ["even"]),
        (["optimizer.warmup_epochs=99"], ["99", "train.epochs"]),
        (["train.zero_stage=4"], ["train.zero_stage = 4"]),
        (["model.checkpointing=all"], ["model.checkpointing 'all'", "selective_mlp", "a list of 4"]),
        (["model.checkpointing=[block, none]"], ["model.checkpointing ['block', 'none']", "one a stage"]),
        (["model.activation_checkpointing=block"], ["did you mean 'model.checkpointing'"]),
        (["model.compile=true", "train.zero_stage=3"], ["model.compile", "train.zero_stage=2"]),
        (["model.cuda_graphs=true", "train.zero_stage=3"], ["model.cuda_graphs", "train.zero_stage=2"]),
        (["model.cuda_graphs=true", "model.compile=true"], ["model.cuda_graphs with model.compile"]),
        (
            ["model.cuda_graphs=true", "data.resolution_by_epoch={0: 32, 9: 64}"],
            ["model.cuda_graphs", "{0: 32, 9: 64}", "data.resolution_by_epoch=null"],
        ),
        (["train.epochs=[1"], ["YAML"]),
        (["optimizer.lr_peak=.nan"], ["optimizer.lr_peak"]),
        (["train.epochs=on"], ["train.epochs", "'on'"]),
        (["train.zero_stage=off"], ["train.zero_stage", "'off'"]),
        (["output_root=~nobody-of-that-name/runs"], ["output_root: ~nobody-of-that-name/runs", "home folder"]),
        (
            ["evaluate.every_epochs=null", "checkpoint.best_metric=top1"],
            ["checkpoint.best_metric top1", "evaluate.every_epochs is null"],
        ),
    ],
)
def test_mistakes_are_named(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DEMO, overrides)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_file(tmp_path: Path) -> None:
    tree = yaml.safe_load(DEMO.read_text())
    del tree["seed"]
    tree["modle"] = tree.pop("model")
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="'seed' is missing") as caught:
        load(bad)
    assert "no key 'modle'; did you mean 'model" in str(caught.value)
    bad.write_text(DEMO.read_text() + "\nseed: 3\n")
    with pytest.raises(ConfigError, match="'seed' stands twice"):
        load(bad)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        ConfigError, match=rf"{tmp_path} is a folder: name a YAML file; that run's is {tmp_path}/config"
    ):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"name = 'x+': string should have at most 200 characters"):
        load(DEMO, ["name=" + "x" * 201])
    with pytest.raises(ConfigError, match=r"no configuration file none\.yaml; in /.*: "):
        load("none.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file.*demo_pretrain\.yaml"):
        load(DEMO.with_name("nothing.yaml"))


def test_policies_are_those_of_the_model() -> None:
    assert get_args(Checkpointing) == POLICIES


def test_overrides_speak_yaml_and_win() -> None:
    assert load(DEMO, ["model.checkpointing=[stage, block, none, none]"]).model.checkpointing[1] == "block"
    config = load(DEMO, ["optimizer.lr_peak=2e-3", "augment.rand_augment=null", "name=other"])
    assert (config.optimizer.lr_peak, config.augment.rand_augment, config.name) == (2e-3, None, "other")
    with pytest.raises(Exception, match="frozen"):
        config.name = "again"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["2024-05-01", "17", "1e3", "on", "0x1F", "12:30:00", "1_000", ".5", "a: b", "[x]", "@x"]
)
def test_texts_stay_as_they_are_written(tmp_path: Path, text: str) -> None:
    """YAML takes them for dates, numbers and truths; where a key wants a text, they are one."""
    config = load(DEMO, [f"tracking.experiment={text}", f"output_root={text}", f"data.path={text}"])
    assert (config.tracking.experiment, str(config.output_root), config.data.path) == (text, text, text)
    file = tmp_path / "run.yaml"
    file.write_text(DEMO.read_text().replace("experiment: hornet-demo", f"experiment: {text}"))
    if text[0] not in "a[@":
        assert load(file).tracking.experiment == text
    assert load(DEMO, ["guard.mode=off"]).guard.mode == "off"
    if text.replace("-", "").isalnum():
        assert load(DEMO, [f"name={text}"]).name == text


def test_home_folders_and_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    keys = ("data.path=~/set", "output_root=~/runs", "init.checkpoint=~/w.pth", "init.label_space=~/classes.txt")
    config = load(DEMO, keys)
    assert (config.data.path, config.output_root) == ("/somewhere/set", Path("/somewhere/runs"))
    assert (config.init.checkpoint, config.init.label_space) == (Path("/somewhere/w.pth"), "/somewhere/classes.txt")
    assert load(DEMO, ["data.path=s3://bucket/~/set"]).data.path == "s3://bucket/~/set"
    for path in ("~/set/dataset.json", "/somewhere/set/dataset.json"):
        assert load(DEMO, [f"data.path={path}"]).data.path == "/somewhere/set"


def test_progressive_resolution() -> None:
    config = load(DEMO, ["data.resolution_by_epoch={0: 32, 12: 64}", "data.path=s3://bucket/set"])
    assert [config.data.resolution_at(epoch) for epoch in (0, 11, 12, 17)] == [32, 32, 64, 64]
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config
    assert config.data.path == "s3://bucket/set"
    assert load(DEMO).data.resolution_at(5) == 64
    assert load(DEMO, ["data.resolution_by_epoch={0: 64}", "model.cuda_graphs=true"]).model.cuda_graphs


def test_ranks_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"64 is not divisible by 3 ranks x train.micro_batch 32 = 96"):
        load(DEMO).train.accumulation_steps(3)


def test_command_line(tmp_path: Path) -> None:
    def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    printed = pipeline("pretrain", str(DEMO), "seed=7", "--print-config")
    assert printed.returncode == 0
    assert yaml.safe_load(printed.stdout)["seed"] == 7
    wrong = pipeline("pretrain", str(DEMO), "train.epoch=1")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: override 'train.epoch=1': no key 'train.epoch'; did you mean 'train.epochs'?\n"
    assert pipeline("pretrain").returncode == 2
    assert pipeline("pretrain", str(DEMO), "--no-such-option").returncode == 2
    both_sides = pipeline("pretrain", str(DEMO), "seed=7", "--print-config", "name=second")
    assert (yaml.safe_load(both_sides.stdout)["seed"], yaml.safe_load(both_sides.stdout)["name"]) == (7, "second")
    missing = pipeline("pretrain", str(DEMO), f"data.path={tmp_path}/none", "--check")
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "dataset.json" in missing.stderr

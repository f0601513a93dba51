"""The typed, frozen configuration of one run: one YAML file plus dotted overrides, checked before anything is spent.

A YAML file is complete: what a run depends on has no default here, so nothing about a run is hidden in the code.
Only operational keys (logging, checkpoints, tracking) have defaults. Relations between keys, and between keys and
the number of ranks, are refused at load with both numbers in the message.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, overload

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from pipeline.config.data import Data, MixedSet
from pipeline.config.run import RunConfig
from pipeline.config.sections import Augment, ConfigError, Evaluate, Model


class Config(RunConfig):
    """One run that learns to classify."""

    data: Data
    augment: Augment
    model: Model
    evaluate: Evaluate

    @model_validator(mode="after")
    def _relations(self) -> Config:
        train = self.train
        late = [epoch for epoch in self.data.resolution_by_epoch or {} if epoch >= train.epochs]
        if late:
            raise ValueError(f"data.resolution_by_epoch has epoch {late[0]}, train.epochs is {train.epochs}")
        if self.checkpoint.best_metric in ("miou", "box_ap", "mask_ap"):
            raise ValueError(
                f"checkpoint.best_metric {self.checkpoint.best_metric} is of a segmentation or a detection: set top1, "
                f"top5 or val_loss, or null"
            )
        if self.model.compile and train.zero_stage == 3:
            raise ValueError(
                "model.compile with train.zero_stage 3: torch.compile traces blocks while their weights are shared out "
                "over the ranks; set one of model.compile=false and train.zero_stage=2"
            )
        self._check_graphs()
        if (self.augment.mixup_alpha or self.augment.cutmix_alpha) and train.micro_batch % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a micro-batch: train.micro_batch {train.micro_batch} must be "
                f"even, or augment.mixup_alpha and augment.cutmix_alpha 0"
            )
        return self

    def _check_graphs(self) -> None:
        """A CUDA graph has its kernels, sizes and addresses once and for all."""
        if not self.model.cuda_graphs:
            return
        if self.train.zero_stage == 3:
            raise ValueError(
                "model.cuda_graphs with train.zero_stage 3: weights that are gathered from the ranks are at other "
                "addresses each time; set one of model.cuda_graphs=false and train.zero_stage=2"
            )
        if self.model.compile:
            raise ValueError(
                "model.cuda_graphs with model.compile: a graph is captured of blocks as they are; set one of the two "
                "to false"
            )
        if len(set((self.data.resolution_by_epoch or {}).values())) > 1:
            raise ValueError(
                f"model.cuda_graphs with data.resolution_by_epoch {self.data.resolution_by_epoch}: a graph is of one "
                "size; set one of model.cuda_graphs=false and data.resolution_by_epoch=null"
            )


_AnyConfig = TypeVar("_AnyConfig", bound=RunConfig)


@overload
def load(path: Path | str, overrides: Sequence[str] = ()) -> Config: ...


@overload
def load(path: Path | str, overrides: Sequence[str], kind: type[_AnyConfig]) -> _AnyConfig: ...


def load(path: Path | str, overrides: Sequence[str] = (), kind: type[RunConfig] = Config) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values in YAML syntax), and check the result.

    `kind`: the configuration of which task.

    Raises ConfigError with one line per fault: the file, the key, what is wrong, and the nearest known key.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) or ["none"]
        raise ConfigError(f"no configuration file {path}; in {path.parent.absolute()}: {', '.join(known)}") from None
    except IsADirectoryError:
        own = path / "config.yaml"
        hint = f"; that run's is {own}" if own.exists() else ""
        raise ConfigError(f"{path} is a folder: name a YAML file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(_value(tree)).__name__}")
    _check_task(tree, path, kind)
    for override in overrides:
        _apply(tree, override, kind)
    try:
        return kind.model_validate(_as_declared(tree, kind))
    except ValidationError as error:
        raise ConfigError("; ".join(explained(error, path, kind))) from None


def _check_task(tree: dict[str, Any], path: Path, kind: type[RunConfig]) -> None:
    """A file of another task lacks and has keys by the dozen: that is one fault."""
    found = _value(tree.get("task"))
    wanted = get_args(field.annotation)[0] if (field := kind.model_fields.get("task")) else None
    if isinstance(found, str | types.NoneType) and found != wanted:
        what = "a classification (it has no key `task`)" if found is None else f"`task: {found}`"
        command = "pretrain`, `adapt` or `finetune" if found is None else found
        raise ConfigError(f"{path} is the configuration of {what}: give it to `python -m pipeline {command}`")


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of every leaf key."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from known_keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _apply(tree: dict[str, Any], override: str, config: type[RunConfig]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    known = set(known_keys(config))
    if key not in known:
        raise ConfigError(f"override {override!r}: no key {key!r}{_nearest(key, known)}")
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section in the file")
    kind = _declared(key, config)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        if not _takes_text(kind, ""):
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        value = text
    tree[leaf] = text if _is_meant_as_text(kind, value) else value


class _Scalar(NamedTuple):
    """A scalar of a YAML file that YAML takes for something other than a string, and how it is written there."""

    value: Any
    text: str


def _as_declared(tree: Any, kind: Any) -> Any:
    """`tree` with each scalar as its key's type has it: `name: 2024-05-01` is a name, not a date."""
    if isinstance(tree, _Scalar):
        return tree.text if tree.value is not None and _takes_text(kind, tree.value) else tree.value
    if isinstance(tree, dict):
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        declared = {name: field.annotation for name, field in fields.items()}
        return {_value(key): _as_declared(value, declared.get(_value(key))) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_as_declared(value, next(iter(get_args(kind)), None)) for value in tree]
    return tree


def _declared(key: str, config: type[RunConfig]) -> Any:
    kind: Any = config
    for part in key.split("."):
        kind = kind.model_fields[part].annotation
    return kind


def _value(scalar: Any) -> Any:
    return scalar.value if isinstance(scalar, _Scalar) else scalar


def _is_text(kind: Any) -> bool:
    """Whether a key of this type takes any text, and nothing but that and null."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    bare = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return all(part in (str, Path, types.NoneType) for part in bare)


def _is_meant_as_text(kind: Any, value: Any) -> bool:
    """Whether `a: b` or [x] is a text, where YAML has made a mapping or a list of it: a list of sections is none."""
    if isinstance(value, dict):
        return _takes_text(kind, "")
    if isinstance(value, list):
        # A folder may be called [x], but who lists several means several.
        is_name = len(value) == 1 and not isinstance(value[0], dict)
        return _is_text(kind) or (_takes_sections(kind) and is_name)
    return False


def _takes_sections(kind: Any) -> bool:
    return any(_takes_sections(part) for part in get_args(kind)) or (
        isinstance(kind, type) and issubclass(kind, BaseModel)
    )


def _takes_text(kind: Any, value: Any) -> bool:
    """Whether a key of this type is better given how `value` is written: it takes strings, or would count with `on`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_takes_text(part, value) for part in get_args(kind))
    if origin is Annotated:
        return _takes_text(get_args(kind)[0], value)
    if origin is Literal:
        return isinstance(value, bool) or isinstance(get_args(kind)[0], str)
    return kind in (str, Path) or (isinstance(value, bool) and kind in (int, float))


def explained(error: ValidationError, path: Path, kind: type[RunConfig]) -> Iterator[str]:
    """What is wrong with the configuration at `path`, a line for each fault: where, what, perhaps what was meant."""
    known = set(known_keys(kind))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    faults = error.errors(include_url=False)
    places = [fault["loc"] for fault in faults]
    for fault in faults:
        loc = fault["loc"]
        if fault["type"] == "too_short" and any(other[: len(loc)] == loc and other != loc for other in places):
            continue  # a list lacks what is wrong in it, which is said by itself
        key = _shown(loc)
        if fault["type"] == "extra_forbidden":
            of_list = {f"{_shown(loc[:-1])}.{name}" for name in MixedSet.model_fields} if "sets" in loc else None
            yield f"{path}: no key {key!r}{_nearest(key, of_list or known | sections)}"
        elif fault["type"] == "missing":
            yield f"{path}: key {key!r} is missing"
        elif fault["type"] == "model_type" and "sets" in loc:
            yield f"{path}: {key} = {_value(fault['input'])!r}: it has to be as {{path: data/own, weight: 0.3}}"
        elif fault["type"] == "value_error":
            text = str(fault["ctx"]["error"])
            yield f"{path}: {text}" if not key or key in text else f"{path}: {key}: {text}"
        else:
            text = fault["msg"].replace("Tuple", "it").replace(" after validation", "")
            yield f"{path}: {key} = {fault['input']!r}: {text[0].lower()}{text[1:]}"


def _shown(loc: tuple[int | str, ...]) -> str:
    """A key as it is written: without the name that tells a list of sets from a path, entries counted from 0."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "sets")
    return key.removeprefix(".")


def _nearest(key: str, known: set[str]) -> str:
    # A key in the wrong section shares its leaf name with the right one: look there too.
    leaf = key.rpartition(".")[2]
    leaves = {name.rpartition(".")[2]: name for name in sorted(known)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    best = leaves[leaf] if leaf in leaves else close[0] if close else leaves[close_leaf[0]] if close_leaf else None
    return f"; did you mean {best!r}?" if best else "; --print-config lists the keys"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # C where libyaml is there
    """YAML 1.1 reads 1e-3 as a string and lets a later duplicate key win: both surprise, both are mended here.

    So does it when it takes `on`, 17 or 2024-05-01 for what they are not: scalars keep how they are written.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str | _Scalar):
            return _Scalar(value, node.value)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {_value(twice.pop())!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)

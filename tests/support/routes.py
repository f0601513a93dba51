"""Two ways through the code, which the picture of the house shows: of an image, and of a hyper-parameter.

A route is a list of stops in the order in which they are met. It is checked against the code before it is drawn: what a
stop names must be defined there, and two stops that follow each other must be tied by an import.
"""

import ast
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tests.support.import_graph import ROOT, Graph, modules


class RouteError(ValueError):
    """The route tells something that the code no longer holds."""


@dataclass(frozen=True)
class Stop:
    """A definition that the route passes.

    what: `module:name`, or `module:Class.method`; caption: what happens there; way: how the line comes here from the
    stop before (see picture.py); at: the thing outside of the rooms that it is drawn on.
    """

    what: str
    caption: str
    way: str = ""
    at: str = ""

    @property
    def module(self) -> str:
        return self.what.partition(":")[0]

    @property
    def name(self) -> str:
        return self.what.partition(":")[2]


class End(NamedTuple):
    """Where a route begins or ends outside of the code: a thing of the picture, and the way there."""

    at: str
    way: str = ""


@dataclass(frozen=True)
class Route:
    """stops, from `start` to `end`; hands: modules that hand over from one stop to the next without being one."""

    title: str
    style: str
    stops: tuple[Stop, ...]
    hands: tuple[str, ...] = ()
    start: End | None = None
    end: End | None = None

    def caption(self, what: str) -> str:
        return next(stop.caption for stop in self.stops if stop.what == what)

    def passes(self, stop: Stop) -> bool:
        """Whether it stops there too."""
        return stop.what in {own.what for own in self.stops}


_ON_DISK = Stop("data_prep.manifest:ShardIndex", "lies in a shard; an index tells where", at="shards")
_BATCHES = Stop("pipeline.data.loader:training_batches", "becomes part of a micro-batch")

IMAGE = Route(
    "The route of an image",
    "image",
    (
        Stop("data_prep.sources.reading:Chunk", "is read where it lies, nothing is unpacked"),
        Stop("data_prep.images.prepare:prepare_image", "is checked, repaired, shrunk, or rejected", "under3 west"),
        Stop("data_prep.build.ingest:ingest_chunk", "waits in a data file, with a row of facts", "under2 stairs"),
        Stop("data_prep.build.assign:assign", "gets split and place by hashes alone"),
        Stop("data_prep.build.gather:write_shard", "is copied into its shard"),
        _ON_DISK,
        Stop("pipeline.data.order:SampleOrder", "has its turn: by seed, epoch and step", "lane+5"),
        Stop("pipeline.data.shards:ShardReader", "is read, from disk or a URL"),
        Stop("pipeline.data.decode:crop_resize", "is decoded no further than its crop"),
        Stop("pipeline.data.augment:HostAugment", "is augmented by its key, or on the device"),
        _BATCHES,
        Stop("pipeline.training.feed:Feed", "goes to the device, is mixed with others", "under2 stairs-16 under5+6"),
        Stop("pipeline.training.engine:Engine.train_step", "runs forward and backward in DeepSpeed"),
        Stop("pipeline.models.hornet:HorNet", "becomes logits", "level"),
        Stop("pipeline.training.recipe:mixing_and_loss", "and a loss", "under2-5 east-7 under5-6"),
    ),
    hands=("data_prep.build.shards", "pipeline.data.views", "pipeline.training.run"),
    start=End("archives"),
)
FFCV = Route(
    "The same image in an FFCV file",
    "ffcv",
    (
        _ON_DISK,
        Stop("data_prep.beton.write:add_betons", "is copied from its shard, or as pixels"),
        Stop("data_prep.manifest:BetonEntry", "lies in one file, in the order of the shards", "under4+2", at="betons"),
        Stop("pipeline.data.beton:TrainingBeton", "is read by FFCV, in the same batch", "lane-5"),
        replace(_BATCHES, way="level"),
    ),
)
HYPER = Route(
    "The route of a hyper-parameter",
    "hyper",
    (
        Stop("pipeline.config.load:load", "is read from YAML, or KEY=VALUE in its place", "under1"),
        Stop("pipeline.config.sections:Optimizer", "is refused where type, bounds or relations are wrong"),
        Stop(
            "pipeline.training.recipe:schedule", "sets the rate; its neighbours decay, mixing, EMA", "under2+7 east+7"
        ),
        Stop("pipeline.training.engine:deepspeed_config", "sets batches, accumulation, ZeRO stage, clipping"),
        Stop("pipeline.records.tracking:Tracker", "is written down beside the curves it made", "level"),
    ),
    hands=("pipeline.training.run",),
    start=End("configs"),
    end=End("runs", "under3"),
)
ROUTES = (IMAGE, FFCV, HYPER)


def check(route: Route, graph: Graph, root: Path = ROOT) -> list[str]:
    """How each stop is tied to the one before it, in words. Raises RouteError for what does not hold."""
    files = modules(root)
    if strangers := set(route.hands) - files.keys():
        raise RouteError(f"{route.title}: there is no module {min(strangers)} to hand over")
    for stop in route.stops:
        if stop.module not in files:
            raise RouteError(f"{route.title}: there is no module {stop.module} for the stop {stop.what}")
        if stop.name not in definitions(files[stop.module]):
            raise RouteError(f"{route.title}: {stop.module} no longer defines {stop.name}")
    on_route = [*(stop.module for stop in route.stops), *route.hands]
    return [_tie(route, a, b, on_route, graph) for a, b in pairwise(route.stops)]


def _tie(route: Route, a: Stop, b: Stop, on_route: list[str], graph: Graph) -> str:
    one, other = a.module, b.module
    if one == other:
        return f"{one} defines both {a.name} and {b.name}"
    for importing, imported in ((one, other), (other, one)):
        if imported in graph[importing]:
            return f"{importing} imports {imported}"
    for module in on_route:
        if {one, other} <= graph.get(module, {}).keys():
            return f"{module} imports both {one} and {other}"
    raise RouteError(f"{route.title}: no import ties {a.what} to {b.what}, and no module of the route imports both")


def definitions(file: Path) -> set[str]:
    """Names of the functions, classes and constants of a file, and `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names

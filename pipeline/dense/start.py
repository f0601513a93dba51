"""The weights that a net for segmentation or detection starts from: a classification's, for its backbone."""

from __future__ import annotations

from dataclasses import replace

from pipeline.checkpoints.choice import check_model, find_source
from pipeline.checkpoints.transfer import load_into
from pipeline.config.run import RunConfig
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.training.initial import found_in_mlflow, local_init
from pipeline.training.task import Start


def start_backbone(backbone: HorNet, config: RunConfig) -> Start:
    """Give it the weights of what `init.checkpoint` names, whose own head is left out. Raises CheckpointError."""
    source = find_source(local_init(config))
    check_model(source, config.model.name)
    whole = build_model(config.model, 0, config.data.resolution)
    report = load_into(whole, replace(source, synsets=None, by_size=False), []).report
    own = backbone.state_dict()
    backbone.load_state_dict({name: value for name, value in whole.state_dict().items() if name in own})
    told = f"backbone: {report.partition(';')[0]}; head: fresh"
    name = found_in_mlflow(config)
    return Start(f"{name}: {told}" if name else told, None)

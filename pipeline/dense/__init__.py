"""HorNet for tasks with an answer a position: decoders over its four maps, segmentation as a task, its measure."""

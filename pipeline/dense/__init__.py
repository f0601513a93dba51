"""Segmentation on HorNet: sets with masks, heads, the task that a run learns, how it is measured."""

"""Pretrain HorNet on ImageNet-22K and fine-tune it to ImageNet-1K. Entry point: ``python -m pipeline --help``."""

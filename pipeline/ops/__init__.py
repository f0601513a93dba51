"""Operators of the model in readable plain PyTorch."""

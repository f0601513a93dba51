"""Triton kernels: faster spellings of functions in `pipeline/ops`, used where `kernels.py` says so."""

"""gnConv and its pieces in readable PyTorch; `triton/` has the same as kernels."""

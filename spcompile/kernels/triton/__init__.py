"""Triton kernels. Nothing here is imported where no tensor is on a GPU: Triton may not be installed."""

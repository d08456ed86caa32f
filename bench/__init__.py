"""Benchmarks of spcompile: `python -m bench [names] [--quick]`."""

"""Microbenchmarks of the kernels and of generation: `python -m bench --help`."""

"""Benchmarks: one file a workload, the peers beside us in one run: ``python -m benchmarks``."""

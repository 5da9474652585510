"""Benchmarks and sizing tables; only `jobs/bench.py` imports this package."""

"""Benchmarks through lmms-eval: their tasks as calibration samples."""

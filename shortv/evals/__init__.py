"""Benchmarks through lmms-eval: their tasks as calibration samples, and a model under a plan that answers them."""

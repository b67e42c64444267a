"""Benchmarks and the demo: the published eager flow, a registry of inputs, a runner, plots."""

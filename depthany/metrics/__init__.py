"""Benchmark protocols with their alignment rules, and the trivial baselines to beat."""

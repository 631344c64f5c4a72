"""Benchmarks: contestants side by side in one run, interleaved, as ratios. They assert nothing."""

"""Benchmarks: `python -m benchmarks NAME`. Two things side by side in one process, accuracy beside time."""

"""Benchmarks, not tests: `python -m benchmarks [name ...]` prints markdown tables (docs/performance.md)."""

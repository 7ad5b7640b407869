"""Benchmarks behind `python bench.py`: one file per command, and what they share."""

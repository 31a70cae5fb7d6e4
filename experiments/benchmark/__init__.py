"""Benchmarks of what the project is fast for."""

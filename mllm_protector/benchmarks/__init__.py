"""Benchmark files to questions."""

"""The speed of training, scoring and rewriting, beside TRL and plain loops (``scripts/benchmark.py``)."""

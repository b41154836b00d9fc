"""Measure speed: ``python scripts/benchmark.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "speed.run.run_benchmark", config="benchmark")

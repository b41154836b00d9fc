"""Measure the speed of an evaluation: ``python scripts/benchmark_evaluation.py [key=value ...]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.benchmarking.evaluation.run_benchmark_evaluation")

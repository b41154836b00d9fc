"""Measure the speed of an evaluation: ``python scripts/benchmark_evaluation.py [key=value ...]``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark_evaluation")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        # here, so that --help needs no torch
        from mllm_protector.benchmarking.evaluation import run_benchmark_evaluation

        run(cfg, run_benchmark_evaluation)


if __name__ == "__main__":
    launch(main, __doc__)

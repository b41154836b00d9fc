"""Measure speed and memory: ``python scripts/benchmark.py [key=value ...]``, ``--help`` for the keys."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import build, claim_output_dir, clear_errors, quiet_libraries


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.benchmarking.run import run_benchmark  # here, so that --help needs no torch

        arguments = build(cfg, run_benchmark)
        claim_output_dir(cfg)
        run_benchmark(**arguments)


if __name__ == "__main__":
    with clear_errors():
        main()

"""Measure speed: ``python scripts/benchmark.py [key=value ...]``, ``--help`` for the keys."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from speed.run import run_benchmark  # here, so that --help needs no torch

        run(cfg, run_benchmark)


if __name__ == "__main__":
    launch(main, __doc__)

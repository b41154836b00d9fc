"""Compare runs: ``python scripts/compare_runs.py runs=[outputs/a,outputs/b]``, ``--help`` for the keys."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="compare_runs")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        from mllm_protector.reporting.compare import compare  # here, so that --help needs no torch

        run(cfg, compare)


if __name__ == "__main__":
    launch(main, __doc__)

"""Measure a saved detoxifier: ``python scripts/eval_detoxifier.py [key=value ...]`` (``--help`` for keys)."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval_detoxifier")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.evaluation.detoxifier import (
            eval_detoxifier,  # here, so that --help needs no torch
        )
        from mllm_protector.reporting.detoxifier import report

        run(cfg, eval_detoxifier, report)


if __name__ == "__main__":
    launch(main, __doc__)

"""Measure a saved detector: ``python scripts/eval_detector.py [key=value ...]``, ``--help`` for the keys."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval_detector")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.evaluation.detector import eval_detector  # here, so that --help needs no torch
        from mllm_protector.reporting.detector import report

        run(cfg, eval_detector, report)


if __name__ == "__main__":
    launch(main, __doc__)

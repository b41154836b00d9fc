"""Measure a guard on MM-SafetyBench: ``python scripts/eval_mmsafety.py [key=value ...]`` (``--help``)."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval_mmsafety")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.evaluation.run import evaluate  # here, so that --help needs no torch
        from mllm_protector.processes import leave_processes
        from mllm_protector.reporting.report import report

        run(cfg, evaluate, report)
        leave_processes()


if __name__ == "__main__":
    launch(main, __doc__)

"""Train the harm detector: ``python scripts/train_detector.py [key=value ...]``, ``--help`` for the keys."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_detector")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.processes import leave_processes
        from mllm_protector.training.detector import train_detector  # here, so that --help needs no torch

        run(cfg, train_detector)
        leave_processes()


if __name__ == "__main__":
    launch(main, __doc__)

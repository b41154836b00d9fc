"""Write a detector as one model for stock tools: ``python scripts/export_detector.py [key=value ...]``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="export_detector")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.models.export import export_detector  # here, so that --help needs no torch

        run(cfg, export_detector)


if __name__ == "__main__":
    launch(main, __doc__)

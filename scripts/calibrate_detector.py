"""Choose a detector's threshold: ``python scripts/calibrate_detector.py [key=value ...]``, see ``--help``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="calibrate_detector")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        # here, so that --help needs no torch
        from mllm_protector.training.calibration import calibrate_detector

        run(cfg, calibrate_detector)


if __name__ == "__main__":
    launch(main, __doc__)

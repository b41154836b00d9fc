"""Turn the official detector into one of ours: ``python scripts/import_official.py [key=value ...]``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="import_official")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.models.official import import_official_detector  # here, so --help needs no torch

        run(cfg, import_official_detector)


if __name__ == "__main__":
    launch(main, __doc__)

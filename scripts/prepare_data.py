"""Say what a training would learn from: ``python scripts/prepare_data.py data=... [key=value ...]``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.data.preparation import prepare_data  # here, so that --help needs no torch

        run(cfg, prepare_data)


if __name__ == "__main__":
    launch(main, __doc__)

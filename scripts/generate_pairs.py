"""Let a model write training pairs: ``python scripts/generate_pairs.py [key=value ...]`` (``--help``)."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate_pairs")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.generation.run import generate_pairs  # here, so that --help needs no torch

        run(cfg, generate_pairs)


if __name__ == "__main__":
    launch(main, __doc__)

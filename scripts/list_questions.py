"""List the questions of benchmarks with ids: ``python scripts/list_questions.py benchmark=[mmsafety]``."""

import hydra
from omegaconf import DictConfig

from mllm_protector.config import clear_errors, launch, quiet_libraries, run


@hydra.main(version_base="1.3", config_path="../configs", config_name="list_questions")
def main(cfg: DictConfig) -> None:
    """One call: the config's keys are the function's parameters."""
    with clear_errors():
        quiet_libraries()
        from mllm_protector.evaluation.listing import list_questions  # here, so that --help needs no torch

        run(cfg, list_questions)


if __name__ == "__main__":
    launch(main, __doc__)

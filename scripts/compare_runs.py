"""Compare runs: ``python scripts/compare_runs.py runs=[outputs/a,outputs/b]``, ``--help`` for the keys."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.reporting.compare.compare")

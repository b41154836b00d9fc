"""Compare runs: ``python scripts/compare_runs.py runs=[outputs/a,outputs/b]``, ``--help`` for the keys."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("compare_runs")

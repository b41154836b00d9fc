"""Measure a saved detector: ``python scripts/eval_detector.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("eval_detector")

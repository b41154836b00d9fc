"""Train the harm detector: ``python scripts/train_detector.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("train_detector")

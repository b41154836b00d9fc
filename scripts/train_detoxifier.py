"""Train the detoxifier: ``python scripts/train_detoxifier.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("train_detoxifier")

"""Train the detoxifier: ``python scripts/train_detoxifier.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.training.detoxifier.train_detoxifier")

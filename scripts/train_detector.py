"""Train the harm detector: ``python scripts/train_detector.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.training.detector.train_detector")

"""Choose a detector's threshold: ``python scripts/calibrate_detector.py [key=value ...]``, see ``--help``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.training.recalibration.calibrate_detector")

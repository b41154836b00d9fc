"""Choose a detector's threshold: ``python scripts/calibrate_detector.py [key=value ...]``, see ``--help``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("calibrate_detector")

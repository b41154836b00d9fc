"""Write a detector as one model for stock tools: ``python scripts/export_detector.py [key=value ...]``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("export_detector")

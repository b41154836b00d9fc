"""Write a detector as one model for stock tools: ``python scripts/export_detector.py [key=value ...]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.models.export.export_detector")

"""Turn the official detector into one of ours: ``python scripts/import_official.py [key=value ...]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.models.official.import_official_detector")

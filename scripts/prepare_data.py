"""Say what a training would learn from: ``python scripts/prepare_data.py data=... [key=value ...]``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.data.preparation.prepare_data")

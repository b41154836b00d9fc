"""Say what a training would learn from: ``python scripts/prepare_data.py data=... [key=value ...]``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("prepare_data")

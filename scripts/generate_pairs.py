"""Let a model write training pairs: ``python scripts/generate_pairs.py [key=value ...]`` (``--help``)."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("generate_pairs")

"""Let a model write training pairs: ``python scripts/generate_pairs.py [key=value ...]`` (``--help``)."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.generation.run.generate_pairs")

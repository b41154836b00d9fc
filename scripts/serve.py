"""Guard a served model: ``python scripts/serve.py [url=http://...] [key=value ...]``, ``--help``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.serving.serve.serve")

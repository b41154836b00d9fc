"""Guard a served model: ``python scripts/serve.py [url=http://...] [key=value ...]``, ``--help``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("serve")

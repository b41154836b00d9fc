"""Turn the official detector into one of ours: ``python scripts/import_official.py [key=value ...]``."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("import_official")

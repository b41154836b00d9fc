"""Measure a saved detoxifier: ``python scripts/eval_detoxifier.py [key=value ...]`` (``--help`` for keys)."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("eval_detoxifier")

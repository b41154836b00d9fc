"""Measure a guard on MM-SafetyBench: ``python scripts/eval_mmsafety.py [key=value ...]`` (``--help``)."""

from mllm_protector.commands import run_script

if __name__ == "__main__":
    run_script("eval_mmsafety")

"""Measure a guard on MM-SafetyBench: ``python scripts/eval_mmsafety.py [key=value ...]`` (``--help``)."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(__doc__, "mllm_protector.evaluation.run.evaluate", "mllm_protector.reporting.report.report")

"""Measure a saved detoxifier: ``python scripts/eval_detoxifier.py [key=value ...]`` (``--help`` for keys)."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(
        __doc__,
        "mllm_protector.evaluation.detoxifier.eval_detoxifier",
        "mllm_protector.reporting.parts.report_detoxifier",
    )

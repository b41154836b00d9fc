"""Measure a saved detector: ``python scripts/eval_detector.py [key=value ...]``, ``--help`` for the keys."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(
        __doc__,
        "mllm_protector.evaluation.detector.eval_detector",
        "mllm_protector.reporting.parts.report_detector",
    )

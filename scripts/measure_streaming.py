"""What judged streams let pass: ``python scripts/measure_streaming.py [key=value ...]``, ``--help``."""

from mllm_protector.config import launch

if __name__ == "__main__":
    launch(
        __doc__,
        "mllm_protector.evaluation.streaming.measure_streaming",
        "mllm_protector.reporting.streaming.report_streaming",
    )

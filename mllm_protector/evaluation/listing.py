"""The questions of benchmarks as rows: what to answer elsewhere, and the ids that bring the answers back."""

import logging
from collections.abc import Mapping
from pathlib import Path

from mllm_protector.errors import InputError
from mllm_protector.files import write_jsonl
from mllm_protector.images import ImageFile
from mllm_protector.protocols import Benchmark

log = logging.getLogger(__name__)


def list_questions(*, benchmarks: Mapping[str, Benchmark], output_dir: str) -> None:
    """Write ``questions.jsonl``: benchmark, id, scenario, variant, question and image of each question.

    The rows take an ``answer`` each and are then a file for ``mllm=replay``. ``image`` is the path of the
    image file; ``None`` where there is no image, or where it is made in memory.

    Args:
        benchmarks: by name.
        output_dir: gets the file.

    Raises:
        InputError: there is no benchmark, or one cannot be read.
    """
    if not benchmarks:
        raise InputError("benchmark: name at least one, such as benchmark=[mmsafety]")
    rows = [
        {
            "benchmark": name,
            "id": question.id,
            "scenario": question.scenario,
            "variant": question.variant,
            "question": question.text,
            "image": str(question.image.path) if isinstance(question.image, ImageFile) else None,
        }
        for name, benchmark in benchmarks.items()
        for question in benchmark.load().questions
    ]
    path = Path(output_dir) / "questions.jsonl"
    write_jsonl(path, rows)
    log.info("wrote %d questions: %s", len(rows), path)

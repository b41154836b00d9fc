"""A disk without room: what is written by the package, and by the libraries that it uses."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mllm_protector.config import clear_errors
from mllm_protector.evaluation.rows import write_rows
from mllm_protector.files import write_bytes, write_jsonl, write_text
from mllm_protector.models.detector import HarmDetector
from mllm_protector.models.export import export_detector
from mllm_protector.models.tiny import save_tiny_lm
from tests.test_outputs import contents, rows, started


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system's own limit (EFBIG), which needs no full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(
    make_detector: Callable[..., HarmDetector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = make_detector()
    detector.save(tmp_path / "detector")
    data = rows(tmp_path / "rows.jsonl", 100)
    row = dict.fromkeys(("id", "base", "scenario", "variant", "criterion", "arm", "outcome"), "x" * 9000)
    row |= dict.fromkeys(("cut", "harm", "changed", "repeated", "refused", "score"), None)
    row |= dict.fromkeys(("truth", "raw_truth", "label", "twin"), None)

    def export(folder: Path) -> None:
        export_detector(
            detector=str(tmp_path / "detector"), output_dir=str(folder), base=None, push_to=None, private=True
        )

    def tiny(folder: Path) -> None:
        texts = [f"word{number} " * 3 for number in range(100)]
        size = {"vocab_size": 400, "hidden_size": 16, "layers": 1, "heads": 2, "max_positions": 64}
        save_tiny_lm(folder / str(len(contents(folder))), texts, **size, seed=0)

    def prepare(folder: Path) -> None:
        keys = {"data.path": data, "output_dir": folder}
        started("prepare_data", "data=pairs", "export=true", **keys)

    works: dict[str, Callable[[Path], None]] = {
        "text": lambda folder: write_text(folder / "a.txt", "word " * 2000),
        "bytes": lambda folder: write_bytes(folder / "a.png", bytes(9000)),
        "rows": lambda folder: write_jsonl(folder / "a.jsonl", ({"row": number} for number in range(2000))),
        "results": lambda folder: write_rows([row | {"verdicts": {}}], folder / "results.jsonl", []).info,
        "a trained part": detector.save,
        "an export": export,
        "a tiny model": tiny,
        "prepared data": prepare,
    }
    for name, work in works.items():
        folder = tmp_path / name
        folder.mkdir()
        work(folder)
        before = contents(folder)
        assert before, name
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, clear_errors(), no_file_above(4000):
            work(folder)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 1, name
        assert len(said) == 1, name
        assert str(folder) in said[0], said
        assert "File too large" in said[0], said
        assert "make room" in said[0], said
        assert contents(folder) == before, name

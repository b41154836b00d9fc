"""docs/tour.ipynb runs on what the three scripts wrote."""

from pathlib import Path

import pytest

from tests.test_scripts import EVALUATION, TRAINING, fresh, run, said_by

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_notebook_guards_an_answer_reads_the_report_and_draws_the_trade_off(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason='needs: pip install -e ".[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='needs: pip install -e ".[docs]"')
    for part in ("detector", "detoxifier"):
        said_by(run(f"train_{part}", *TRAINING, cwd=tmp_path))
    said_by(fresh("eval_mmsafety", *EVALUATION, cwd=tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    _, asked, guarded, table, drawn = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert asked[-1].data["text/plain"].strip("'\"")
    assert "'outcome': 'guard_error'" not in guarded[-1].data["text/plain"]
    assert "'score': " in guarded[-1].data["text/plain"]
    assert all(f">{arm}<" in table[-1].data["text/html"] for arm in ("none", "refusal", "protector"))
    assert "image/png" in drawn[-1].data

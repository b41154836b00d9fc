"""HTML pages, each one self-contained file.

A page loads nothing: its policy forbids every request, allows images that are part of the page, and runs the
one script whose hash it names. Every text from outside is escaped. It works on a phone, in print and without
JavaScript, which only filters the rows.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mllm_protector.reporting.pivots import pivot, tables
from mllm_protector.reporting.plots import plots
from mllm_protector.reporting.samples import Images, Rows, Sample, samples
from mllm_protector.reporting.sentences import benchmark_lines, bias_sentence, headlines
from mllm_protector.reporting.tables import Table, showable, upright


def page(
    result: Mapping[str, Any], rows: Rows, *, run: Mapping[str, Any], images: Images, max_rows: int
) -> str:
    """The whole page as HTML.

    Args:
        result: the content of ``asr.json``.
        rows: reads those of all benchmarks' ``results.jsonl``, in order.
        run: the content of ``run.json``; what is missing is left out.
        images: (benchmark, question id) -> its image, or ``None``.
        max_rows: rows (question and arm) that are shown one by one at most.
    """
    result, run = upright(result), upright(run)
    mllm = result["mllm"]
    shown, (all_rows, all_questions) = samples(rows, images=images, max_rows=max_rows)
    return render(
        "page.html.j2",
        script="page.js.j2",
        title=f"Attack success rate of {mllm.get('name') or mllm.get('path') or 'the MLLM'}",
        made=_made(run),
        notes=result["notes"],
        judges=_judges(result["judges"]),
        sections=[_section(result, run, name) for name in result["benchmarks"]],
        costs=_costs(run),
        samples=shown,
        shown_rows=sum(len(sample.arms) for sample in shown),
        all_rows=all_rows,
        all_questions=all_questions,
        filters=_choices(shown),
        manifest=run,
        identities={name: result[name] for name in ("mllm", "guard", "asked_again") if result[name]}
        | {
            f"benchmark {name}": {key: facts[key] for key in ("identity", "questions")}
            for name, facts in result["benchmarks"].items()
        },
    )


def _made(run: Mapping[str, Any]) -> str:
    """When and from which commit a run was made, in a line."""
    commit = run.get("commit")
    parts = [str(run["started"])] if run.get("started") else []
    if isinstance(commit, Mapping):
        parts.append(f"commit {str(commit['id'])[:12]}{', with changes' if commit['dirty'] else ''}")
    if package := (run.get("versions") or {}).get("mllm-protector"):
        parts.append(f"mllm_protector {package}")
    return "; ".join(parts)


def _section(result: Mapping[str, Any], run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the page says about one benchmark."""
    data = pivot(result, name)
    thresholds = {arm: result["guard"][arm]["threshold"] for arm in result["scored"]}
    return {
        "name": name,
        "headlines": headlines(data),
        "remarks": benchmark_lines(data, name),
        "plots": plots(data, name, thresholds),
        "tables": tables(data, run.get("measurements", ())),
    }


def _judges(judges: Mapping[str, Any]) -> Table:
    """Who judged, by what settings, and how it compared with labels."""
    return Table(
        title="Judges",
        header=["judge", "what to know", "measured against labels", "settings"],
        words=4,
        rows=[
            [
                f"{name} (circular)" if facts["circular"] else name,
                facts["note"] or "-",
                bias_sentence(facts["bias"]),
                json.dumps(facts["identity"], ensure_ascii=False),
            ]
            for name, facts in judges.items()
        ],
    )


def _costs(run: Mapping[str, Any]) -> list[Table]:
    """Latency of each arm, time of each stage, peak memory."""
    latency = [
        [row["arm"], row["metric"].replace("_", " "), f"{row['value']:,.1f}", f"{row['n']:,}"]
        for row in run.get("measurements", [])
    ]
    stages = [
        [stage, f"{took['rows']:,}", f"{took['new']:,}", f"{took['seconds']:,.1f}"]
        for stage, took in run.get("stages", {}).items()
    ]
    memory = [[place, f"{peak:,.0f}"] for place, peak in run.get("peak_memory_mib", {}).items()]
    found = [
        Table(
            title="Time the guard adds to one answer, in milliseconds",
            header=["arm", "measured", "ms", "answers"],
            rows=latency,
            words=2,
            note="An answer that passes needs no corrector.",
        ),
        Table(
            title="Stages of the run",
            header=["stage", "rows", "made in this run", "seconds"],
            rows=stages,
        ),
        Table(title="Peak memory in MiB", header=["where", "MiB"], rows=memory),
    ]
    return [table for table in found if table.rows]


def _choices(shown: Sequence[Sample]) -> dict[str, list[str]]:
    """What each filter offers."""
    arms = [arm for sample in shown for arm in sample.arms]
    found: dict[str, list[str | None]] = {
        name: [sample.first[name] for sample in shown] for name in ("benchmark", "scenario", "variant")
    }
    found |= {name: [arm.row[name] for arm in arms] for name in ("arm", "outcome")}
    found["verdict"] = [status for arm in arms for status in arm.statuses]
    return {name: [each for each in dict.fromkeys(values) if each] for name, values in found.items()}


def render(template: str, *, script: str | None = None, **context: Any) -> str:
    """Fill a template of this folder into a page: escaped, self-contained, with its content policy.

    ``script`` is the file name of the one script that may run. A ``str`` in the context is text, never HTML.
    """
    code = "" if script is None else _own_text(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if code else "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
        f"; script-src {allowed}"
    )
    frame = {"policy": policy, "script": Markup(code), "style": Markup(_own_text("page.css.j2"))}  # noqa: S704
    return _templates().get_template(template).render(context | frame)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    indented = partial(json.dumps, indent=2, ensure_ascii=False)
    found.filters |= {"indented": indented, "data_uri": _data_uri}
    return found


def _data_uri(content: bytes, media_type: str) -> str:
    """A file as an address that holds the file itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _finalize(value: Any) -> Any:
    return showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _own_text(name: str) -> str:
    """The page's style or script: a fixed text of ours, which no data enters."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()

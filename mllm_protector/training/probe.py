"""Fitting a linear probe: the backbone reads each text once, then a logistic regression learns in seconds.

What the backbone gives of a text is kept in the cache. A further training on the same texts, such as with
another split, weighting or aim, does not run the backbone again, and one that was stopped goes on from where
it was.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mllm_protector.data.batching import MicroBatchLimit, by_length
from mllm_protector.data.encoding import EncodedAnswer, padded
from mllm_protector.data.table import VARIABLE, cache_folder, code_digest
from mllm_protector.errors import InputError, RunError
from mllm_protector.files import content_key, write_bytes, writing
from mllm_protector.metrics import HIGHER_IS_BETTER
from mllm_protector.models import probe
from mllm_protector.models.backbone import inference, pick_device, to_device
from mllm_protector.models.detector import worst_of
from mllm_protector.models.guard_file import GuardFile
from mllm_protector.models.probe import LinearProbe
from mllm_protector.models.tuning import ProbeTuning
from mllm_protector.processes import first_process_first, is_first_process
from mllm_protector.progress import Progress
from mllm_protector.training.checkpoints import Fitted
from mllm_protector.training.logging import MetricLogger
from mllm_protector.training.loop import Run, Weights

log = logging.getLogger(__name__)

States = NDArray[np.float32]
Rows = Sequence[Sequence[int]]

MADE_BY = [torch.__version__, transformers.__version__, code_digest(probe)]
"""The code that makes states."""

AT_ONCE = 512
"""Texts between two files of the cache: what a killed training loses at most."""


def fit_probe(
    model: LinearProbe,
    tuning: ProbeTuning,
    examples: Sequence[EncodedAnswer],
    windows: Sequence[Rows],
    measure: Callable[[list[float]], dict[str, float]],
    save: Callable[[Path, dict[str, float], Weights], None],
    run: Run,
    *,
    guard: GuardFile,
) -> Fitted:
    """Fit the layer of a probe in place; of several strengths of regularisation the best one is kept.

    Args:
        model: the probe.
        tuning: the strengths.
        examples: encoded.
        windows: the rows of each validation answer.
        measure: metrics of the validation answers' logits.
        save: writes weights and their metrics to a folder.
        run: its ``output_dir``, tracker, and of ``fit`` the limits of a batch and ``best_metric`` count.
        guard: of the detector; names the base.

    Raises:
        RunError: the cache or ``output_dir`` cannot be written.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = [*(example.ids for example in examples), *(row for each in windows for row in each)]
    with first_process_first():
        base = content_key(guard.base, guard.base_fingerprint)
        states = cached_states(model, rows, base=base, pad_id=guard.pad_id, limit=run.fit.validation_batch)
    learnt, judged = states[: len(examples)], states[len(examples) :]
    labels = [example.label for example in examples]
    scaler = StandardScaler()
    scaled = scaler.fit_transform(learnt)
    found: list[tuple[dict[str, float], Weights]] = []
    logger = MetricLogger(
        run.output_dir,
        run.tracker,
        run.fit,
        {"seed": run.seed, "tuning": asdict(tuning)},
        done=0,
        validated=0,
        total=len(tuning.strengths),
        active=is_first_process(),
    )
    with logger:
        for step, strength in enumerate(tuning.strengths, 1):
            regression = LogisticRegression(C=strength, max_iter=1000).fit(scaled, labels)
            weight = regression.coef_[0] / scaler.scale_
            bias = float(regression.intercept_[0] - weight @ scaler.mean_)
            metrics = measure(worst_of((judged @ weight + bias).tolist(), windows))
            logger.validated(step, {**metrics, "strength": strength})
            tensors = {"weight": torch.tensor(weight[None], dtype=torch.float32)}
            found.append((metrics, {**tensors, "bias": torch.tensor([bias], dtype=torch.float32)}))
    sign = 1.0 if run.fit.best_metric in HIGHER_IS_BETTER else -1.0
    best = max(range(len(found)), key=lambda index: sign * found[index][0][run.fit.best_metric])
    metrics, weights = found[best]
    model.score.load_state_dict(weights)
    if is_first_process():
        save(run.output_dir, metrics, weights)
    log.info("regularisation: C = %g is the best of %s", tuning.strengths[best], [*tuning.strengths])
    return Fitted(metrics, best + 1, found[-1][0], len(found))


def cached_states(
    model: LinearProbe, rows: Rows, *, base: str, pad_id: int, limit: MicroBatchLimit
) -> States:
    """(N, width) float32: what a probe reads of N texts; each text is computed once and then kept.

    Args:
        model: the probe; its layer does not count.
        rows: token ids.
        base: a fingerprint of the frozen weights.
        pad_id: the padding of rows.
        limit: of one forward pass.

    Raises:
        InputError: a file of the cache is damaged.
        RunError: the cache cannot be written, or a state is not a number.
    """
    model.to(pick_device())
    first = next(model.body.parameters())
    made_of = [base, model.blocks, model.closing, str(first.dtype), first.device.type, *MADE_BY]
    folder = cache_folder() / "pooled_states" / content_key(made_of)
    texts = {_key(row): row for row in rows}
    known = _kept(folder, texts)
    # The longest first: what does not fit into memory shows at once.
    new = sorted((row for key, row in texts.items() if key not in known), key=len, reverse=True)
    total = sum(map(len, new))
    with Progress("reading", "token", total) as bar, inference(model):
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            found = np.empty((len(part), model.width), np.float32)
            for chosen in by_length([len(row) for row in part], limit):
                batch = to_device(padded([part[index] for index in chosen], pad_id, side="right"), model)
                found[chosen] = model.states(**batch).cpu().numpy()
                bar.update(sum(len(part[index]) for index in chosen))
            if not np.isfinite(found).all():
                raise RunError(
                    "a state of the backbone is not a number; use another backbone or backbone.dtype"
                )
            keys = [_key(row) for row in part]
            _keep(folder, keys, found)
            known.update(zip(keys, found, strict=True))
    return np.stack([known[_key(row)] for row in rows])


def _kept(folder: Path, wanted: Container[bytes]) -> dict[bytes, States]:
    """What the files of a folder hold of the wanted texts, by their keys."""
    kept: dict[bytes, States] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(path)
            each = zip(map(bytes, tensors["keys"]), tensors["states"], strict=True)
            kept.update((key, states.copy()) for key, states in each if key in wanted)
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it, and repeat the command") from None
    return kept


def _keep(folder: Path, keys: Iterable[bytes], states: States) -> None:
    together = np.frombuffer(b"".join(keys), np.uint8).reshape(len(states), -1)
    name = hashlib.sha256(together.tobytes()).hexdigest()[:32]
    with writing(f"{folder}: the cache ({VARIABLE} names its place)"):
        write_bytes(folder / f"{name}.safetensors", save({"keys": together, "states": states}))


def _key(row: Sequence[int]) -> bytes:
    return hashlib.sha256(array("i", row).tobytes()).digest()

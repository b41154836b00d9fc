"""The guard that settings describe, each of its parts in this process or behind an existing engine."""

from typing import Any

from mllm_protector.guard.protector import Protector, Refusal
from mllm_protector.protocols import Corrector
from mllm_protector.serving.settings import GuardSettings


def load(settings: GuardSettings) -> Protector:
    """Load what is computed here, and check what is served elsewhere; the detector keeps its scores.

    Raises:
        InputError: a folder does not hold what it should, or a setting cannot be used.
        RunError: no server of a part can be used.
    """
    protector = _loaded(settings)
    detector: Any = protector.detector  # a ``HarmDetector`` or a ``RemoteDetector``
    detector.known = {}
    return protector


def _loaded(settings: GuardSettings) -> Protector:
    if not settings.detector_urls and settings.detoxifier_url is None:
        return Protector.from_pretrained(
            settings.detector,
            settings.detoxifier,
            base=settings.base,
            device=settings.device,
            max_answer_tokens=settings.max_answer_tokens,
        )
    from mllm_protector.models.detector import load_detector
    from mllm_protector.serving.remote_detector import RemoteDetector

    detector = (
        RemoteDetector(
            settings.detector,
            settings.detector_urls,
            timeout_s=settings.detector_timeout_s,
            tolerance=settings.tolerance,
            api_key_env=settings.api_key_env,
        )
        if settings.detector_urls
        else load_detector(settings.detector, base=settings.base, device=settings.device)
    )
    corrector = _corrector(settings)
    return Protector(detector, corrector, detector.threshold, max_answer_tokens=settings.max_answer_tokens)


def _corrector(settings: GuardSettings) -> Corrector:
    from mllm_protector.models.detoxifier import load_detoxifier
    from mllm_protector.serving.remote_detoxifier import ChatDetoxifier, RemoteDetoxifier

    folder, url, model = settings.detoxifier, settings.detoxifier_url, settings.detoxifier_model
    if url is None or model is None:
        if folder is None:
            return Refusal()
        return load_detoxifier(folder, base=settings.base, device=settings.device)
    given: dict[str, Any] = {"timeout_s": settings.detoxifier_timeout_s, "api_key_env": settings.api_key_env}
    if folder is None:
        return ChatDetoxifier(url, model, **given)
    return RemoteDetoxifier(folder, url, model, **given)

import hashlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from mllm_protector.errors import InputError
from mllm_protector.serving.settings import ApiKey
from tests.serving import builders

DIGEST = hashlib.sha256(b"a key").hexdigest()


@pytest.mark.parametrize(
    ("build", "key", "value", "words"),
    [
        (builders.guard_settings, "detector", None, "detector=null: must be text"),
        (builders.guard_settings, "max_answer_tokens", 0, "max_answer_tokens=0: must be at least 1"),
        (builders.queue_settings, "batch_tokens", 1.5, "batch_tokens=1.5: must be a whole number"),
        (builders.queue_settings, "patience_ms", -1, "patience_ms=-1: must be at least 0"),
        (builders.queue_settings, "deadline_s", float("nan"), "deadline_s=NaN: must be"),
        (builders.queue_settings, "request_mb", 100, "waiting_mb=64: must be at least request_mb=100"),
        (builders.restart_settings, "at_most_s", 0.01, "at_most_s=0.01: must be at least after_s=0.1"),
        (builders.upstream_settings, "url", "ftp://here", "url=ftp://here: must be an address"),
        (builders.upstream_settings, "url", "http://", "url=http://: must be an address"),
        (builders.upstream_settings, "url", "http://a:b@here", "url: must not hold a password"),
        (builders.upstream_settings, "url", "http://here/v1?x=1", "url: must not hold a password"),
        (builders.limit_settings, "body_mb", 0, "body_mb=0: must be at least 0.001"),
        (
            builders.policy_settings,
            "streaming",
            False,
            "streaming=false: must be 'buffer', 'window' or 'off'",
        ),
        (builders.policy_settings, "on_flag", "pass", "on_flag=pass: must be 'rewrite' or 'refuse'"),
        (builders.policy_settings, "shadow", "no", "shadow=no: must be true or false"),
        (builders.policy_settings, "threshold", 1.01, "threshold=1.01: must be at most 1"),
        (builders.policy_settings, "model_thresholds", {"m": True}, "must be a number"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_in_one_line(
    build: Callable[..., Any], key: str, value: Any, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        build(**{key: value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hash_that_is_none_is_refused_without_showing_it() -> None:
    with pytest.raises(InputError, match="64 hexadecimal digits") as caught:
        ApiKey(name="team", sha256="the key itself")
    assert "the key itself" not in str(caught.value)


def test_a_client_is_known_by_its_key_only() -> None:
    keys = [ApiKey(name="one", sha256=DIGEST.upper()), ApiKey(name="two", sha256=64 * "0")]
    settings = builders.front_settings(keys=keys)
    assert settings.key_of("a key") == keys[0]
    for other in ("", "a key ", "one", DIGEST, "\ud800"):
        assert settings.key_of(other) is None, other


def test_names_and_keys_are_not_given_twice() -> None:
    for name, digest in (("one", 64 * "0"), ("two", DIGEST)):
        with pytest.raises(InputError, match="keys: two"):
            builders.front_settings(
                keys=[ApiKey(name="one", sha256=DIGEST), ApiKey(name=name, sha256=digest)]
            )


def test_a_threshold_is_the_keys_or_the_models_or_the_general_one() -> None:
    policy = builders.policy_settings(
        threshold=0.5, model_thresholds={"m/7b": 0.3}, key_thresholds={"team": 0.9}
    )
    assert policy.threshold_of("m/7b", "team") == 0.9
    assert policy.threshold_of("m/7b", None) == policy.threshold_of("m/7b", "others") == 0.3
    assert policy.threshold_of("other", None) == 0.5
    with pytest.raises(InputError, match=r"key_thresholds\.team: no key has this name"):
        builders.front_settings(policy=policy)


def test_a_front_needs_no_torch() -> None:
    modules = "client, guarding, running, settings"
    code = f"import sys; from mllm_protector.serving import {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

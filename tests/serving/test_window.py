"""Streams that are released behind a judged prefix, where all goes well."""

from openai import OpenAI

from mllm_protector.prompts import REFUSAL
from mllm_protector.records import Outcome
from mllm_protector.serving.guarding import Guarded
from tests.serving.fakes import (
    DONE,
    HARMFUL,
    HTTP,
    SAFE,
    USAGE,
    USAGE_CHUNK,
    Piece,
    WordGuard,
    chunk,
    completion,
    message,
    served,
    stream,
)
from tests.serving.test_faulty_upstream import leave
from tests.serving.test_proxy import DETAILS, QUESTION, saying
from tests.serving.test_streaming import ask, ends, told, words
from tests.serving.window_streams import BAD, CUT_OFF, END, A, B, C, asked_for, outcome, paced, part, windows


def test_a_harmless_answer_comes_while_the_upstream_speaks() -> None:
    guard = WordGuard()
    with served(saying(stream(chunk({"content": A}), 30.0, END, DONE)), windows(), guard) as on:
        assert leave(on, stream=True, after=A.encode()) < 5.0
        assert on.count("unscanned_bytes_total") == 0 < on.count("released_bytes_total")
        assert on.count("request_seconds_count", part="first_byte") == 1


def test_all_of_a_harmless_answer_comes_behind_its_verdicts() -> None:
    guard = WordGuard()
    said = paced(guard, A, B, "end", last=(END, USAGE_CHUNK, DONE))
    with served(saying(said), windows(), guard) as on:
        answer = ask(on)
        assert answer.headers["x-mllm-protector"] == "pending"
        events = told(answer)
        assert (words(events), ends(events)) == (A + B + "end", ["stop"])
        assert [each["choices"][0]["delta"].get("role") for each in events[:2]] == ["assistant", None]
        assert (events[-1]["choices"], events[-1]["usage"]) == ([], USAGE)
        [told_by] = [each["mllm_protector"] for each in events if "mllm_protector" in each]
        assert told_by == {
            "outcome": "allowed",
            "choices": [{"index": 0, "outcome": "allowed", "score": None}],
        }
        assert [answer for _, answer, _ in guard.asked] == [A, A + B, A + B + "end"]
        assert on.count("unscanned_bytes_total") == 0
        assert on.count("outcomes_total", outcome="allowed", mode="enforce") == 1


def test_harm_behind_words_that_are_out_cuts_the_stream_and_the_upstream() -> None:
    for reason in ("content_filter", "stop"):
        guard = WordGuard()
        said = paced(guard, A, B, BAD, C, last=(30.0,))
        with served(saying(said), windows(refused_finish_reason=reason), guard) as on:
            answer = ask(on, **DETAILS)
            events = told(answer)
            assert (words(events), ends(events)) == (A + B + CUT_OFF, [reason])
            assert outcome(events) == "refused"
            assert events[-1]["mllm_protector"]["choices"][0]["score"] == 0.95
            assert not any(word in answer.text for word in (HARMFUL, "three", "token"))
            assert on.upstream.gone.wait(5)
            assert on.count("stream_cuts_total", outcome="refused", mode="enforce") == 1
            assert on.count("outcomes_total", outcome="refused", mode="enforce") == 1
            assert on.count("unscanned_bytes_total") == 0


def test_harm_from_the_beginning_is_rewritten_because_nothing_of_it_is_out() -> None:
    guard = WordGuard()
    with served(saying(paced(guard, BAD, A, "end")), windows(), guard) as on:
        answer = ask(on)
        assert answer.headers["x-mllm-protector"] == "rewritten"
        events = told(answer)
        assert (words(events), ends(events)) == (SAFE, ["stop"])
        assert on.count("stream_cuts_total", outcome="refused", mode="enforce") == 0
    with served(saying(paced(guard := WordGuard(), BAD, A)), windows(on_flag="refuse"), guard) as on:
        assert words(told(ask(on))) == REFUSAL


class LastWord(WordGuard):
    """Flags an answer that ends with the harmful piece."""

    async def guard(
        self, query: str, answer: str, *, threshold: float | None = None, rewrite: bool = True
    ) -> Guarded:
        self.asked.append((query, answer, threshold))
        if answer.endswith(BAD):
            return Guarded(Outcome.REFUSED, REFUSAL, 0.9, 0.0)
        return Guarded(Outcome.ALLOWED, answer, 0.1, 0.0)


def test_one_flagged_window_alone_delays_and_two_in_a_row_cut() -> None:
    for texts, hits, shown in (
        ((A, BAD, C, BAD, C), 2, A + BAD + C + BAD + C),
        ((A, BAD, BAD, C), 2, A + CUT_OFF),
        ((A, BAD, C), 1, A + CUT_OFF),
        ((A, BAD, BAD, C), 3, A + BAD + BAD + C),
    ):
        guard = LastWord()
        with served(saying(paced(guard, *texts)), windows(window_hits=hits), guard) as on:
            assert words(told(ask(on))) == shown, (texts, hits)


def test_the_end_is_released_behind_a_verdict_on_the_whole() -> None:
    guard = WordGuard()
    with served(saying(paced(guard, A, HARMFUL)), windows(), guard) as on:
        answer = ask(on)
        events = told(answer)
        assert (words(events), ends(events), outcome(events)) == (A + CUT_OFF, ["content_filter"], "refused")
        assert HARMFUL not in answer.text
        assert on.count("stream_cuts_total", outcome="refused", mode="enforce") == 1


def test_each_of_mixed_choices_has_its_own_state() -> None:
    guard = WordGuard()
    pieces: list[Piece] = []
    rows = [(A, 0), (A, 1), (BAD, 2), (B, 0), (BAD, 1), (B, 2), (C, 0), (C, 1), (C, 2), ("end", 0)]
    for count, (text, index) in enumerate(rows, 1):
        pieces += [chunk({"content": text}, index=index), asked_for(guard, min(count, 8))]
    pieces += [chunk({}, index=index, end="stop") for index in range(3)]
    with served(saying(stream(*pieces, DONE)), windows(), guard) as on:
        body = {**QUESTION, "n": 3, "stream": True}
        answer = HTTP.post(f"{on.url}/v1/chat/completions", json=body)
        events = told(answer)
        assert [words(events, index) for index in range(3)] == [A + B + C + "end", A + CUT_OFF, SAFE]
        of = [each["outcome"] for each in events[-1]["mllm_protector"]["choices"]]
        assert of == ["allowed", "refused", "rewritten"]
        assert HARMFUL not in answer.text
        assert on.count("unscanned_bytes_total") == 0


def test_tool_calls_are_held_to_the_end_and_judged_whole() -> None:
    for word, shown, reason in (("harmless", "", "tool_calls"), (HARMFUL, CUT_OFF, "content_filter")):
        guard = WordGuard()
        calls = [
            chunk({"tool_calls": [{"index": 0, "id": "1", "function": {"arguments": arguments}}]})
            for arguments in ('{"a": "' + word[:4], word[4:] + '"}')
        ]
        said = paced(guard, A, B, last=(*calls, chunk({}, end="tool_calls"), DONE))
        with served(saying(said), windows(), guard) as on:
            events = told(ask(on))
            assert (words(events), ends(events)) == (A + B + shown, [reason])
            found = [each["choices"][0]["delta"].get("tool_calls") for each in events]
            [call] = [each for each in found if each] or [None]
            if shown:
                assert call is None
            else:
                assert call[0]["function"]["arguments"] == '{"a": "harmless"}'


def test_reasoning_is_judged_with_the_text_and_released_by_its_field() -> None:
    for thought, shown in ((part("thought"), (part("thought"), A + B)), (BAD, ("", SAFE))):
        guard = WordGuard()
        first = (chunk({"reasoning_content": thought}), asked_for(guard, 1))
        rest = paced(guard, A, B).pieces
        with served(saying(stream(*first, *rest)), windows(), guard) as on:
            events = told(ask(on))
            deltas = [each["choices"][0]["delta"] for each in events]
            assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == shown[0]
            assert words(events) == shown[1]
            assert guard.asked[-1][1] == f"{thought}\n\n{A}{B}"


def test_log_probabilities_wait_for_the_verdict_on_the_whole() -> None:
    guard = WordGuard()
    with served(saying(paced(guard, A, B)), windows(), guard) as on:
        events = told(ask(on))
        given = [each["choices"][0]["logprobs"] for each in events]
        assert [each for each in given if each] == [{"content": [{"token": A}, {"token": B}]}]
        assert given[-1]


def test_shadow_mode_passes_every_event_at_once_and_counts_what_would_have_happened() -> None:
    guard = WordGuard()
    said = paced(guard, A, BAD, C)
    with served(saying(said), windows(shadow=True), guard) as on:
        answer = ask(on)
        raw = b"".join(piece for piece in said.pieces if isinstance(piece, bytes))
        assert answer.content == raw
        assert answer.headers["x-mllm-protector"] == "shadow-pending"
        assert on.count("unscanned_bytes_total") == len(raw) - len(DONE)
        assert on.count("stream_cuts_total", outcome="refused", mode="shadow") == 1
        assert on.count("outcomes_total", outcome="refused", mode="shadow") == 1


def test_an_answer_that_must_be_json_or_is_no_stream_is_held() -> None:
    guard = WordGuard()
    body = {**QUESTION, "stream": True, "response_format": {"type": "json_object"}}
    with served(
        saying(stream(chunk({"content": A}), chunk({"content": BAD}), END, DONE)), windows(), guard
    ) as on:
        answer = HTTP.post(f"{on.url}/v1/chat/completions", json=body)
        assert answer.headers["x-mllm-protector"] == "rewritten"
        assert [asked for _, asked, _ in guard.asked] == [A + BAD]
    with served(saying(completion(message(A * 3), message(BAD, 1))), windows()) as on:
        answer = ask(on)
        assert answer.headers["x-mllm-protector"] == "rewritten"
        events = told(answer)
        assert (words(events, 0), words(events, 1)) == (A * 3, SAFE)


def test_the_official_client_reads_it() -> None:
    guard = WordGuard()
    with served(saying(paced(guard, A, B, "end", last=(END, USAGE_CHUNK, DONE))), windows(), guard) as on:
        client = OpenAI(base_url=f"{on.url}/v1", api_key="client", max_retries=0)
        with client.chat.completions.stream(
            model="m", messages=[{"role": "user", "content": "Why?"}], stream_options={"include_usage": True}
        ) as stream:
            whole = stream.get_final_completion()
        [choice] = whole.choices
        assert (choice.message.content, choice.message.role) == (A + B + "end", "assistant")
        assert choice.finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.total_tokens == USAGE["total_tokens"]
    guard = WordGuard()
    with served(saying(paced(guard, A, BAD, C)), windows(), guard) as on:
        client = OpenAI(base_url=f"{on.url}/v1", api_key="client", max_retries=0)
        events = [
            *client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Why?"}], stream=True
            )
        ]
        said = "".join(event.choices[0].delta.content or "" for event in events)
        assert (said, events[-1].choices[0].finish_reason) == (A + CUT_OFF, "content_filter")
        assert (events[-1].model_extra or {})["mllm_protector"]["outcome"] == "refused"

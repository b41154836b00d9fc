"""Events are cut at CR and LF bytes, wherever the stream is cut."""

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector.serving.sse import Event, Frames, frame


def events(*pieces: bytes) -> list[str]:
    frames = Frames()
    found = [event.data for piece in pieces for event in frames.feed(piece)]
    last = frames.end()
    return found + ([last.data] if last else [])


def test_every_end_of_a_line_is_one() -> None:
    for end in ("\n", "\r", "\r\n"):
        text = f"data: a{end}data:b{end}{end}: note{end}{end}event: x{end}id: 3{end}data: c{end}{end}"
        assert events(text.encode()) == ["a\nb", "c"], repr(end)


def test_no_other_character_ends_a_line() -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix"
    assert events(f"data: {text}\n\n".encode()) == [text]


@given(st.data())
def test_it_does_not_matter_where_a_stream_is_cut(data: st.DataObject) -> None:
    parts = st.sampled_from(["data: ä\u2028", "data:", ":", "\r", "\n", "\r\n", "x: y", "\ufeff"])
    whole = "".join(data.draw(st.lists(parts, max_size=12))).encode()
    at = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    pieces = [whole[start:stop] for start, stop in zip([0, *at], [*at, len(whole)], strict=True)]
    assert events(*pieces) == events(whole)


def test_a_stream_without_its_last_blank_line_keeps_its_last_event() -> None:
    assert events(b"data: a\n\ndata: b") == ["a", "b"]
    assert events(b"data: a\n\ndata: b\n") == ["a", "b"]


def test_raw_events_are_whole_and_keep_their_other_fields() -> None:
    [event] = Frames().feed(b"event: x\r\ndata: a\r\n\r\n")
    assert event == Event("a", b"event: x\ndata: a\n\n")


def test_a_frame_is_read_as_what_it_was_made_of() -> None:
    for text in ("a", "a\nb", "", '{"a": "\u2028"}'):
        assert events(frame(text)) == [text]

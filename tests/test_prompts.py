import pytest

from mllm_protector import prompts


def test_the_pieces_of_a_template_join_to_the_template():
    pieces = list(prompts.pieces("a {query} b {answer}"))
    assert pieces == [("a ", "query"), (" b ", "answer"), ("", None)]


def test_every_template_of_ours_shows_query_and_answer_once_and_others_are_refused():
    for template in (prompts.DETECTOR, prompts.DETOXIFIER, prompts.OFFICIAL_DETECTOR):
        assert prompts.require_fields(template, {"query", "answer"}) == template
    for template in ("{answer}", "{query} {answer} {answer}", "{query} {answer} {image}", ""):
        with pytest.raises(ValueError, match="each once"):
            prompts.require_fields(template, {"query", "answer"})


def test_every_edit_of_a_template_changes_its_hash():
    assert prompts.template_hash("{query} {answer}") == prompts.template_hash("{query} {answer}")
    assert prompts.template_hash("{query} {answer}") != prompts.template_hash("{query}  {answer}")

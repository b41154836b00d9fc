import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mllm_protector.data.tokens import encode_texts
from mllm_protector.errors import InputError
from mllm_protector.models.backbone import Backbone
from mllm_protector.models.detoxifier import (
    TEMPERATURE,
    Detoxifier,
    NucleusSampling,
    load_detoxifier,
    load_untrained,
)
from mllm_protector.models.tuning import Tuning
from mllm_protector.records import Correction
from tests.models.builders import Family

QUERIES = ["Bread?", "Why is the sky blue?", "x"]
ANSWERS = ["bad", "worse", "the worst of all answers"]
LEARNT = ["Ask a baker.", "", "no no no no no no"]

Maker = Callable[..., Detoxifier]


def correct(detoxifier: Detoxifier) -> list[str]:
    return detoxifier.correct(queries=QUERIES, answers=ANSWERS)


@pytest.fixture(scope="module")
def taught(make_detoxifier: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved detoxifier that knows three corrections by heart."""
    detoxifier = make_detoxifier(max_new_tokens=30)
    encoder, model = detoxifier.encoder, detoxifier.model
    rows = zip(QUERIES, ANSWERS, LEARNT, strict=True)
    records = [Correction(query=one, rejected=two, accepted=three) for one, two, three in rows]
    batch = encoder(encoder.encode_records(records))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    folder = tmp_path_factory.mktemp("taught") / "detoxifier"
    detoxifier.save(folder)
    return folder


def test_it_writes_what_it_learnt_stops_at_the_end_and_keeps_the_order_in_any_batch(taught: Path):
    assert correct(load_detoxifier(taught, device="cpu")) == LEARNT
    for batch_size in (1, 2, 3):
        detoxifier = load_detoxifier(taught, device="cpu", batch_size=batch_size)
        assert again(detoxifier, 0, slice(None, None, -1)) == LEARNT[::-1], batch_size


def test_a_rewrite_has_at_most_so_many_tokens(taught: Path):
    detoxifier = load_detoxifier(taught, device="cpu", max_new_tokens=3)
    tokenizer = detoxifier.encoder.tokenizer
    cut = [tokenizer.decode(ids[:3]).strip() for ids in encode_texts(tokenizer, LEARNT)]
    assert cut != LEARNT
    assert correct(detoxifier) == cut


def test_a_long_answer_leaves_room_for_its_rewrite(make_detoxifier: Maker, monkeypatch: pytest.MonkeyPatch):
    detoxifier = make_detoxifier(max_new_tokens=60)
    encoder, lengths = detoxifier.encoder, []
    pad_prompts = encoder.pad_prompts
    monkeypatch.setattr(
        encoder, "pad_prompts", lambda rows: lengths.extend(map(len, rows)) or pad_prompts(rows)
    )
    detoxifier.correct(queries=["x"], answers=["the worst of all answers " * 50])
    assert lengths == [encoder.max_length - 60]


def test_a_rewrite_that_leaves_no_room_for_a_prompt_is_refused_at_once(taught: Path):
    with pytest.raises(InputError, match=r"max_length=96: .* 96 are kept"):
        load_detoxifier(taught, device="cpu", max_new_tokens=96)


def test_the_base_cannot_change_how_it_decodes(taught: Path, tmp_path: Path):
    folder = shutil.copytree(taught, tmp_path / "penalised")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"repetition_penalty": 9.0, "min_new_tokens": 5}
    path.write_text(json.dumps(settings))
    assert correct(load_detoxifier(folder, device="cpu")) == LEARNT


def again(detoxifier: Detoxifier, attempt: int, order: slice = slice(None)) -> list[str]:
    return detoxifier.correct(queries=QUERIES[order], answers=ANSWERS[order], attempt=attempt)


def test_a_later_attempt_is_another_text_and_always_the_same_one(make_detoxifier: Maker):
    detoxifier = make_detoxifier()
    torch.manual_seed(1)
    texts = [again(detoxifier, attempt) for attempt in range(4)]
    state = torch.random.get_rng_state()
    assert len({tuple(some) for some in texts}) == 4
    torch.manual_seed(2)
    assert [again(detoxifier, attempt) for attempt in range(4)] == texts
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_later_attempt_does_not_depend_on_the_batch(make_detoxifier: Maker):
    detoxifier = make_detoxifier()
    texts = again(detoxifier, 1)
    for batch_size in (1, 2):
        detoxifier.batch_size = batch_size
        assert again(detoxifier, 1, slice(None, None, -1)) == texts[::-1], batch_size
        assert again(detoxifier, 1, slice(1, 2)) == texts[1:2], batch_size


def test_tokens_are_drawn_as_often_as_they_are_likely():
    chances = torch.tensor([0.5, 0.3, 0.16, 0.04])
    logits = (chances.log() * TEMPERATURE).repeat(4000, 1)
    drawn = NucleusSampling(range(4000))(torch.empty(0), logits).argmax(-1).bincount(minlength=4) / 4000
    # The first three hold TOP_P together; the last one is never drawn.
    assert drawn[3] == 0
    assert torch.allclose(drawn[:3], chances[:3] / 0.96, atol=0.03)


@pytest.mark.parametrize("moved", [False, True])
def test_the_untrained_base_is_asked_in_the_same_way(
    taught: Path, bases: dict[Family, Path], tmp_path: Path, moved: bool
):
    base = shutil.copytree(bases["llama"], tmp_path / "moved") if moved else None
    untrained = load_untrained(taught, base=str(base) if base else None, device="cpu")
    trained = load_detoxifier(taught, device="cpu")
    expected = Backbone(name=str(bases["llama"])).load_causal_lm().state_dict()
    assert all(torch.equal(weights, expected[name]) for name, weights in untrained.model.state_dict().items())
    rows = {"queries": QUERIES, "answers": ANSWERS}
    assert untrained.encoder.encode(**rows) == trained.encoder.encode(**rows)
    assert untrained.max_new_tokens == trained.max_new_tokens
    assert untrained.correct(**rows) != LEARNT
    assert untrained.card.identity != trained.card.identity


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_left_padding_does_not_change_what_is_written(make_detoxifier: Maker, family: Family):
    detoxifier = make_detoxifier(family)
    encoder = detoxifier.encoder
    prompts = encoder.encode(queries=QUERIES, answers=ANSWERS)

    def generate(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = encoder.pad_prompts(rows)
        made = detoxifier.model.eval().generate(
            **batch, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return batch["attention_mask"], made.logits[0]

    mask, together = generate(prompts)
    alone = torch.cat([generate([row])[1] for row in prompts])
    assert mask[:, -1].tolist() == [1, 1, 1]
    assert mask[:, 0].tolist() != [1, 1, 1]
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    texts = correct(detoxifier)
    detoxifier.batch_size = 1
    assert correct(detoxifier) == texts


def test_a_loaded_detoxifier_writes_exactly_as_the_saved_one(
    make_detoxifier: Maker, tuning: Tuning, tmp_path: Path
):
    detoxifier = make_detoxifier(tuning=tuning)
    detoxifier.save(tmp_path)
    loaded = load_detoxifier(tmp_path, device="cpu", max_new_tokens=8)
    encoder = detoxifier.encoder
    batch = encoder.pad_prompts(encoder.encode(queries=QUERIES, answers=ANSWERS))
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, detoxifier.model.eval()(**batch).logits)
    assert correct(loaded) == correct(detoxifier)


def test_the_prompt_layout_comes_from_the_checkpoint(make_detoxifier: Maker, taught: Path, tmp_path: Path):
    assert load_detoxifier(taught, device="cpu").encoder.prompt == "{query}|{answer}>"
    folder = shutil.copytree(taught, tmp_path / "chat")
    path = folder / "guard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat": True}))
    encoder = load_detoxifier(folder, device="cpu").encoder
    [prompt] = encoder.encode(queries=["q"], answers=["a"])
    assert encoder.tokenizer.decode(prompt) == "<s>User: q|a>\nAssistant: "


def test_an_answer_is_never_rewritten_without_its_question(make_detoxifier: Maker):
    detoxifier = make_detoxifier()
    with pytest.raises(TypeError, match="queries"):
        detoxifier.correct(answers=ANSWERS)
    with pytest.raises(InputError, match="queries has 1, answers has"):
        detoxifier.correct(queries=QUERIES[:1], answers=ANSWERS)


def test_an_answer_that_is_too_long_is_said_to_be_read_by_its_ends(
    make_detoxifier: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_detoxifier()
    made.correct(queries=["a?", "b?"], answers=["short", "word " * 500])
    assert caplog.messages == ["1 of 2 answers were too long: their head and tail were read"]
    caplog.clear()
    made.correct(queries=["a?"], answers=["short"])
    assert caplog.messages == []

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seedbed.config import SamplingOptions
from seedbed.errors import ConfigError
from seedbed.generate import MOST_GUESSED, TextStream, generate, worth_guessing
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.model.decoding import DecodingModel
from seedbed.text.tokenizer import Tokenizer, train_bpe

POEM = "Zwölf große Füchse 🦊 jagten den Mond 🌕 über das Eis, und der Mond ❄ lachte: 你好!"
GREEDY = SamplingOptions(greedy=True, repetition_penalty=1.0, max_new_tokens=200)
SAMPLED = SamplingOptions(temperature=1.5, top_k=0, repetition_penalty=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["nothing but plain words, so that the rest is written byte by byte"], 280)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    """A model that knows the poem by heart to the eos after it, with and without the eos before it."""
    torch.manual_seed(0)
    config = from_scratch(
        request.param, vocab_size=tokenizer.vocab_size, d_model=48, num_layers=2, num_heads=4, max_seq_len=128
    )
    model = Decoder(config)
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(POEM), tokenizer.eos_id])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        row = ids[step % 2 :]
        loss = cross_entropy(model.logits(model(row[None, :-1]))[0], row[1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss.item() < 0.05
    return model


def test_it_says_the_poem_from_an_empty_prompt_to_eos(model: Decoder, tokenizer: Tokenizer) -> None:
    [completion] = generate(model, tokenizer, [""], GREEDY)
    assert completion.text == POEM
    assert completion.finish_reason == "eos"
    assert completion.token_ids == tuple(tokenizer.encode(POEM))
    assert len(POEM) < len(completion.token_ids)  # characters were split over tokens


def test_streamed_pieces_are_whole_characters_and_add_up(model: Decoder, tokenizer: Tokenizer) -> None:
    pieces: list[list[str]] = [[], [], []]
    completions = generate(
        model, tokenizer, ["", "", POEM[:20]], GREEDY, on_text=lambda i, text: pieces[i].append(text)
    )
    assert ["".join(p) for p in pieces] == [c.text for c in completions]
    assert completions[0].text == POEM
    for piece in (piece for row in pieces for piece in row):
        assert piece
        assert "\ufffd" not in piece
    assert len(pieces[0]) > len(POEM) / 3  # as it is written, not at the end


def test_a_text_cut_by_length_shows_its_unfinished_character(model: Decoder, tokenizer: Tokenizer) -> None:
    before = POEM[: POEM.index("🦊")]
    tokens = len(tokenizer.encode(before)) + 2  # the space may be one with the first byte; then two more
    options = GREEDY.model_copy(update={"max_new_tokens": tokens})
    pieces: list[str] = []
    [completion] = generate(model, tokenizer, [""], options, on_text=lambda _, text: pieces.append(text))
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == tokens
    assert completion.text == before + "\ufffd"
    assert "".join(pieces) == completion.text


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, GREEDY.model_copy(update={"max_new_tokens": 7})])
def test_a_text_is_the_same_whether_it_is_watched_or_not(
    model: Decoder, tokenizer: Tokenizer, options: SamplingOptions
) -> None:
    """Sampled ones have bytes that are no character, in the middle and at the end."""
    prompts = ["", "Zwölf", POEM[:30], *["plain"] * 5]
    watched = generate(model, tokenizer, prompts, options, on_text=lambda *_: None)
    assert generate(model, tokenizer, prompts, options) == watched


@pytest.mark.parametrize("stop", ["🌕", "den Mond", "t", "Eis, und", "你好!", "Zwölf"])
def test_text_ends_before_a_stop_string(model: Decoder, tokenizer: Tokenizer, stop: str) -> None:
    pieces: list[str] = []
    options = GREEDY.model_copy(update={"stop": ("not there", stop)})
    [completion] = generate(model, tokenizer, [""], options, on_text=lambda _, text: pieces.append(text))
    assert completion.finish_reason == "stop"
    assert completion.text == POEM[: POEM.index(stop)]
    assert "".join(pieces) == completion.text


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(model: Decoder, tokenizer: Tokenizer) -> None:
    options = GREEDY.model_copy(update={"stop": ("Füchse 🌕", "!?", "好!!")})
    [completion] = generate(model, tokenizer, [""], options)
    assert completion.text == POEM
    assert completion.finish_reason == "eos"


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (("bcd",), "a"),
        (("abcx", "bc"), "a"),
        (("d", "abcd"), ""),
        (("abcd", "bc"), "a"),  # complete first, though it began later
        (("zz",), "abcdabcd"),
        (("dab", "cd"), "ab"),
    ],
)
def test_stop_strings_do_not_depend_on_where_tokens_end(
    tokenizer: Tokenizer, stops: tuple[str, ...], shown: str
) -> None:
    assert _stream(tokenizer, tokenizer.encode("abcdabcd"), stops) == shown


def test_a_stop_string_inside_one_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the rest is")
    assert len(ids) < len(" the rest is")
    assert _stream(tokenizer, ids, ("est",)) == " the r"


def test_bytes_that_never_become_a_character_are_shown_as_such(tokenizer: Tokenizer) -> None:
    fox = tokenizer.encode("🦊")
    assert len(fox) == 4
    broken = [*fox[:2], *tokenizer.encode("é"), fox[3], fox[3], *tokenizer.encode("x"), *fox, *fox[:3]]
    assert _stream(tokenizer, broken, ()) == tokenizer.decode(broken)


def _stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> str:
    stream = TextStream(tokenizer, tokenizer.encode("prompt é"), stops)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        if stream.stopped:
            return shown
    return shown + stream.close()


def test_rows_do_not_depend_on_each_other(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = ["", POEM[:30], "Zwölf", "words", POEM]
    together = generate(model, tokenizer, prompts, SAMPLED)
    assert together == generate(model, tokenizer, prompts, SAMPLED, batch_size=2)
    assert together == [generate(model, tokenizer, [prompt], SAMPLED)[0] for prompt in prompts]
    assert together == generate(model, tokenizer, prompts[::-1], SAMPLED)[::-1]


def test_rows_do_not_depend_on_each_other_in_bfloat16_either(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = ["", POEM[:30], "Zwölf", "words", POEM]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = generate(model, tokenizer, prompts, SAMPLED)
        assert together == [generate(model, tokenizer, [prompt], SAMPLED)[0] for prompt in prompts]
    assert together != generate(model, tokenizer, prompts, SAMPLED)  # autocast is heard


@pytest.mark.parametrize(
    "changes",
    [
        {"greedy": True, "repetition_penalty": 1.0},
        {"greedy": True, "no_repeat_ngram": 30, "stop": ("zz",)},
        {"temperature": 0.3, "repetition_penalty": 1.02},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guesses_change_nothing_but_the_number_of_steps(
    model: Decoder,
    tokenizer: Tokenizer,
    changes: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = SamplingOptions(max_new_tokens=90, **changes)
    prompts = ["", "plain words, plain words, plain", POEM[:30], "Zwölf Zwölf Zw"]
    steps = 0
    step = DecodingModel.step

    def counted(self: DecodingModel, tokens: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return step(self, tokens)

    monkeypatch.setattr(DecodingModel, "step", counted)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        guessed, taken = generate(model, tokenizer, prompts, options), steps
        monkeypatch.setattr("seedbed.lookup.Lookup.guess", lambda *_: [])
        assert generate(model, tokenizer, prompts, options) == guessed
    assert taken < steps - taken


def test_the_seed_decides_and_a_repeated_prompt_differs(model: Decoder, tokenizer: Tokenizer) -> None:
    state = torch.get_rng_state()
    first, second = generate(model, tokenizer, ["words", "words"], SAMPLED)
    assert first.text != second.text
    assert generate(model, tokenizer, ["words"] * 2, SAMPLED, batch_size=1) == [first, second]
    [other] = generate(model, tokenizer, ["words"], SAMPLED.model_copy(update={"seed": 1}))
    assert other.text not in (first.text, second.text)
    assert torch.get_rng_state().equal(state)


def test_rows_end_one_by_one(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = [POEM[:60], "", POEM[:-1]]
    options = GREEDY.model_copy(update={"max_new_tokens": 40})
    rows = generate(model, tokenizer, prompts, options)
    assert [row.finish_reason for row in rows] == ["eos", "length", "eos"]
    assert rows[0].text == POEM[60:]
    assert rows[2].text == POEM[-1:]
    assert len(rows[1].token_ids) == 40


def test_it_ends_where_the_positions_end(model: Decoder, tokenizer: Tokenizer) -> None:
    full, short = tokenizer.decode([300 - 30] * 128), "Z"
    rows = generate(model, tokenizer, [full, short], GREEDY.model_copy(update={"max_new_tokens": 1000}))
    for row, prompt in zip(rows, (full, short), strict=True):
        if row.finish_reason == "length":
            # Every token but the last took a position.
            assert len(tokenizer.encode(prompt)) + len(row.token_ids) == 128 + 1
    assert len(tokenizer.encode(full)) == 128
    assert rows[0].finish_reason == "length"


def test_prompts_longer_than_the_context_are_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    long = "Z" * 129
    with pytest.raises(ConfigError) as error:
        generate(model, tokenizer, ["fine", long, long + "Z"], GREEDY)
    assert len(error.value.problems) == 2
    assert "Prompt 2 has 129 tokens; the model has 128 positions" in str(error.value)


def test_an_empty_stop_string_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="empty"):
        generate(model, tokenizer, ["x"], GREEDY.model_copy(update={"stop": ("",)}))


def test_no_prompts_give_no_completions(model: Decoder, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, [], GREEDY) == []


def test_the_training_mode_is_restored(model: Decoder, tokenizer: Tokenizer) -> None:
    model.train()
    generate(model, tokenizer, ["x"], SAMPLED)
    assert model.training
    with pytest.raises(ConfigError):
        generate(model, tokenizer, ["Z" * 500], SAMPLED)
    assert model.training
    model.eval()
    generate(model, tokenizer, ["x"], SAMPLED)
    assert not model.training


def test_an_empty_prompt_starts_from_bos_where_there_is_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "w"}))
    with_bos = Tokenizer.load(tmp_path)
    torch.manual_seed(1)
    config = from_scratch(
        "llama", vocab_size=tokenizer.vocab_size, d_model=32, num_layers=1, num_heads=2, max_seq_len=64
    )
    random = Decoder(config)
    [from_bos] = generate(random, with_bos, [""], SAMPLED)
    [from_eos] = generate(random, tokenizer, [""], SAMPLED)
    [from_w] = generate(random, tokenizer, ["w"], SAMPLED)
    assert from_bos.token_ids == from_w.token_ids != from_eos.token_ids


def test_half_precision_models_write_too(model: Decoder, tokenizer: Tokenizer) -> None:
    rows = generate(model.to(torch.bfloat16), tokenizer, ["", "Zwölf große"], GREEDY)
    model.to(torch.float32)
    assert rows[0].text.startswith("Zwölf")


def test_guesses_follow_luck_and_room() -> None:
    """Rows that never repeat themselves pay for no guess; the more rows there are, the fewer guesses are free."""
    assert worth_guessing([0.0] * 8, 8) == 0
    assert worth_guessing([1.0], 1) == MOST_GUESSED
    for luck in (0.3, 0.6, 0.9):
        counts = [worth_guessing([luck] * rows, rows) for rows in (1, 2, 4, 8, 16, 64)]
        assert counts == sorted(counts, reverse=True)
    by_luck = [worth_guessing([luck] * 8, 8) for luck in (0.1, 0.5, 0.8, 0.99)]
    assert by_luck == sorted(by_luck) and by_luck[0] < by_luck[-1]
    assert worth_guessing([0.1, 0.99], 2) <= worth_guessing([0.99, 0.99], 2)

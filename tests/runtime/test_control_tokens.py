"""Control tokens in prompts and as stops: in a checkpoint where a token that it writes is renamed to one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_with_mlx_lm

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.stop import StopStrings
from mlx_mixtral.runtime.marked_stops import MarkedStops

PROMPT = "And God said"
SAID = 12


@pytest.fixture(scope="module")
def written(short_model: Mixtral) -> list[int]:
    return list(short_model.generate(PROMPT, max_tokens=SAID).token_ids)


@pytest.fixture(scope="module")
def at(written: list[int]) -> int:
    """Where the token stands that becomes a control token: after some others, and not among them."""
    return next(i for i in range(3, SAID - 2) if written[i] not in written[:i])


@pytest.fixture(scope="module")
def folder(short: Path, written: list[int], at: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(short, tmp_path_factory.mktemp("marked") / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(written[at]): {"content": "<|halt|>", "special": True, "normalized": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    return folder


@pytest.fixture(scope="module")
def marked(folder: Path) -> Iterator[Mixtral]:
    with load(folder) as model:
        yield model


Texts = Callable[[str | list[str]], list[tuple[list[int], str, str]]]


@pytest.fixture(params=["alone", "batched"])
def generated(request: pytest.FixtureRequest, marked: Mixtral) -> Texts:
    """Ids, text and reason of the same prompt, by itself or twice in a batch."""

    def run(stop: str | list[str]) -> list[tuple[list[int], str, str]]:
        if request.param == "alone":
            found = [marked.generate(PROMPT, max_tokens=SAID, stop=stop)]
        else:
            found = marked.generate_batch([PROMPT, PROMPT], max_tokens=SAID, stop=stop)
        return [(list(one.token_ids), one.text, one.finish_reason) for one in found]

    return run


def test_a_stop_that_spells_a_control_token_stops_at_it(
    generated: Texts, marked: Mixtral, written: list[int], at: int
) -> None:
    before = marked.tokenizer.decode(written[:at], continues=True)
    for stop in ("<|halt|>", ["never said", "<|halt|>"]):
        assert all(one == (written[: at + 1], before, "stop") for one in generated(stop))
    whole = marked.tokenizer.decode(written, continues=True)
    assert all(one == (written, whole, "length") for one in generated("|halt|"))
    assert all(one == (written, whole, "length") for one in generated([]))


def test_a_stop_may_go_on_before_or_after_its_control_token(
    generated: Texts, marked: Mixtral, written: list[int], at: int
) -> None:
    tokenizer = marked.tokenizer
    before = tokenizer.decode(written[:at], continues=True)
    following = tokenizer.decode(written[at + 1 : at + 2], continues=True)
    assert following
    assert all(one == (written[: at + 2], before, "stop") for one in generated(f"<|halt|>{following}"))
    assert all(one == (written[: at + 1], before[:-2], "stop") for one in generated(f"{before[-2:]}<|halt|>"))
    whole = tokenizer.decode(written, continues=True)
    assert all(one == (written, whole, "length") for one in generated(f"<|halt|>{following}§"))


def test_the_stop_that_matched_is_told_as_it_was_given(marked: Mixtral) -> None:
    for stops, said in ((["never said", "<|halt|>"], "<|halt|>"), (["never said"], None)):
        chunks = list(marked.stream(PROMPT, max_tokens=SAID, stop=stops))
        assert [chunk.stop_string for chunk in chunks] == [None] * (len(chunks) - 1) + [said]


def test_the_same_characters_as_text_stop_too(marked: Mixtral) -> None:
    for stop in ("<|halt|>", "a<|halt|>b"):
        stops = MarkedStops([stop], marked.tokenizer)
        shown = "".join(stops.add(char) for char in f"say {stop} now")
        assert (shown, stops.is_stopped()) == ("say ", True)
    plain, stops = StopStrings(["§"]), MarkedStops(["§"], marked.tokenizer)
    for text in ("a", "", "b§c"):
        assert stops.add(text, 3) == plain.add(text)
    with pytest.raises(InvalidRequestError, match="empty or not a string"):
        MarkedStops([""], marked.tokenizer)


def test_a_completions_prompt_has_the_control_tokens_it_spells(
    marked: Mixtral, folder: Path, written: list[int], at: int
) -> None:
    prompt = "Hello <|halt|>there</s> [INST]"
    theirs = load_with_mlx_lm(folder).encode(prompt, add_special_tokens=False)
    stats = marked.generate(prompt, max_tokens=1).stats
    assert stats.prompt_tokens == len(theirs) + 1
    assert stats.prompt_special_tokens == stats.to_dict()["prompt_special_tokens"] == 2
    assert {written[at], 2} <= set(theirs)
    as_text = marked.generate(prompt, max_tokens=1, special=False).stats
    assert as_text.prompt_tokens == len(marked.tokenizer.encode(prompt)) > stats.prompt_tokens
    assert as_text.prompt_special_tokens == 0
    rows = marked.generate_batch([prompt, "Hello"], max_tokens=1)
    assert [row.stats.prompt_special_tokens for row in rows] == [2, 0]
    assert marked.generate_batch([prompt], max_tokens=1, special=False)[0].stats.prompt_tokens == as_text.prompt_tokens
    with pytest.raises(InvalidRequestError, match="special is 'no'"):
        marked.generate(prompt, special="no")  # type: ignore[arg-type]


def test_in_a_chat_they_stay_text(marked: Mixtral, written: list[int], at: int) -> None:
    ids = marked.tokenizer.encode_chat([{"role": "user", "content": "Hello <|halt|></s>"}])
    assert not {written[at], 2} & set(ids)
    reply = marked.chat([{"role": "user", "content": "Hello <|halt|>"}], max_tokens=2)
    assert reply.stats.prompt_special_tokens == 0


def test_a_chat_takes_stops_and_another_format(short: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with load(short, chat_template="alpaca") as model:
        assert model.tokenizer.chat_format == "alpaca"
        reply = model.chat(messages, max_tokens=8, sampling=SamplingParams())
        first = reply.token_ids[0]
        stopped = model.chat(messages, max_tokens=8, sampling=SamplingParams(), stop_token_ids=[first])
        assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ((first,), "", "stop")
    with pytest.raises(InvalidRequestError, match="formats are chatml"):
        load(short, chat_template="chatty")
    with pytest.raises(InvalidRequestError, match="tokenizer is 'spm'"):
        load(short, tokenizer="spm")


def test_a_turns_end_that_is_only_text_ends_a_chat(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.content }}<|halt|>{% endfor %}"
    messages = [{"role": "user", "content": "Hello"}]
    with load(short, chat_template=template) as model:
        free = model.chat(messages, max_tokens=8, sampling=SamplingParams())
        last = next(i for i in range(2, 8) if free.token_ids[i] not in free.token_ids[:i])
        # As if the vocabulary spelled the marker by an ordinary piece.
        monkeypatch.setitem(model.tokenizer._surfaces, free.token_ids[last], "<|halt|>")
        reply = model.chat(messages, max_tokens=8, sampling=SamplingParams(), stop="never said")
        assert reply.token_ids == free.token_ids[: last + 1]
        assert (reply.text, reply.finish_reason) == (model.tokenizer.decode(reply.token_ids[:-1]), "stop")

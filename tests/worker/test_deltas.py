"""What is told of an answer while it is made is a beginning of its text, whatever its tokens and stop strings are."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramill.producer.heard import AnswerChanged, Heard
from loramill.schemas.prompt import Limits, Prompter
from loramill.schemas.request import Row, parse_line
from loramill.schemas.response import Answer, ok_line
from loramill.schemas.said import Said, SaidChoice
from loramill.worker.answers import Answers
from loramill.worker.deltas import Telling
from loramill.worker.request import Request, Sampling, TokenLogprob
from loramill.worker.result_lines import choice
from loramill.worker.sequence import Sequence

LIMITS = Limits(4096, 400)


def byte_level() -> Any:
    """A token a byte, some pairs of them, and two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("Ã", "¼"), ("Ġ", "c")]
    vocab = {char: index for index, char in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece() -> Any:
    """Words with a low line before them, and a token for each byte, as Llama 2 has them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁a", "ab", "b", "c", "▁the", "é", "\ufffd"]
    vocab = {word: index for index, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


KINDS = {"byte level": Prompter(byte_level(), LIMITS), "sentencepiece": Prompter(sentencepiece(), LIMITS)}
SIZES = {kind: len(prompter._tokenizer.get_vocab()) for kind, prompter in KINDS.items()}
SHARP = {kind: [p._tokenizer.convert_tokens_to_ids(one) for one in ("Ã", "¼", "a", "b", "<0xC3>", "<0xA9>", "▁")]
         for kind, p in KINDS.items()}  # fmt: skip
"""Tokens that are torn characters, or parts of stop strings."""


def row_of(**body: Any) -> Row:
    return parse_line(orjson.dumps({"id": "r", "prompt": "p", "temperature": 0, **body}))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[list[int]], list[str], list[bool]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    sharp = [token for token in SHARP[kind] if token is not None]
    token = st.one_of(st.integers(0, SIZES[kind] - 1), st.sampled_from(sharp))
    tokens = draw(st.lists(st.lists(token, min_size=1, max_size=39), min_size=1, max_size=3))
    stop = st.one_of(st.text("ab cé\ufffd", min_size=1, max_size=4), st.just("abab"))
    return kind, tokens, draw(st.lists(stop, max_size=3)), draw(st.lists(st.booleans(), min_size=40, max_size=40))


@given(answers(), st.booleans())
def test_what_is_told_and_the_rest_are_the_text(
    drawn: tuple[str, list[list[int]], list[str], list[bool]], is_chat: bool
) -> None:
    kind, all_tokens, stop, looks = drawn
    prompter = KINDS[kind]
    shape = {"messages": [{"role": "user", "content": "p"}], "prompt": None} if is_chat else {}
    logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if is_chat else {"logprobs": 1}
    row = row_of(stop=stop or None, n=len(all_tokens), return_token_ids=True, **shape, **logprobs)
    eos = prompter._tokenizer.eos_token_id
    telling, heard, engine = Telling(row, prompter), Heard(), Answers([eos])
    sampling = Sampling(40, stop=tuple(stop), n=len(all_tokens), logprobs=1)
    request = Request(1, [5], sampling, decode=prompter.decode, follow=telling.take)
    engine.open(request)
    deltas, said = [], list[SaidChoice]()
    results = []
    for index, tokens in enumerate(all_tokens):
        sequence = Sequence(request, index, [5])
        for look, token in zip(looks, [*tokens, eos], strict=False):
            ended = engine.append(sequence, token, TokenLogprob(token, -0.5, [(token, -0.5)]))
            if look and (news := telling.news()):
                said += news
                deltas += heard.take(Said(token="1.1", choices=news).model_dump_json().encode())
            if ended:
                results = engine.collect(request)
                break
    [result] = results
    final = [choice(completion, prompter) for completion in result.completions]
    body = orjson.loads(ok_line("j", 0, row, Answer(final, 1, "base"), 1))["response"]["body"]
    deltas += heard.rest(body)
    for index, one in enumerate(body["choices"]):
        mine = [delta for delta in deltas if delta.index == index]
        text = one["message"]["content"] if is_chat else one["text"]
        assert "".join(delta.text for delta in mine) == text
        assert [token for delta in mine for token in delta.token_ids or ()] == one["token_ids"]
        if kind == "byte level":  # sentencepiece's first space is a byte of a token, and not of the text
            for name, listed in one["logprobs"].items():
                parts = [token for delta in mine for token in (delta.logprobs or {}).get(name) or ()]
                assert parts == (listed or [])
    # Said again from the beginning, by another, nothing of it is news; said otherwise, it is an error.
    for choice_said in said:
        again = Said(token="2.2", choices=[choice_said])
        assert all(not delta.text for delta in heard.take(again.model_dump_json().encode()))
        if choice_said.text:
            other = choice_said.model_copy(
                update={"text": choice_said.text[:-1] + ("y" if choice_said.text[-1] == "x" else "x")}
            )
            with pytest.raises(AnswerChanged):
                heard.take(Said(token="2.3", choices=[other]).model_dump_json().encode())


def told(prompter: Prompter, text: str, **body: Any) -> list[str]:
    """What is told after each token of a text."""
    telling = Telling(row_of(**body), prompter)
    texts = []
    for token in prompter._tokenizer(text, add_special_tokens=False)["input_ids"]:
        telling.take(0, token, None)
        texts.append("".join(said.text for said in telling.news()))
    return texts


def test_characters_are_told_when_they_are_whole() -> None:
    assert told(KINDS["byte level"], "aéx") == ["a", "", "é", "x"]
    assert told(KINDS["byte level"], "日本") == ["", "", "日", "", "", "本"]
    # A run of bytes that ends wrongly would be no text at all.
    assert told(KINDS["sentencepiece"], "b日c") == ["b", "", "", "", "日c"]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert told(KINDS["byte level"], "xENyEND", stop="END") == ["x", "", "", "ENy", "", "", ""]
    assert told(KINDS["byte level"], "xxy", stop=["xy", "yz"]) == ["", "x", ""]
    assert told(KINDS["byte level"], "x", stop="z" * 5000) == ["x"]


def test_each_answer_is_told_by_its_index() -> None:
    prompter = KINDS["byte level"]
    telling = Telling(row_of(n=2), prompter)
    [a, b] = prompter._tokenizer("xy", add_special_tokens=False)["input_ids"]
    telling.take(1, a, None)
    telling.take(0, b, None)
    assert [(said.index, said.at, said.text) for said in telling.news()] == [(0, 0, "y"), (1, 0, "x")]
    telling.take(1, b, None)
    assert [(said.index, said.at, said.text) for said in telling.news()] == [(1, 1, "y")]
    assert telling.news() == []


def test_what_comes_after_a_gap_is_left_to_the_result() -> None:
    heard = Heard()
    entry = Said(token="1.1", choices=[SaidChoice(index=0, at=3, text="later")])
    assert heard.take(entry.model_dump_json().encode()) == []
    body = {"choices": [{"index": 0, "text": "so later", "logprobs": None, "finish_reason": "stop"}], "loramill": {}}
    [rest] = heard.rest(body)
    assert (rest.text, rest.finish_reason) == ("so later", "stop")
    with pytest.raises(AnswerChanged):
        heard.take(Said(token="1.1", choices=[SaidChoice(index=1, at=0, text="x")]).model_dump_json().encode())
        heard.rest({"choices": [body["choices"][0] | {"index": 1, "text": "y"}], "loramill": {}})  # type: ignore[index]

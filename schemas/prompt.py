"""Rows to token ids, and token ids back to text, with any Hugging Face style tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .content import Message
from .errors import ErrorCode, LineError, invalid
from .request import Row


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    chat_template: Any
    all_special_ids: list[int]
    eos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: Any, **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(slots=True, frozen=True)
class Limits:
    """What the model can take."""

    max_model_len: int
    """Tokens of prompt and answer together."""
    vocab_size: int


# A tokenizer's normalizer may shorten text (collapse spaces), hence the factor. It only has to be far below what would
# exhaust the memory: a tokenizer takes some hundred bytes a token, 2 GB for a line at the length cap.
_SHORTENING = 4


class Prompter:
    """A tokenizer, the base's or an adapter's own, and its chat template."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, *, chat_template: str | None = None) -> None:
        """`chat_template` stands in for the tokenizer's own."""
        vocab = tokenizer.get_vocab()
        self.limits = limits
        self.eos = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._template = chat_template
        self._special = frozenset(tokenizer.all_special_ids)
        # Byte-level vocabularies spell a space as this letter, sentencepiece ones as the low line.
        self._byte_level = "Ġ" in vocab and "▁" not in vocab
        self._max_chars = limits.max_model_len * max(map(len, vocab), default=1) * _SHORTENING
        self._pieces: dict[int, tuple[str, bytes]] = {}

    def encode_rows(self, rows: Sequence[Row], templates: Sequence[str | None]) -> list[list[int] | LineError]:
        """The prompt of each row as token ids, or what is wrong with it.

        templates: for each row the chat template of its adapter; None is the prompter's.
        """
        out: list[list[int] | LineError] = [[] for _ in rows]
        chats: list[tuple[int, str]] = []
        texts: list[tuple[int, str]] = []
        for position, (row, template) in enumerate(zip(rows, templates, strict=True)):
            prompt = row.prompt
            try:
                if isinstance(prompt, str):
                    texts.append((position, self._check_length(prompt, "prompt")))
                elif row.is_chat:
                    chats.append((position, self._check_length(self._render(prompt, template), "messages")))
                else:
                    out[position] = self._check_ids(prompt)
            except LineError as error:
                out[position] = error
        self._encode_into(out, texts, special=True)
        self._encode_into(out, chats, special=False)  # the template writes the special tokens itself
        return out

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens; special tokens leave no trace in it."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """One token as shown in log probabilities: its text and its bytes.

        Bytes that are not UTF-8 by themselves show as OpenAI shows them: `bytes:\\xf0\\x9f`. A special token has its
        name as text and no bytes.
        """
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._piece(token_id)
        return known

    def open_ended(self, token_ids: Sequence[int]) -> bool:
        """Whether what the last of these tokens say may change with the next: of sentencepiece's bytes a whole run is
        text, or none of it."""
        if self._byte_level:
            return False
        last = next((token for token in reversed(token_ids) if token not in self._special), None)
        token = None if last is None else self._tokenizer.convert_ids_to_tokens(last)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _check_length(self, text: str, param: str) -> str:
        if len(text) <= self._max_chars:
            return text
        message = f"{len(text)} characters cannot fit in the model's context of {self.limits.max_model_len} tokens"
        raise LineError(ErrorCode.TOKEN_LIMIT_EXCEEDED, message, param)

    def _check_ids(self, prompt: list[Any]) -> list[int]:
        highest = max(prompt)
        if highest >= self.limits.vocab_size:
            raise invalid(f"`prompt` holds token id {highest}; the vocabulary has {self.limits.vocab_size}", "prompt")
        return prompt

    def _render(self, messages: list[Any], template: str | None) -> str:
        template = self._template if template is None else template
        if template is None and not self._tokenizer.chat_template:
            raise invalid("the base model has no chat template; pass one with --chat-template FILE", "messages")
        conversation: list[Message] = messages
        try:
            # transformers renders in a sandboxed, immutable jinja environment.
            text = self._tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises is about this row's messages
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise invalid(f"the chat template refuses the messages: {reason}", "messages") from None
        return str(text)

    def _encode_into(self, out: list[list[int] | LineError], items: list[tuple[int, str]], *, special: bool) -> None:
        if not items:
            return
        encoded = self._tokenizer(
            [text for _, text in items],
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about lengths: they are checked against the model's context
        )["input_ids"]
        for (position, _), ids in zip(items, encoded, strict=True):
            out[position] = ids or invalid("the prompt comes to no tokens")

    def _piece(self, token_id: int) -> tuple[str, bytes]:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model's vocabulary is padded beyond the tokenizer's
            return f"<|{token_id}|>", b""
        if token_id in self._special:
            return token, b""
        raw = _byte_level_bytes(token) if self._byte_level else _sentencepiece_bytes(token)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes (its `bytes_to_unicode`, turned round)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    if all(char in _ALPHABET for char in token):
        return bytes(_ALPHABET[char] for char in token)
    return token.encode()  # an added token, stored as plain text


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

"""The base's tokenizer, and those that adapters bring beside their weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary

from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.prompt import Limits, Prompter, Tokenizer
from loramill.worker.base_files import tokenizer_sha256

_FAST = "tokenizer.json"
_VOCABULARIES = (_FAST, "tokenizer.model", "vocab.json", "vocab.txt")
_SHOWN = 3


class Tokenizers:
    """The tokenizers of one base and its adapters, each loaded once: a thousand adapters may carry the same copy."""

    def __init__(self, base: Path, limits: Limits, chat_template: str | None) -> None:
        """`limits` are the base's; `chat_template` stands in for its own."""
        self.chat_template = chat_template
        self._folder, self._limits = base, limits
        self._own: WeakValueDictionary[tuple[str, int], Prompter] = WeakValueDictionary()

    @cached_property
    def base(self) -> Prompter:
        """The base's own. Raises Failure (INPUT)."""
        return Prompter(self._of_base, self._limits, chat_template=self.chat_template)

    def own(self, folder: Path, vocab_size: int) -> Prompter:
        """That of an adapter whose training made the vocabulary `vocab_size` tokens; without a chat template of its own
        it has the base's. Raises ValueError (one line) if it brings none, or one that does not fit."""
        grown = f"its vocabulary was grown to {vocab_size} tokens"
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise ValueError(f"{folder}: {grown} and it brings no tokenizer: save the tokenizer beside it")
        key = (tokenizer_sha256(folder), vocab_size)
        known = self._own.get(key)
        if known is None:
            tokenizer = self._load(folder)
            highest = max(tokenizer.get_vocab().values(), default=0)
            if highest >= vocab_size:
                raise ValueError(f"{folder}: {grown}, and its tokenizer has token id {highest}")
            tokenizer.chat_template = tokenizer.chat_template or self._of_base.chat_template
            limits = replace(self._limits, vocab_size=vocab_size)
            known = self._own[key] = Prompter(tokenizer, limits, chat_template=self.chat_template)
        return known

    def ignored(self, folder: Path) -> str | None:
        """For an adapter that keeps the base's vocabulary, and so is served with its tokenizer: how the one beside it
        is another, if it is."""
        file = folder / _FAST
        if not file.is_file():
            return None
        sha256 = _sha256(file)
        if sha256 not in self._differences:
            self._differences[sha256] = self._difference(folder)
        return self._differences[sha256]

    @cached_property
    def _of_base(self) -> Tokenizer:
        try:
            return self._load(self._folder)
        except ValueError as error:
            raise Failure(ExitCode.INPUT, str(error)) from error

    @cached_property
    def _differences(self) -> dict[str, str | None]:
        """By the tokenizer file's hash."""
        file = self._folder / _FAST
        return {_sha256(file): None} if file.is_file() else {}

    def _difference(self, folder: Path) -> str | None:
        try:
            theirs = self._load(folder).get_vocab()
        except ValueError as error:
            return f"{error}; the base's is used"
        ours = self._of_base.get_vocab()
        if any(theirs.get(token) != token_id for token, token_id in ours.items()):
            return "the tokenizer beside it has another vocabulary; the base's is used"
        added = [f"`{token}`" for token in sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)]
        if not added:
            return None
        shown = ", ".join([*islice(added, _SHOWN), *(["..."] if len(added) > _SHOWN else [])])
        return f"the tokenizer beside it has added tokens ({shown}) and its embedding did not grow; the base's is used"

    def _load(self, folder: Path) -> Tokenizer:
        from transformers import AutoConfig, AutoTokenizer

        safely = {"local_files_only": True, "trust_remote_code": False}
        try:
            # An adapter's folder has no config, and the model's type decides how its files are read.
            config = AutoConfig.from_pretrained(self._folder, **safely)
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, config=config, **safely)
        except Exception as error:  # tokenizers raise bare Exceptions for files that they cannot read
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error
        return tokenizer


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

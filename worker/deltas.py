"""An answer as it is told while it is made. What has been told is never taken back: together with what follows it is,
to the letter, the text of the result line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loramill.schemas.prompt import Prompter
from loramill.schemas.request import Row
from loramill.schemas.response import TokenInfo, logprobs_of
from loramill.schemas.said import SaidChoice
from loramill.worker.request import TokenLogprob

TORN = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are no character yet."""


class Growing:
    """The text of one answer, as far as no further token changes it."""

    def __init__(self, prompter: Prompter, stop: Sequence[str]) -> None:
        """`stop`: the strings that end the answer, and are not told."""
        self.tokens: list[int] = []
        self.told = ""
        self.settled = 0
        """How many of the first tokens have all of their text in what is certain."""
        self._prompter, self._stop = prompter, stop
        self._context = 0  # a token that is decoded without those before it may lose its space
        self._given = 0  # characters after the settled ones that are certain
        self._held = ""

    def news(self) -> str:
        """What can be told now and was not."""
        self._held += self._certain()
        end = _before_stop(self._held, self._stop)
        text, self._held = self._held[:end], self._held[end:]
        self.told += text
        return text

    @property
    def holds(self) -> bool:
        """Whether text is held back that may be the beginning of a stop string."""
        return bool(self._held)

    def _certain(self) -> str:
        if len(self.tokens) == self.settled or self._prompter.open_ended(self.tokens):
            return ""
        before = len(self._prompter.decode(self.tokens[self._context : self.settled]))
        after = self._prompter.decode(self.tokens[self._context :])[before:]
        certain = after.rstrip(TORN)
        new, self._given = certain[self._given :], len(certain)
        if certain and certain == after:
            self._context, self.settled, self._given = self.settled, len(self.tokens), 0
        return new


class Telling:
    """All answers of one row."""

    def __init__(self, row: Row, prompter: Prompter) -> None:
        self._row, self._prompter = row, prompter
        self._growing = [Growing(prompter, row.params.stop or ()) for _ in range(row.params.samples)]
        self._infos: list[list[TokenInfo]] = [[] for _ in self._growing]
        self._first = [0] * len(self._growing)

    def take(self, index: int, token: int, logprob: TokenLogprob | None) -> None:
        """One more token of an answer; as Request.follow."""
        self._growing[index].tokens.append(token)
        if logprob is not None:
            self._infos[index].append(token_info(logprob, self._prompter))

    def news(self) -> list[SaidChoice]:
        """What was not told yet, of each answer of which there is anything."""
        return [said for index in range(len(self._growing)) if (said := self._more(index)) is not None]

    def _more(self, index: int) -> SaidChoice | None:
        growing, first = self._growing[index], self._first[index]
        at, text = len(growing.told), growing.news()
        # A token is told of once its text is: one that a stop string cuts off is in no result.
        upto = first if growing.holds else growing.settled
        if not text and upto == first:
            return None
        self._first[index] = upto
        params = self._row.params
        ids = growing.tokens[first:upto] if params.return_token_ids else None
        logprobs = None
        if params.logprob_count is not None:
            logprobs = logprobs_of(self._infos[index][:upto], growing.told, is_chat=self._row.is_chat, first=first)
        return SaidChoice(index=index, at=at, text=text, first=first, logprobs=logprobs, token_ids=ids)


def token_info(token: TokenLogprob, prompter: Prompter) -> TokenInfo:
    """As it is shown, with its alternatives."""
    text, raw = prompter.piece(token.token_id)
    top = [TokenInfo(*prompter.piece(token_id), logprob) for token_id, logprob in token.top]
    return TokenInfo(text, raw, token.logprob, top)


def _before_stop(text: str, stops: Iterable[str]) -> int:
    """How much of a text comes before what is, or may become, one of these strings."""
    end = len(text)
    for stop in stops:
        found = text.find(stop)
        starts = range(max(0, len(text) - len(stop) + 1), end) if found < 0 else (found,)
        end = min(end, next((at for at in starts if stop.startswith(text[at : at + len(stop)])), end))
    return end

"""The answers in the making: which token ends one, and when all of a row are there."""

from __future__ import annotations

from collections.abc import Iterable

from loramill.worker.request import Completion, FinishReason, Request, Result, TokenLogprob
from loramill.worker.sequence import Sequence


class Answers:
    """The rows that are not finished, and those of their answers that are."""

    def __init__(self, eos: Iterable[int]) -> None:
        """`eos`: the tokens that end an answer."""
        self._eos = frozenset(eos)
        self._rows: dict[int, list[Completion]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def open(self, request: Request) -> None:
        """Expect a row's answers.

        Raises:
            ValueError: its key is in use, or it has stop strings and there is no `decode`.
        """
        if request.key in self._rows:
            raise ValueError(f"row {request.key} is being answered already")
        if request.sampling.stop and request.decode is None:
            raise ValueError("a row with stop strings needs `decode`")
        self._rows[request.key] = []

    def drop(self, key: int) -> None:
        """Expect them no longer."""
        del self._rows[key]

    def append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> bool:
        """One more token; whether it ends the answer."""
        sequence.tokens.append(token)
        if logprob is not None:
            sequence.logprobs.append(logprob)
        reason, stop_string = self._ending(sequence, token)
        request = sequence.request
        if reason is None:
            if request.follow is not None:
                request.follow(sequence.index, token, logprob)
            return False
        self._rows[request.key].append(
            Completion(
                index=sequence.index,
                token_ids=sequence.tokens[len(request.prompt) :],
                finish_reason=reason,
                stop_string=stop_string,
                logprobs=sequence.logprobs if request.sampling.logprobs is not None else None,
            )
        )
        return True

    def collect(self, request: Request) -> list[Result]:
        """The row's result if all of its answers have ended, which closes it; otherwise nothing."""
        done = self._rows[request.key]
        if len(done) < request.sampling.n:
            return []
        self.drop(request.key)
        return [Result(request.key, len(request.prompt), sorted(done, key=lambda completion: completion.index))]

    def _ending(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, str | None]:
        sampling, decode = sequence.request.sampling, sequence.request.decode
        if (token in self._eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return FinishReason.STOP, None
        if sampling.stop and decode is not None:
            # Enough of the tail for the longest stop string (a token is a byte or more), and some for its first
            # token to be decoded as it is in the whole.
            window = max(len(stop.encode()) for stop in sampling.stop) + 8
            tail = decode(sequence.tokens[max(len(sequence.request.prompt), len(sequence.tokens) - window) :])
            found = [(tail.index(stop), stop) for stop in sampling.stop if stop in tail]
            if found:
                return FinishReason.STOP, min(found)[1]
        if sequence.generated >= sampling.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

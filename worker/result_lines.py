"""Finished rows as lines: an answer's text and log probabilities, and what failed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loramill.schemas.errors import LineError
from loramill.schemas.names import Uses
from loramill.schemas.prompt import Prompter
from loramill.schemas.request import Row
from loramill.schemas.response import Answer, Choice, Served, TokenInfo, error_line, ok_line
from loramill.store.records import DoneRow
from loramill.worker.deltas import token_info
from loramill.worker.request import Completion, FinishReason, Result
from loramill.worker.shard import InFlight
from loramill.worker.worker_stats import counted_as

ENGINE_ERROR = "engine_error"
ADAPTER_UNAVAILABLE = "adapter_unavailable"
"""Its files changed after they were checked; the adapters that are as they were go on."""


def failed_row(job_id: str, number: int, error: LineError) -> DoneRow:
    """A row that cannot be run, as a line of the error file."""
    line = error_line(job_id, number, error.custom_id, error.message, code=error.code, param=error.param)
    return DoneRow(number, True, line)


def engine_failure(
    job_id: str, number: int, row: Row, uses: Uses, why: str, prompt_tokens: int = 0, code: str = ENGINE_ERROR
) -> DoneRow:
    """A row that the engine could not answer, as a line of the error file."""
    line = error_line(job_id, number, row.custom_id, why, code=code, status=500)
    return DoneRow(number, True, line, prompt_tokens, adapter=counted_as(uses))


def answered(done: InFlight, result: Result) -> DoneRow:
    """A row that the engine is done with, as a line of the output, or of the error file."""
    job, row, names = done.shard.job, done.row, done.shard.job.names
    if result.error is not None:
        return engine_failure(job.id, done.number, row, done.uses, result.error, result.prompt_tokens, result.code)
    answer = Answer(
        choices=[choice(completion, done.prompter) for completion in result.completions],
        prompt_tokens=result.prompt_tokens,
        model=row.model or names.base,
        adapters=[Served(name, names.adapters[name].sha256, strength) for name, strength in done.uses],
        mode="base" if not done.request.mix else "static" if done.request.merged else "dynamic",
    )
    line = ok_line(job.id, done.number, row, answer, int(time.time()))
    return DoneRow(
        done.number, False, line, result.prompt_tokens, answer.completion_tokens, adapter=counted_as(done.uses)
    )


def choice(completion: Completion, prompter: Prompter) -> Choice:
    """The answer's text: without the stop string and what follows it, or the token that ended it."""
    shown: Sequence[int] = completion.token_ids
    if completion.finish_reason is FinishReason.STOP and completion.stop_string is None:
        shown = shown[:-1]
    text = prompter.decode(shown)
    if completion.stop_string is not None:
        text, _, _ = text.partition(completion.stop_string)
    logprobs = None
    if completion.logprobs is not None:
        logprobs = [token_info(token, prompter) for token in completion.logprobs[: len(shown)]]
        if completion.stop_string is not None:
            logprobs = _up_to(logprobs, len(text.encode()))
    return Choice(completion.index, text, completion.finish_reason.value, completion.token_ids, logprobs)


def _up_to(tokens: list[TokenInfo], length: int) -> list[TokenInfo]:
    """The tokens that begin within the first `length` bytes of the text."""
    start = 0
    for count, token in enumerate(tokens):
        if start >= length:
            return tokens[:count]
        start += len(token.raw)
    return tokens

"""What is asked for with a job, beside its rows."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loramill.producer.job_limits import MAX_JOB_BYTES, MAX_JOB_ROWS
from loramill.schemas.job import MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE, MAX_PRIORITY, JobNames, JobSpec

OnInvalid = Literal["fail", "skip"]
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def new_id() -> str:
    """Of a job to which nobody gave one."""
    return f"job_{secrets.token_hex(10)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Raises ValueError, in one line, for what no job can be."""

    id: str = field(default_factory=new_id)
    """The same one again is the same job: it is not submitted twice."""
    priority: int = 0
    window_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    dedupe: bool = True
    on_invalid: OnInvalid = "fail"
    limit: int | None = None
    """Only the first rows."""
    max_rows: int = MAX_JOB_ROWS
    max_bytes: int = MAX_JOB_BYTES
    """Of lines; a job over these is refused."""
    retry_of: str | None = None
    owner: str = ""
    """Whose key it comes with."""
    endpoint: str | None = None
    """What every line must ask for, where that was said."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} cannot be a job's id: 1 to 64 of A-Z a-z 0-9 _ -")
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"the priority is {self.priority}: it goes from -{MAX_PRIORITY} to {MAX_PRIORITY}")
        if self.window_s is not None and not self.window_s > 0:
            raise ValueError(f"the window is {self.window_s:g} seconds: it must be above 0")
        if len(self.metadata) > MAX_METADATA:
            raise ValueError(f"{len(self.metadata)} pairs of metadata: there may be {MAX_METADATA}")
        for key, value in self.metadata.items():
            if not 0 < len(key) <= MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
                limits = f"{MAX_METADATA_KEY} characters and its value {MAX_METADATA_VALUE}"
                raise ValueError(f"metadata {key[:MAX_METADATA_KEY]!r}: a key may have 1 to {limits}")

    def spec(self, input_name: str, input_sha256: str, base_id: str, names: JobNames, endpoint: str | None) -> JobSpec:
        """The job's."""
        return JobSpec(
            id=self.id,
            base_id=base_id,
            names=names,
            endpoint=endpoint,
            seed=self.seed,
            dedupe=self.dedupe,
            priority=self.priority,
            window_s=self.window_s,
            metadata=dict(self.metadata),
            input_name=input_name,
            input_sha256=self.input_sha256(input_sha256),
            retry_of=self.retry_of,
            owner=self.owner,
        )

    def input_sha256(self, sha256: str) -> str:
        """Of what is submitted of an input with this hash."""
        return sha256 if self.limit is None else hashlib.sha256(f"{sha256}\0{self.limit}".encode()).hexdigest()

    def differences(self, spec: JobSpec, sha256: str) -> list[str]:
        """In what the job of `spec` is another than this one would be. What names stood for does not count: it was
        settled when that job was accepted."""
        mine = {
            "input": self.input_sha256(sha256), "seed": self.seed, "dedupe": self.dedupe, "priority": self.priority,
            "window": self.window_s, "metadata": dict(self.metadata),
        }  # fmt: skip
        theirs = {
            "input": spec.input_sha256, "seed": spec.seed, "dedupe": spec.dedupe, "priority": spec.priority,
            "window": spec.window_s, "metadata": dict(spec.metadata),
        }  # fmt: skip
        return [name for name in mine if mine[name] != theirs[name]]

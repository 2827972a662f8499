"""The OpenAPI document is true: whatever is asked by it, or against it, is answered within it, and never with a 5xx."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import STUB, Server
from tests.worker.queueing import until

EXAMPLES = 8
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ANSWER_S = 60
NEVER_GOOD = {
    *("POST /v1/files", "POST /v1/adapters"),
    *("POST /v1/batches/{batch_id}/cancel", "POST /v1/uploads/{upload_id}/cancel"),
}
"""What chance finds no good request for: a form whose file has a name, an adapter that is there, what has not ended."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("serve"), *STUB) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def there(server: Server) -> dict[str, Any]:
    """What is there to be asked for, by the names that paths and bodies have for it."""
    with openai.OpenAI(base_url=server.api, api_key="anything") as client:
        rows = [{"custom_id": f"r{at}", "method": "POST", "url": "/v1/completions"} for at in range(3)]
        lines = [json.dumps(row | {"body": {"prompt": "OOM1" if at else "x"}}) for at, row in enumerate(rows)]
        file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        upload = client.uploads.create(bytes=3, filename="in.jsonl", mime_type="application/jsonl", purpose="batch")
        part = client.uploads.parts.create(upload.id, data=b"{}\n")
        until(lambda: client.batches.retrieve(batch.id).status == "completed", 90)
        other = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    in_paths = {"file_id": file.id, "batch_id": batch.id, "upload_id": upload.id, "model": "a00", "name": "a01"}
    in_bodies = {"input_file_id": other.id, "completion_window": "24h", "part_ids": [part.id], "md5": None}
    return in_paths | in_bodies


def test_the_document_is_true(
    server: Server, there: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where schemathesis keeps what it found
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    wrong, good = dict[str, str](), set[str]()
    labels = set[str]()
    operations = [found.ok() for found in document.get_all_operations()]
    for operation in sorted(operations, key=ends):
        labels.add(operation.label)
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            names = {one.name for one in operation.path_parameters}
            assert names <= set(there), f"{operation.label}: say above what {names - set(there)} may be"
            for known in (None, {name: there[name] for name in names}) if names else (None,):
                try:
                    if 2 in {status // 100 for status in ask(operation, mode, known, server, there)}:
                        good.add(operation.label)
                except Unsatisfiable:
                    assert mode is GenerationMode.NEGATIVE  # there is nothing that could be asked wrongly
                except (Exception, BaseExceptionGroup) as error:
                    wrong[f"{operation.label}, {mode}, {known or 'anything'}"] = "\n".join(
                        [str(error), *getattr(error, "__notes__", [])]
                    )
    assert not wrong, "\n\n".join(f"{label}: {why}" for label, why in wrong.items())
    # What is only ever refused is not tested.
    assert labels - good <= NEVER_GOOD


def ends(operation: Any) -> int:
    """The more of them are left, the later: what ends a thing is asked once everything else was."""
    ways = (operation.method == "delete", operation.path.endswith("/cancel"), operation.path.endswith("/complete"))
    return sum(2**at for at, is_so in enumerate(reversed(ways)) if is_so)


def ask(
    operation: Any, mode: GenerationMode, known: dict[str, str] | None, server: Server, there: dict[str, Any]
) -> list[int]:
    """Makes requests of one kind; their statuses."""
    statuses = list[int]()

    # The same requests each time: whatever is found can be looked for again.
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode, path_parameters=known))
    def each(case: Case) -> None:
        if isinstance(case.body, dict) and len(statuses) % 2:
            # What nobody guesses.
            case.body |= {name: value for name, value in there.items() if name in case.body}
        answer = case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=ANSWER_S)
        statuses.append(answer.status_code)

    each()
    return statuses


def test_the_document_names_every_route(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=ANSWER_S) as answer:
        paths = json.load(answer)["paths"]
    wanted = {
        *("/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"),
        *("/v1/uploads", "/v1/uploads/{upload_id}/parts", "/v1/uploads/{upload_id}/complete"),
        *("/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel", "/v1/batches/{batch_id}/retry"),
        *("/v1/batches/{batch_id}/events", "/v1/batches/{batch_id}/results", "/v1/models", "/v1/models/{model}"),
        *("/v1/chat/completions", "/v1/completions", "/v1/adapters", "/v1/adapters/{name}"),
        *("/v1/uploads/{upload_id}/cancel", "/healthz", "/readyz", "/metrics"),
    }
    assert wanted <= set(paths)

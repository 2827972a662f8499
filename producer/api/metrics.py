"""`/metrics`: what Prometheus reads. Names and labels are in docs/operations.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from starlette.types import Scope

from loramill.producer.api.context import Api, ApiOf, OperatorOf
from loramill.producer.api.families import families
from loramill.store.contract import JobStore

router = APIRouter()
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class StoreCollector:
    """What is in the store, read at each scrape."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def describe(self) -> Iterable[Metric]:
        """Nothing: or the registry would ask the store at once."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """By families."""
        return families(self._store)


class Metrics:
    """Of one server."""

    def __init__(self, store: JobStore) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(StoreCollector(store))
        labels = ("route", "method", "status")
        self._requests = Counter("loramill_http_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "loramill_http_request_duration_seconds", "From a request to the end of its answer.", labels[:2],
            registry=self.registry, buckets=_BOUNDS_S,
        )  # fmt: skip

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """One more request. There are as many series as routes: what fits none is one of them."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)


def metrics_of(api: Api) -> Metrics:
    """The server's, made when first asked for."""
    if "metrics" not in api.shared:
        api.shared["metrics"] = Metrics(api.store)
    return cast(Metrics, api.shared["metrics"])


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def metrics(api: ApiOf, caller: OperatorOf) -> Response:
    """Everything, in Prometheus' text format. A store that does not answer is `loramill_store_up 0`, and no error."""
    return Response(generate_latest(metrics_of(api).registry), media_type=CONTENT_TYPE_LATEST)

"""Metrics of a server, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ANSWERS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        """All at zero."""
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.tokens = self._counter(
            "tokens", "Tokens: of contexts as given, nuggets and whole tokens read, answers.", "kind"
        )
        self.seconds = self._histogram("request_seconds", "From request to the end of the response.", _SECONDS, "route")
        self.first_token = self._histogram("first_token_seconds", "From request to the first text.", _SECONDS)
        self.batch = self._histogram("batch_size", "Answers that shared a step.", _ANSWERS)
        self.waiting = self._gauge("queue_depth", "Requests that wait for a sequence slot.")
        self.running = self._gauge("running", "Requests that have a sequence slot.")

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"nugget2d_{name}", meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"nugget2d_{name}", meaning, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"nugget2d_{name}", meaning, registry=self._registry)

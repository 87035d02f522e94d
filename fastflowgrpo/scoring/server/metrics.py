"""What the reward server measures."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The Prometheus metrics that /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "fastflowgrpo", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by HTTP status.", ["status"], **common)
        self.held = Gauge("requests_held", "Requests being read, waiting or being scored.", **common)
        self.images = Counter("images", "Images scored.", ["reward"], **common)
        self.missing = Counter("missing_scores", "Images that could not be scored.", ["reward"], **common)
        self.batch_size = Histogram(
            "batch_size", "Images scored at once.", ["reward"], buckets=[2**i for i in range(11)], **common
        )
        self.seconds = Histogram("batch_seconds", "Duration of scoring a batch.", ["reward"], **common)

"""What /metrics tells, by prometheus_client and with the names that its users expect."""

from __future__ import annotations

import prometheus_client as prometheus

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """A registry of its own for each application, with what prometheus_client knows of the process."""

    def __init__(self) -> None:
        registry = self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        route = ["method", "handler"]
        self.requests = prometheus.Counter(
            "http_requests", "Requests by route and status", [*route, "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "http_request_duration_seconds", "From request to answer", route, registry=registry, buckets=SECONDS
        )
        self.active = prometheus.Gauge("dawhisper_active_requests", "Waiting or running", registry=registry)
        self.live = prometheus.Gauge("dawhisper_live_streams", "Live streams", registry=registry)
        self.audio = prometheus.Counter("dawhisper_audio_seconds", "Audio taken in", ["model"], registry=registry)
        self.queue = prometheus.Histogram(
            "dawhisper_queue_seconds", "A clip's wait for the model", ["model"], registry=registry, buckets=SECONDS
        )
        self.batch = prometheus.Histogram(
            "dawhisper_batch_size",
            "Clips decoded together",
            ["model"],
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )

    def begun(self, model: str, waited: list[float]) -> None:
        """Clips that waited so many seconds are now decoded together."""
        self.batch.labels(model).observe(len(waited))
        for seconds in waited:
            self.queue.labels(model).observe(seconds)

    def page(self) -> bytes:
        return prometheus.generate_latest(self.registry)

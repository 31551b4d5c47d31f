"""What /metrics tells: Prometheus' own client, over all workers where PROMETHEUS_MULTIPROC_DIR names their folder."""

# pyright: reportMissingImports=false

import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from data.reading.columns import Columns
from data.schema import OUT_OF_VOCABULARY_ROW
from mbcnet_rec.server.models import Loaded
from mbcnet_rec.server.requests import Refused
from mbcnet_rec.serving.preprocess import Preprocessor

RECENT = 10_000.0  # rows or values of a moving mean
COUNT_SECONDS = 0.02  # values are counted at most so often: a pass must not wait for it
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = [2**power for power in range(14)]
DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
AGE = '# TYPE mbcnet_model_age_seconds gauge\nmbcnet_model_age_seconds{{model="{}"}} {:.1f}\n'


class Metrics:
    """Counts of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ours: dict[str, Any] = {"registry": self.registry}
        recent: dict[str, Any] = ours | {"multiprocess_mode": "mostrecent"}
        words = "Parse and wait of a request, decode, lookup and dense of a pass, and the whole"
        self.seconds = Histogram("mbcnet_seconds", words, ["stage"], buckets=SECONDS, **ours)
        self.pass_rows = Histogram("mbcnet_pass_rows", "Rows of a pass", buckets=SIZES, **ours)
        self.pass_requests = Histogram("mbcnet_pass_requests", "Requests that shared a pass", buckets=SIZES, **ours)
        self.queue = Gauge("mbcnet_queue_requests", "Requests that wait", multiprocess_mode="livesum", **ours)
        self.answers = Counter("mbcnet_answers", "Answers to /score", ["status"], **ours)
        self.refused = Counter("mbcnet_refused_rows", "Rows refused", ["field", "reason"], **ours)
        self.unknown = Gauge("mbcnet_out_of_vocabulary_share", "Of recent values", ["field"], **recent)
        self.mean = Gauge("mbcnet_score_mean", "Of recent rows", ["arm"], **recent)
        self.drift = Gauge("mbcnet_score_drift", "Mean less that of the artifact's test rows, in deviations of a score there", ["arm"], **recent)  # fmt: skip
        self.shadow = Histogram("mbcnet_shadow_difference", "Change of a probability in the second model", buckets=DIFFERENCES, **ours)  # fmt: skip
        self.shadow_change = Gauge("mbcnet_shadow_mean_change", "Second model less the first, recent rows", **recent)
        self._recent: dict[str, tuple[float, float]] = {}
        self._next_count = 0.0

    def recent(self, what: str, values: np.ndarray) -> float:
        """A moving mean with these values besides."""
        fade = 0.5 ** (len(values) / RECENT)
        total, count = self._recent.get(what, (0.0, 0.0))
        self._recent[what] = total, count = fade * total + float(values.sum()), fade * count + len(values)
        return total / max(count, 1)

    def scored(self, loaded: Loaded, scores: np.ndarray, arm: str) -> None:
        """Count the probabilities of a pass; `arm` is empty without a split."""
        mean = self.recent(f"/score{arm}", scores)
        self.mean.labels(arm).set(mean)
        if spread := loaded.check.get("score_deviation"):
            self.drift.labels(arm).set((mean - loaded.check["mean_score"]) / spread)

    def encoded(self, *parts: tuple[Preprocessor, Columns]) -> None:
        """Count values that no fit has seen, of vocabularies and of unbounded ids; a hash knows no value from another."""
        if time.monotonic() < self._next_count:
            return
        self._next_count = time.monotonic() + COUNT_SECONDS
        for preprocess, columns, feature in ((*each, feature) for each in parts for feature in each[0].schema.features):
            name = feature.name
            if feature.encoding == "vocabulary" or name in preprocess.id_rows:
                kind, place = preprocess.places[name]
                lists = columns.weighted_lists if kind == "weighted" else columns.lists
                values = columns.single_ids[place] if kind == "single" else lists.values[place]
                is_bounded = feature.encoding == "vocabulary"
                unknown = values == OUT_OF_VOCABULARY_ROW if is_bounded else preprocess.without_row(name, values)
                self.unknown.labels(name).set(self.recent(name, unknown))

    def shadowed(self, changes: np.ndarray) -> None:
        """Count what a second model says of the same rows: its probabilities less the first's."""
        for change in np.abs(changes):
            self.shadow.observe(change)
        self.shadow_change.set(self.recent("/shadow", changes))

    def refuse(self, error: Refused, known: Iterable[str]) -> None:
        """Count a row. A name that the client made up is no label."""
        self.answers.labels(error.status).inc()
        field = error.field if error.field in known else "(unknown)" if error.field else ""
        self.refused.labels(field, error.reason).inc()

    def text(self, loaded: Loaded | None) -> bytes:
        """The exposition; last the age of this worker's model, whose versions must not pile up as labels."""
        registry = self.registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        age = AGE.format(loaded.version, time.time() - loaded.written) if loaded else ""
        return generate_latest(registry) + age.encode()

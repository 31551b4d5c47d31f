"""Coalescing: requests that wait together share one pass of encoder, tables and dense part, in a thread of its own."""

import asyncio
import random
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from data.errors import InputError
from mbcnet_rec.server.metrics import Metrics
from mbcnet_rec.server.models import Loaded, Models
from mbcnet_rec.server.options import Options
from mbcnet_rec.server.requests import Columns, Refused, Request, explained, merged, unshared
from mbcnet_rec.serving.preprocess import REQUEST, Inputs

SHARED = "shared"  # stands in messages where others have REQUEST
Future = asyncio.Future[tuple[np.ndarray, Loaded]]
LATE = "the deadline that X-Deadline-Ms gave has passed"


class Scorer:
    """The queue of one worker. `score` belongs to its event loop, all else to the thread of passes."""

    def __init__(self, models: Models, metrics: Metrics, options: Options) -> None:
        self.models, self.metrics, self.options = models, metrics, options
        self.waiting: deque[tuple[Request, Future]] = deque()
        self.thread = ThreadPoolExecutor(1, "passes")
        self.thread.submit(torch.set_num_threads, options.threads)
        self.is_passing = False
        self.last_requests = 0

    async def score(self, request: Request) -> tuple[np.ndarray, Loaded]:
        """Probabilities (rows, 1 + branches asked for; of each task), and their model; Refused if too many wait, it is too late, or a value is bad."""
        if len(self.waiting) >= self.options.queue:
            raise Refused(f"{self.options.queue} requests wait already; try again", 429, "queue")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append((request, future))
        self._start(loop)
        found = await future
        if time.monotonic() > request.deadline:
            raise Refused(LATE, 504, "deadline")
        return found

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.waiting and not self.is_passing:
            self.is_passing = True
            loop.run_in_executor(self.thread, self._passes, loop).add_done_callback(lambda _: self._end(loop))

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_passing = False
        self._start(loop)

    def _passes(self, loop: asyncio.AbstractEventLoop) -> None:
        window, most = self.options.window_us, self.options.max_rows
        if window and not (self.options.adaptive and self.last_requests <= 1):
            time.sleep(window / 1e6)
        while self.waiting:
            batch = [self.waiting.popleft()]
            rows = batch[0][0].num_rows
            while window and self.waiting and (rows := rows + self.waiting[0][0].num_rows) <= most:
                batch.append(self.waiting.popleft())
            self.last_requests = len(batch)
            self.metrics.queue.set(len(self.waiting))
            now, kinds = time.monotonic(), defaultdict(list)
            for request, future in batch:
                self.metrics.seconds.labels("wait").observe(now - request.arrived)
                if now > request.deadline:
                    loop.call_soon_threadsafe(_settle, future, Refused(LATE, 504, "deadline"))
                else:
                    kinds[request.kind].append((request, future))
            for group in kinds.values():
                requests = [request for request, _ in group]
                loaded = self.models.other if requests[0].arm == "b" else self.models.current
                assert loaded is not None
                try:
                    results = self._score(requests, loaded)
                except Exception as error:  # whatever it is, nobody may wait for ever
                    results = [error] * len(requests)
                for (_, future), result in zip(group, results, strict=True):
                    loop.call_soon_threadsafe(_settle, future, result)
                if (
                    self.models.other is not None
                    and not requests[0].arm
                    and random.random() < self.options.shadow_share
                ):
                    self._shadow(requests, results, self.models.other)

    def _score(self, requests: list[Request], loaded: Loaded) -> list[Any]:
        """For each request its scores and the model, or what is wrong with it."""
        if requests[0].shared is not None and loaded.model.preprocess.spans(requests[0].kind[1]):
            requests = [unshared(each) for each in requests]
        try:
            scores = self._probabilities(requests, loaded)
        except InputError as error:
            if len(requests) > 1:  # whose it is shows when each is encoded alone
                return [result for each in requests for result in self._score([each], loaded)]
            request, is_shared = requests[0], str(error).startswith(SHARED)

            def encode(rows: Columns) -> None:
                own = loaded.parts_of(request.kind[1])[1] if request.shared is not None else loaded.model.preprocess
                own.encode(rows)

            return [explained(error, encode, request, is_shared)]
        except Exception as error:  # ours: it must reach who waits, and not end the thread
            return [error] * len(requests)
        if requests[0].arm or loaded is not self.models.other:
            self.metrics.scored(loaded, scores[np.isfinite(scores[:, 0]), 0], requests[0].arm)
        results: list[Any] = []
        ends = np.cumsum([each.num_rows for each in requests])
        for request, own in zip(requests, np.split(scores, ends[:-1]), strict=True):
            if (bad := ~np.isfinite(own).all(1)).any():
                words = "its score is not a number; a value is far beyond those of training: fix the row"
                row = int(bad.argmax())
                results.append(Refused(f"{REQUEST}: row {row}: {words}", reason="score", row=row))
            else:
                outputs = own.shape[1] // (len(loaded.model.tasks) or 1)  # of a task, the fused one first
                results.append((own if request.branches else own[:, ::outputs], loaded))
        return results

    def _shadow(self, requests: list[Request], results: list[Any], other: Loaded) -> None:
        """Score the same with the second model, after the answers are out."""
        pairs = zip(results, self._score(requests, other), strict=True)
        changes = [b[0][:, 0] - a[0][:, 0] for a, b in pairs if isinstance(a, tuple) and isinstance(b, tuple)]
        if changes:
            self.metrics.shadowed(np.concatenate(changes))

    @torch.inference_mode()
    def _probabilities(self, requests: list[Request], loaded: Loaded) -> np.ndarray:
        """Of one pass, (rows, 1) or (rows, 1 + branches); those of each task one after the other."""
        model, stage = loaded.model, self.metrics.seconds
        with stage.labels("decode").time():
            inputs = self._inputs(requests, loaded)
        with stage.labels("lookup").time():
            x = model.embed(inputs)
        with stage.labels("dense").time():
            wants = model.branch_graph is not None and any(each.branches for each in requests)
            logits = model.branch_graph(x) if wants and model.branch_graph else model.graph(x).reshape(len(x), -1)
            scores = np.where(logits.isfinite().numpy(), model.probabilities(logits), np.nan)
        self.metrics.pass_requests.observe(len(requests))
        self.metrics.pass_rows.observe(len(scores))
        return scores

    def _inputs(self, requests: list[Request], loaded: Loaded) -> Inputs:
        rows, whole = merged([each.rows for each in requests]), loaded.model.preprocess
        if requests[0].shared is None:
            columns = whole.encode(rows)
            self.metrics.encoded((whole, columns))
            return whole.inputs(columns)
        owner, own = loaded.parts_of(requests[0].kind[1])
        try:
            shared = owner.encode(merged([each.shared for each in requests]), SHARED)
        except InputError as error:  # of a column as a whole
            raise InputError(str(error).replace(f"{REQUEST}:", f"{SHARED}:", 1)) from None
        columns = own.encode(rows)
        self.metrics.encoded((owner, shared), (own, columns))
        counts = torch.tensor([each.num_rows for each in requests])
        owners = torch.arange(len(requests)).repeat_interleave(counts)
        return own.inputs(columns)._replace(shared=owner.inputs(shared), owners=owners)


def _settle(future: Future, result: Any) -> None:
    if not future.done():  # a client that went away has cancelled it
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

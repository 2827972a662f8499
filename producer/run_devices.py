"""A run by an engine on each of several devices, fed from a queue beside the output, which has the finished rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from loramill.producer.ask import Ask
from loramill.producer.collect import Seen, assemble, assemble_errors, pick, put
from loramill.producer.interrupts import Interrupts
from loramill.producer.job_plan import JobPlan
from loramill.producer.progress import Moment, Progress, note
from loramill.producer.run_engines import settings_of
from loramill.producer.run_job import RunJob
from loramill.producer.run_queue import RunQueue, remove_queue
from loramill.producer.served import served_by_own
from loramill.producer.spool import Spool
from loramill.producer.submit import Checked, plan_of, put_job, shards_of
from loramill.producer.summary import Summary
from loramill.producer.waiting import Patience, chunks
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.job import JobStatus
from loramill.store.errors import JobNotFound, StoreRefused
from loramill.store.journal import Journal, Totals
from loramill.store.records import Job
from loramill.worker.devices import Device
from loramill.worker.engine_process import EngineProcess
from loramill.worker.node import Node
from loramill.worker.serve import Crew
from loramill.worker.worker_log import heard_by
from loramill.worker.worker_stats import together

LOOK_S = 0.1


class OnDevices:
    """A Way."""

    def __init__(self, job: RunJob, journal: Journal | None, devices: Sequence[Device]) -> None:
        """Who has the journal has the queue. Without one nothing is finished, and nothing can be. Raises Failure,
        StoreError."""
        self._job, self._journal, self._devices = job, journal, devices
        self._served = served_by_own(job.models, job.options)
        self._queue: RunQueue | None = None
        self._queued: Job | None = None
        if journal is not None and job.options.queue_path.exists():
            self._open(journal.identity_sha256)

    def totals(self) -> Totals:
        """As they were last seen."""
        queued = self._queued
        if queued is None:
            return Totals(0, 0, 0, 0)
        done = queued.completed + queued.failed
        return Totals(done, queued.failed, queued.prompt_tokens, queued.completion_tokens)

    def done(self) -> NDArray[np.bool_]:
        """By the queue's results."""
        seen = np.zeros(self._job.index.total_rows, np.bool_)
        if self._queue is not None and self._queued is not None:
            for chunk in chunks(self._queue, self._queued):
                seen[chunk.index["row"]] = True
        return seen

    def describe(self, left: NDArray[np.int64]) -> dict[str, Any]:
        """Without loading anything, so without seconds; who takes what is only known then."""
        return plan_of(self._job.index, self._served.offer, left).describe()

    def answer(self, summary: Summary, interrupts: Interrupts) -> None:
        """Submits the job, unless that was done before, and has the engines run what is left of it."""
        index, quiet = self._job.index, self._job.options.quiet
        plan = plan_of(index, self._served.offer, np.arange(len(index)))
        options = settings_of(self._job)
        takers = len(self._devices) * options.concurrency
        queue, queued = (self._queue, self._queued) if self._queue and self._queued else self._submit(plan, takers)
        if queued.status.ended:
            return
        queue.take_back()
        where = ", ".join(device.name for device in self._devices)
        before = f", {summary.resumed:,} done before" if summary.resumed else ""
        what = f"{summary.rows:,} rows{before}, {len(index.adapters)} adapters"
        note(f"{what}: loading the base on {where}", quiet=quiet)
        for line in plan.summary():
            note(line, quiet=quiet)
        with RunQueue(self._job.options.queue_path) as own:
            engines = [EngineProcess(options, device, options.hang_timeout_s) for device in self._devices]
            node = Node(options, own, engines)
            began_s = time.monotonic()
            ready_s = self._run(node, own, interrupts)
        summary.load_s, summary.run_s = ready_s - began_s, max(time.monotonic() - ready_s, 0.001)
        self._look()
        summary.rows_by_device = {engine.device.name: node.rows[engine] for engine in engines}
        summary.count(together(engine.counts.total for engine in engines), list(plan.decisions.values()))

    def publish(self) -> None:
        """From the queue. Once the journal is gone the files are the run's, and what is left of the queue nobody's."""
        options, queue, queued = self._job.options, self._queue, self._queued
        assert queue is not None and queued is not None and self._journal is not None
        with tempfile.TemporaryFile(dir=options.output.resolve().parent) as file:
            spool, seen = Spool(queued.total, cast(BinaryIO, file)), Seen(queued.total)
            for chunk in chunks(queue, queued):
                put(spool, pick(chunk, seen.first(chunk)))
            assemble_errors(spool, options.errors_path)
            assemble(spool, np.flatnonzero(spool.answered), options.output)
        self._journal.delete()
        queue.close()
        remove_queue(options.queue_path)

    def close(self) -> None:
        """Releases the queue and the journal."""
        for kept in (self._queue, self._journal):
            if kept is not None:
                kept.close()

    def _open(self, job_id: str) -> None:
        """The queue with this very job in it, or none: what another left has no row that the journal knows of."""
        options = self._job.options
        try:
            self._queue = RunQueue(options.queue_path)
            queued = self._queue.job(job_id)
            # Of a submit that was not finished, or that somebody ended, nothing is wanted.
            self._queued = queued if queued.status in (JobStatus.IN_PROGRESS, JobStatus.COMPLETED) else None
        except JobNotFound:
            return
        except StoreRefused as error:
            if not options.overwrite:
                raise Failure(ExitCode.MACHINE, f"{error}; pass --overwrite to start afresh") from error

    def _submit(self, plan: JobPlan, takers: int) -> tuple[RunQueue, Job]:
        job, options = self._job, self._job.options
        assert self._journal is not None
        if self._queue is not None:
            self._queue.close()
        remove_queue(options.queue_path)
        self._queue = RunQueue(options.queue_path)
        shards = shards_of(job.index, self._served, plan, takers)
        ask = Ask(id=self._journal.identity_sha256, seed=options.seed, dedupe=not options.no_dedupe)
        checked = Checked(job.source, job.index, self._served, shards)
        self._queued = put_job(self._queue, checked, ask, job.invalid)
        return self._queue, self._queued

    def _run(self, node: Node, own: RunQueue, interrupts: Interrupts) -> float:
        """Until the job has ended, or an interrupt came and what then ran is done. Returns when there was an engine, by
        the monotonic clock. Raises Failure, StoreError."""
        ready_s: float | None = None
        crew, quiet = Crew(node), self._job.options.quiet
        with Progress(self._job.index.total_rows, quiet=quiet) as progress, interrupts.draining():

            def hear(event: str) -> None:
                # What the worker says of itself is the progress, or it is raised.
                if not event.startswith((f"worker {node.name}:", "Error:")):
                    progress.say(event)

            with heard_by(hear):
                try:
                    crew.start()
                    while not (self._show(progress, node).status.ended or interrupts.requested):
                        self._check(node, own)
                        ready_s = ready_s or (time.monotonic() if node.ready else None)
                        time.sleep(LOOK_S)
                    crew.drain()
                finally:
                    crew.close()
        return ready_s or time.monotonic()

    def _show(self, progress: Progress, node: Node) -> Job:
        job = self._look()
        resident = {key for engine in node.engines for key in engine.resident}
        rows, tokens = (job.completed + job.failed, job.failed), (job.prompt_tokens, job.completion_tokens)
        progress.update(Moment(*rows, *tokens, len(resident)))
        return job

    def _look(self) -> Job:
        queue, queued = self._queue, self._queued
        assert queue is not None and queued is not None
        self._queued = Patience().read(lambda: queue.job(queued.id))
        return self._queued

    def _check(self, node: Node, own: RunQueue) -> None:
        """Raises Failure, StoreError if the run cannot go on."""
        if node.failure is not None:
            raise node.failure
        if own.broken is not None:
            raise own.broken
        assert self._queued is not None
        offer = self._served.offer
        wanted = {offer.keys[name] for name in self._job.index.adapters}
        for engine in node.engines:
            if (manifest := engine.manifest) is None:
                continue
            served = {one.key for one in manifest.adapters}
            if manifest.base_id != self._queued.spec.base_id or not wanted <= served:
                what = f"the engine on {engine.name} has another model than the job was checked with"
                raise Failure(ExitCode.INPUT, f"{what}: its files were changed; --overwrite starts afresh")

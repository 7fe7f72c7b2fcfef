"""Where units run: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch

from isotune.comparison.one_run import run_unit
from isotune.comparison.results import Line
from isotune.comparison.units import Unit
from isotune.errors import IsotuneError


class Workers(Protocol):
    """Runs units, so many at once."""

    count: int

    def submit(self, unit: Unit, alone: bool) -> Future[Line]:
        """Start a unit; `alone` with all threads, since nothing runs beside it."""

    def close(self) -> None:
        """End the workers; what they have begun is given up."""


class InProcess:
    """One unit after the other, here."""

    count = 1

    def __init__(self, recipe_yaml: str, folder: str) -> None:
        self._given = (recipe_yaml, folder)

    def submit(self, unit: Unit, alone: bool) -> Future[Line]:
        """Run a unit to its end."""
        done: Future[Line] = Future()
        done.set_result(run_unit(*self._given, unit))
        return done

    def close(self) -> None:
        """Nothing to end."""


class Processes:
    """Processes of this machine, which share its processor cores, and its GPUs where there are several."""

    def __init__(self, recipe_yaml: str, folder: str, count: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = count
        self._given = (recipe_yaml, folder)
        self._threads = max(1, cores // count)
        self._cores = cores
        self._pool = _pool(count)
        self._alone: ProcessPoolExecutor | None = None

    def submit(self, unit: Unit, alone: bool) -> Future[Line]:
        """Start a unit in the next free process."""
        if not alone:
            return self._pool.submit(_run, *self._given, unit, self._threads)
        if self._alone is None:
            self._alone = _pool(1)
        return self._alone.submit(_run, *self._given, unit, self._cores)

    def close(self) -> None:
        """End the processes."""
        for pool in (self._pool, self._alone):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


class RayWorkers:
    """Tasks on a Ray cluster; the comparison's folder must be one that all its machines share."""

    def __init__(self, recipe_yaml: str, folder: str, count: int | None, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise IsotuneError("--ray needs Ray: pip install 'isotune[ray]'") from None
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _check_answers(address)
            local: dict[str, Any] = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
            except (ConnectionError, ValueError) as error:
                raise IsotuneError(f"no Ray cluster at {address!r}: {error}") from None
        self.count = count or max(1, int(ray.cluster_resources().get("CPU", 1)))
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=0)(_run)
        self._given = (recipe_yaml, folder)

    def submit(self, unit: Unit, alone: bool) -> Future[Line]:
        """Start a unit as a task."""
        future: Future[Line] = self._task.remote(*self._given, unit, None if alone else 1).future()
        return future

    def close(self) -> None:
        """Leave the cluster."""
        if self._started:
            self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise IsotuneError where nobody answers at `host:port`; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", "local"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise IsotuneError(f"no Ray cluster at {address!r}: {error}") from None


def _pool(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    shared = (os.getpid(), context.Value("i", 0), torch.cuda.device_count())
    return ProcessPoolExecutor(count, mp_context=context, initializer=_prepare, initargs=shared)


def _prepare(parent: int, started: Any, devices: int) -> None:
    """In a new worker: give it a GPU of its own where there are several, and end it when `parent` is gone."""
    with started.get_lock():
        index, started.value = started.value, started.value + 1
    if devices > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_device(index, devices, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a killed comparison leaves nothing running

    threading.Thread(target=watch, daemon=True).start()


def own_device(index: int, devices: int, visible: str | None) -> str:
    """The GPU of the worker `index`, as CUDA_VISIBLE_DEVICES names it, of those that were visible before."""
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    return names[index % devices]


def _run(recipe_yaml: str, folder: str, unit: Unit, threads: int | None) -> Line:
    with suppress(KeyboardInterrupt):
        return run_unit(recipe_yaml, folder, unit, threads)
    raise IsotuneError(f"{unit.name} was stopped")

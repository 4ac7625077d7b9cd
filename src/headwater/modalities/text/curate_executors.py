"""datatrove's executors as ``curate`` uses them: quiet on the console, their logs in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from loguru import logger

if TYPE_CHECKING:
    from headwater.modalities.text.curate import Executor

__all__ = ["local_executor", "ray_executor"]


class _Quiet:
    """Shards log to their files alone; what is said of all of them, not at all: ``curate`` says it."""

    def run(self) -> Any:  # Any: datatrove's statistics
        names = ("datatrove.executor.local", "datatrove.executor.ray", "datatrove.utils.logging")
        for name in names:
            logger.disable(name)
        try:
            return super().run()  # type: ignore[misc]
        finally:
            for name in names:
                logger.enable(name)

    def _launch_run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        logger.disable("datatrove.executor.local")  # this may be another process
        return super()._launch_run_for_rank(*arguments, **named)  # type: ignore[misc]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        # A local rank of 0 is the one that writes to the console.
        return super()._run_for_rank(rank, local_rank + 1, node_rank)  # type: ignore[misc]


class _Local(_Quiet, LocalPipelineExecutor):  # type: ignore[misc]
    """In this process, or in several."""


class _Ray(_Quiet, RayPipelineExecutor):  # type: ignore[misc]
    """On a cluster."""


def local_executor(settings: Executor, pipeline: Sequence[Any], tasks: int, logs: Path) -> Any:
    """Datatrove's local executor."""
    return _Local(list(pipeline), tasks=tasks, workers=settings.workers, logging_dir=str(logs))


def ray_executor(settings: Executor, pipeline: Sequence[Any], tasks: int, logs: Path) -> Any:
    """Datatrove's Ray executor, with a cluster: the one at ``address``, or one started here.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("several machines are reached through Ray: pip install 'headwater[ray]'.") from error
    if not ray.is_initialized():
        own = {"num_cpus": settings.workers, "include_dashboard": False} if settings.address is None else {}
        ray.init(address=settings.address, log_to_driver=False, **own)
    return _Ray(
        list(pipeline),
        tasks=tasks,
        workers=settings.workers,
        logging_dir=str(logs),
        mem_per_cpu_gb=settings.gigabytes,
    )

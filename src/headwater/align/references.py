"""What every weakly supervised student is held against: its supervisor, and the same model with true labels."""

from __future__ import annotations

from typing import ClassVar

from headwater.align.base import Aligned, ClassAlignment, ClassTask

__all__ = ["StrongCeiling", "WeakSupervisor"]


class WeakSupervisor(ClassAlignment):
    """Reference: the weak model on the true labels of its half. What a student must beat to be worth its name."""

    id: ClassVar[str] = "weak_supervisor"

    def align(self, task: ClassTask) -> Aligned:
        """Train the supervisor and leave it."""
        return Aligned(task.supervisor(watch=True))


class StrongCeiling(ClassAlignment):
    """Reference: the strong model on the true labels of the other half, which a student is denied."""

    id: ClassVar[str] = "strong_ceiling"

    def align(self, task: ClassTask) -> Aligned:
        """Train the ceiling and leave it."""
        task.reveal()
        return Aligned(task.ceiling(watch=True))

"""A learner that ran elsewhere: its accuracy matrix as a row of our leaderboard.

Run it on the same stream (``ClassStream.export`` or ``pilot_data_manager`` hand it out), write R as CSV, one row per
task learned, and name who measured it. Nothing is trained here; figures that need single answers are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from pydantic import Field

from headwater.continual.base import ContinualRecipe, StreamInfo, write_curves
from headwater.continual.metrics import accuracy_curve, summarize
from headwater.continual.streams import ClassStream, StreamError, read_matrix
from headwater.core.cache import atomic_write_text
from headwater.core.recipe import Metrics, Name

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = ["Imported"]


class Imported(ContinualRecipe):
    """Recipe: figures of a matrix that was measured elsewhere, on the stream that the others follow.

    Source: the definitions of ``continual.metrics``.
    """

    id: ClassVar[str] = "imported"

    matrix: Path = Field(
        description="CSV of accuracies in [0, 1], one row per task learned, no header; {seed} in its name stands for "
        "the seed, which decides the order of classes"
    )
    source: Name = Field(description="who measured it and how; shown beside the figures")

    def learner(self, info: StreamInfo) -> NoReturn:
        """There is none."""
        raise TypeError("an imported matrix has no learner.")

    def follow(self, stream: ClassStream, run: Run) -> Metrics:
        """Read the matrix of this seed and turn it into the family's figures.

        Raises:
            StreamError: no such file, or a matrix of another number of tasks than the stream has.
        """
        run.record_data("stream", stream.data.fingerprint)
        path = Path(str(self.matrix).replace("{seed}", str(self.seed)))
        if not path.is_file():
            raise StreamError(f"no matrix for seed {self.seed}: {path} is not there.")
        matrix = read_matrix(path)
        if len(matrix) != len(stream):
            raise StreamError(f"{path} tells of {len(matrix)} tasks, and the stream has {len(stream)}.")
        run.notes["source"] = self.source
        rows = [row[: task + 1] for task, row in enumerate(matrix.tolist())]  # what is above is of no figure
        about = {"source": self.source, "matrix": rows}
        run.write_json("matrix.json", about)
        write_curves(run, {"acc/curve": accuracy_curve(matrix, stream.test_counts).tolist()})
        atomic_write_text(run.model / "matrix.json", json.dumps(about) + "\n")
        atomic_write_text(run.model / "README.md", f"# imported\n\nNo model: accuracies measured by {self.source}.\n")
        return summarize(matrix, stream.test_counts)

"""A family and methods of another package, installed into a directory: numpy-free, so that workers start at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater.core.catalogue import Catalogue

BASE = '''
from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from headwater.core.budget import Budget
from headwater.core.family import Axis, Family
from headwater.core.recipe import Recipe, Spec
from headwater.core.signals import Interrupted, StopSignals


class Optim(Spec):
    lr: float = 0.1


class Bare(Recipe):
    """Measures what it is told; counts its executions in the file ``tally``."""

    id: ClassVar[str] = "bare"
    gain: tuple[float, ...] = Field(default=(0.0,), description="by seed")
    price: tuple[float, ...] = Field(default=(0.0,), description="by seed")
    items: tuple[tuple[float, ...], ...] = ()
    unit: str = "bits"
    tally: str = ""
    budget: Budget = Budget(steps=10)
    note: str = ""

    def measure(self, run):
        if self.tally:
            with open(self.tally, "a") as file:
                file.write(f"{run.directory.parent.name}/{run.directory.name}\\n")
        run.notes["unit"] = self.unit
        run.notes["threads"] = os.environ["OMP_NUM_THREADS"]
        run.notes["process"] = str(os.getpid())
        if self.note:
            run.notes["warning/data"] = self.note
        run.cost = {"steps": 10, "flops": 1e12, "seconds": 1.0}
        gain = self.gain[self.seed % len(self.gain)]
        if self.items:
            values = [gain + x for x in self.items[0]]
            run.write_json("items.json", {"toy/gain": {"ids": list("abcdefgh")[: len(values)], "values": values}})
        curve = [[0, 0.0], [1, gain / 4], [10, gain / 2], [100, gain]]
        run.write_json("trajectory.json", {"x": "tokens", "series": {"toy/gain": curve}})
        price = self.price[self.seed % len(self.price)]
        return {"toy/gain": gain, "toy/price": price, "toy/size": 3.0, "valid/gain": gain, "valid/price": price}

    def run(self, run):
        return self.measure(run)


class Tuned(Bare):
    """Validation is best at lr = 0.3."""

    id: ClassVar[str] = "tuned"
    optim: Optim = Optim()

    def run(self, run):
        return self.measure(run) | {"valid/gain": -abs(self.optim.lr - 0.3), "valid/price": self.optim.lr}


class Fails(Bare):
    id: ClassVar[str] = "fails"
    on: tuple[int, ...] = ()

    def run(self, run):
        self.measure(run)
        if not self.on or self.seed in self.on:
            raise ArithmeticError("broken <script>alert(1)</script> on purpose")
        return self.measure(run)


class Dies(Bare):
    id: ClassVar[str] = "dies"

    def run(self, run):
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(Bare):
    """Says that it began, then waits for a signal or for the file ``release``; checkpoints at a signal."""

    id: ClassVar[str] = "slow"
    release: str = "never"

    def run(self, run):
        print("this must not be taken for an answer")
        with StopSignals() as stop:
            run.path("began").touch()
            for _ in range(3000):
                if stop.signum:
                    run.path("checkpointed").touch()
                    raise Interrupted(stop.signum, 7)
                if Path(self.release).exists():
                    return self.measure(run)
                time.sleep(0.01)
        raise TimeoutError("nobody released it")


FAMILY = Family(
    stage="domain",
    gain=Axis("toy/gain", "Gain", "higher", "bits"),
    price=Axis("toy/price", "Loss of ability", "lower", "bits"),
    columns=(Axis("toy/size", "Size", "lower"),),
    selection=Axis("valid/gain", "Validation", "higher"),
    selection_price="valid/price",
    references={"floor": {"method": "bare"}, "usual": {"method": "tuned", "gain": [0.10, 0.11, 0.12, 0.10]}},
    baseline="usual",
    trajectories=(Axis("toy/gain", "Gain", "higher", "bits"),),
)
'''

ENTRY = """
[{id}]
kind = "{kind}"
stage = "domain"
title = "{id}"
short = "The {id} one"
summary = "A toy."
modality = ["text"]
needs = []
gives = []
cost = "minutes"
module = "toyfamily.domain.base"
recipe = "{recipe}"
"""


def write_package(directory: Path) -> None:
    """Lay out what pip would install."""
    package = directory / "toyfamily"
    (package / "domain").mkdir(parents=True)
    for init in (package / "__init__.py", package / "domain" / "__init__.py"):
        init.touch()
    (package / "domain" / "base.py").write_text(BASE)
    ids = {"bare": "reference", "tuned": "method", "fails": "method", "dies": "method", "slow": "method"}
    entries = [ENTRY.format(id=id, kind=kind, recipe=id.capitalize()) for id, kind in ids.items()]
    (package / "catalogue.toml").write_text("".join(entries))
    info = directory / "toyfamily-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toyfamily\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headwater.catalogue]\ntoy = toyfamily\n")


@contextmanager
def installed(directory: Path) -> Iterator[Path]:
    """Make the toy package importable and known to the catalogue."""
    write_package(directory)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    Catalogue.load.cache_clear()
    try:
        yield directory
    finally:
        sys.path.remove(str(directory))
        Catalogue.load.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "toyfamily"]:
            del sys.modules[name]

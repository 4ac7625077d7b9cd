"""A model and data small enough to be trained, killed and resumed many times in a test; also a script that does so.

Run as ``python toy.py TRIALS``, a JSON list: each is trained in a process of its own, which may kill itself on the way,
and writes its final weights to ``DIRECTORY/final.safetensors``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.core.budget import Budget
from headwater.core.fit import FitSettings, Interrupted, Phase, Trained, fit
from headwater.core.objective import Loss, OverBatch
from headwater.core.optim import OptimSpec

VOCABULARY, WIDTH, LENGTH = 32, 16, 8


class Toy(nn.Module):
    """Two layers of 16 dimensions with dropout; predicts the next token from the mean of those before it."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.seen += ids.shape[0]
        states = self.embed(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.out(self.drop(torch.tanh(self.hidden(states))))


class ToyObjective:
    """Next-token prediction over ragged rows: a label of -100 is not counted."""

    unit = "nats/token"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        logits = model(batch["ids"])[:, :-1]
        labels = batch["labels"][:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        correct = ((logits.argmax(-1) == labels).sum() / (labels != -100).sum().clamp(min=1)).detach()
        return Loss(total, (labels != -100).sum(), {"accuracy": correct})


class Centred:
    """Squared distance of a row's score to twice the mean of the batch, weighed by progress."""

    unit = "squared"

    def __init__(self) -> None:
        self.told: list[float] = []
        self.centre: Tensor | None = None

    @staticmethod
    def score(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["ids"]).square().mean((1, 2))

    def begin_step(self, progress: float, over_batch: OverBatch | None) -> None:
        self.told.append(progress)
        self.centre = None if over_batch is None else over_batch(self.score).mean()

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        scores = self.score(model, batch)
        centre = scores.mean().detach() if self.centre is None else self.centre
        return Loss((scores - 2 * centre).square().sum() * (1 + (self.told or [0.0])[-1]), len(scores))


class ToyStream:
    """Batches over a permutation that changes with every epoch of 40 rows."""

    tokens_per_row = LENGTH

    def __init__(self, rows: int = 6, items: int = 40) -> None:
        self.rows, self.items = rows, items
        rng = np.random.default_rng(1)
        self.ids = rng.integers(0, VOCABULARY, (items, LENGTH))
        self.ids[:, 1::2] = (self.ids[:, ::2] + 1) % VOCABULARY  # half of the tokens can be learned
        self.lengths = rng.integers(2, LENGTH + 1, items)
        self.fingerprint = f"toy-{items}-{rows}"

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        stop = self.rows if stop is None else stop
        positions = step * self.rows + np.arange(start, stop)
        rows = [int(np.random.default_rng(p // self.items).permutation(self.items)[p % self.items]) for p in positions]
        ids = torch.from_numpy(self.ids[rows])
        labels = torch.where(torch.arange(LENGTH) < torch.from_numpy(self.lengths[rows])[:, None], ids, -100)
        return {"ids": ids, "labels": labels, "row": torch.from_numpy(positions)}


def train(
    directory: Path,
    *,
    steps: int = 20,
    every: int | None = None,
    workers: int = 0,
    model: nn.Module | None = None,
    stream: ToyStream | None = None,
    **kwargs: object,
) -> Trained:
    """`fit` on the toy, in float32."""
    settings = FitSettings(precision="fp32", checkpoint_every=every, workers=workers, log_every=5)
    phase = Phase("toy", model or Toy(), stream or ToyStream(), ToyObjective())
    options: dict = {"budget": Budget(steps=steps), "optim": OptimSpec(lr=1e-2), "seed": 3, "settings": settings}
    return fit(phase, directory=directory, **{**options, **kwargs})


def kill_at_write(number: int) -> None:
    """SIGKILL this process at the ``number``-th thing a checkpoint does to the disk; files are torn in half there."""
    from headwater.core import checkpoint

    calls = 0

    def counted(function, torn=None):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number and torn is not None:
                function(*args, **kwargs)
                path = torn(*args)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    checkpoint.save_file = counted(checkpoint.save_file, lambda tensors, path: path)
    checkpoint.os.fsync = counted(os.fsync)
    checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
    Path.write_text = counted(Path.write_text, lambda path, *_: path)
    Path.rename = counted(Path.rename)
    Path.mkdir = counted(Path.mkdir)


def run(trial: dict) -> int:
    """One trial in this process; its exit status."""
    directory = Path(trial["directory"])
    if "kill_at_write" in trial:
        kill_at_write(trial["kill_at_write"])
    stream = ToyStream()
    original = stream.batch

    def batch(step: int, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        for name, number in (
            ("kill_at_step", signal.SIGKILL),
            ("term_at_step", signal.SIGTERM),
            ("int_at_step", signal.SIGINT),
        ):
            if step == trial.get(name):
                os.kill(os.getpid(), number)
        return original(step, start, stop)

    stream.batch = batch
    try:
        trained = train(directory, steps=trial.get("steps", 20), every=trial.get("every"), stream=stream)
    except Interrupted as stopped:
        return 128 + stopped.signum
    save_file(trained.model.state_dict(), directory / "final.safetensors")
    return 0


def main() -> None:
    """Run trials, each in a forked process (importing torch takes longer than training), and write their statuses."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:  # what torch imports late, once for all
        train(Path(warm), steps=1)
    statuses = []
    for trial in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            os._exit(run(trial))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(statuses))


if __name__ == "__main__":
    main()

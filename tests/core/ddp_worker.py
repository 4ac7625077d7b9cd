"""What each of two processes runs in `test_fit_ddp`; `run` is also what one process is compared with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.core.budget import Budget
from headwater.core.distributed import gather_exact
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec

sys.path.insert(0, str(Path(__file__).parent))
from toy import LENGTH, Centred, Toy, ToyObjective, ToyStream  # run as a script


class Headed(nn.Module):
    unit = "squared"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, model, batch):
        error = (self.head(model(batch["ids"])) - 1).square()[batch["labels"] != -100]
        return Loss(error.sum(), error.numel())


class Stop(Exception):
    pass


def run(name: str, directory: Path, stop_at: int | None = None, calls: list | None = None) -> dict[str, Tensor]:
    """Train one configuration; the weights of model and objective."""
    model = Toy(dropout=0)
    model.register_buffer("seen", torch.zeros(()), persistent=False)  # counts the rows of this process: not comparable
    objective = {"headed": Headed, "aware": Centred}.get(name, ToyObjective)()
    settings = FitSettings(precision="fp32", log_every=1, checkpoint_every=2, micro_rows=2 if name == "micro" else None)
    phase = Phase("toy", model, ToyStream(rows=7), objective)
    directory = (
        directory / f"run-{'plain' if name == 'resumed' else name}{'-stopped' if name == 'resumed' or stop_at else ''}"
    )

    def evaluate(_: nn.Module) -> dict[str, float]:
        if stop_at is not None:
            raise Stop
        return {}

    trained = fit(
        phase,
        budget=Budget(tokens=(4 * 7 + 1) * LENGTH),
        optim=OptimSpec(lr=1e-2, eps=1e-3),  # an eps above rounding, or Adam divides noise by noise
        seed=0,
        directory=directory,
        settings=settings,
        on_metrics=None if calls is None else calls.append,
        evaluate=evaluate if stop_at else None,
        eval_at=(0.6,) if stop_at else (),
    )
    if calls is not None:
        (directory.parent / f"loss-{os.environ['RANK']}.txt").write_text(str([p["loss"] for p in trained.loss_curve]))
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    if isinstance(objective, nn.Module):
        state |= {f"objective.{k}": v for k, v in objective.state_dict().items()}
    return state


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    calls: list = []
    for name in ("plain", "micro", "headed", "aware"):
        state = run(name, directory, calls=calls if name == "plain" else None)
        if rank == 0:
            save_file(state, directory / f"{name}.safetensors")
    try:
        run("plain", directory, stop_at=3)
    except Stop:
        state = run("resumed", directory)
    if rank == 0:
        save_file(state, directory / "resumed.safetensors")
    (directory / f"calls-{rank}.txt").write_text(str(len(calls)))

    values, index = [], []
    for start in range(rank * 10, 110, 20):  # batches of 10 in turn, the last filled up with item 0
        items = [i if i < 103 else 0 for i in range(start, start + 10)]
        values.append(torch.tensor([float(i * i) for i in items]))
        index.append(torch.tensor(items))
    scores = gather_exact(torch.cat(values), torch.cat(index), 103)
    (directory / f"scores-{rank}.txt").write_text(str(int(scores.sum())))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    # Under load torch 2.13 sometimes aborts while the interpreter shuts down ("terminate called without an active
    # exception": a gloo thread is still joinable); everything is written by now.
    os._exit(0)

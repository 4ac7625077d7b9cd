"""What a run may spend and what it spent: steps, tokens, floating-point operations, seconds, bytes, labels, trials.

`Budget` and `Cost` are plain data and import neither torch nor transformers, so recipes and the command line can use
them. `Meter`, `count_flops` and `analytic_flops` measure.

FLOPs are counted by running one forward and backward pass under torch's counter. On a CPU that counter sees nothing of
fused attention, of LSTMs and of sparse products. Here attention runs on the math backend, where it is ordinary batched
products, and an operation that is known to be heavy but has no formula is refused instead of being counted as zero.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Budget", "Cost", "GivenBudget", "Meter", "UncountedFlops", "analytic_flops", "count_flops"]

BudgetKind = Literal["steps", "tokens", "flops", "seconds", "none"]
_KINDS: tuple[BudgetKind, ...] = ("steps", "tokens", "flops", "seconds")


class Budget(BaseModel):
    """What a run may spend, in exactly one currency.

    Amounts may be written as numbers or as text ("2e6", "1_000_000"): YAML reads ``2e6`` as text. No field at all means
    that the method spends what it needs (a closed form); a training loop refuses that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int | None = Field(default=None, gt=0, description="Optimizer steps.")
    tokens: int | None = Field(default=None, gt=0, description="Tokens that pass through a trained model.")
    flops: float | None = Field(default=None, gt=0, description="Floating-point operations, forward and backward.")
    seconds: float | None = Field(
        default=None, gt=0, description="Seconds of training on this machine; evaluation is not counted."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:  # Any: whatever stood in the YAML
        if isinstance(value, bool):
            raise ValueError(f"a budget is a number; got {value}.")
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"a budget is a number such as 2000000 or '2e6'; got {value!r}.") from None
        # 2e6 is a float to YAML and a count of tokens to a person.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @model_validator(mode="after")
    def _one_currency(self) -> Budget:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"a budget has exactly one of steps, tokens, flops, seconds; got {' and '.join(given)}.")
        return self

    @classmethod
    def none(cls) -> Budget:
        """No limit: for methods that spend what they need."""
        return cls()

    @property
    def kind(self) -> BudgetKind:
        """The currency, or ``"none"``."""
        return next((kind for kind in _KINDS if getattr(self, kind) is not None), "none")

    @property
    def amount(self) -> float:
        """How much of it; infinite where there is no limit."""
        return math.inf if self.kind == "none" else float(getattr(self, self.kind))

    def scaled(self, share: float) -> Budget:
        """A part of this budget, for one phase of several.

        Whole currencies are rounded down, so that parts never sum to more than the whole.

        Args:
            share: in (0, 1].

        Raises:
            ValueError: ``share`` is outside (0, 1], or the part would be less than one step or token.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {share}.")
        if self.kind == "none":
            return self
        part = self.amount * share
        if self.kind in ("steps", "tokens"):
            part = math.floor(part + 1e-9)  # 100 * 0.29 is 28.999999999999996
            if part < 1:
                raise ValueError(f"{share} of {self.amount:.0f} {self.kind} is less than one. Give a larger budget.")
        return Budget.model_validate({self.kind: part})


@dataclass
class Cost:
    """What was spent. Costs add; peaks take the larger one.

    ``flops`` is NaN where an operation could not be counted: unknown, not zero.
    """

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_analytic: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    trainable: int = 0
    labels: int = 0
    trials: int = 0

    def __add__(self, other: Cost) -> Cost:
        total: dict[str, Any] = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        total["peak_bytes"] = max(self.peak_bytes, other.peak_bytes)
        total["trainable"] = max(self.trainable, other.trainable)
        return Cost(**total)

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON has it: an unknown amount (NaN) becomes ``None``."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cost:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
        return cls(**fields)


def _given(value: Budget) -> Budget:
    if value.kind == "none":
        raise ValueError("give one of tokens, steps, flops, seconds, e.g. {tokens: 2000000}")
    return value


GivenBudget = Annotated[Budget, AfterValidator(_given)]
"""A budget that is one: for recipes that train."""


_STATUS = Path("/proc/self/status")


class Meter:
    """Adds up what everything that happens under it costs.

    ``peak_bytes`` is the most that was allocated on a CUDA device. Without one it is the highest resident memory of the
    whole process since the meter was made (where the system cannot say that, since the process began): libraries and
    what earlier work never gave back are in it, so compare peaks of runs in fresh processes.
    """

    def __init__(self) -> None:
        self._cost = Cost()
        _forget_peak()

    def add(self, cost: Cost | None = None, **amounts: float) -> None:
        """Charge a whole `Cost`, or single amounts by name: ``meter.add(tokens=512, flops=3e9)``."""
        self._cost = self._cost + (cost or Cost()) + Cost(**amounts)  # type: ignore[arg-type]  # ints and floats by field

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Charge the seconds that the block takes, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(seconds=time.perf_counter() - start)

    @property
    def cost(self) -> Cost:
        """All that was charged so far, with the peak memory of now."""
        return self._cost + Cost(peak_bytes=self._peak_bytes())

    def _peak_bytes(self) -> int:
        cuda = _cuda()
        return int(cuda.max_memory_allocated()) if cuda is not None else _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    if _STATUS.exists():
        peak = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cuda() -> Any:  # Any: torch.cuda, which must not be imported for its type
    torch = sys.modules.get("torch")  # if nobody imported it, nothing can be allocated on a device
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _forget_peak() -> None:
    """Begin the high-water marks anew: the device's, and on Linux the kernel's (proc(5), clear_refs)."""
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    if _STATUS.exists():
        with suppress(OSError):
            _STATUS.with_name("clear_refs").write_text("5", encoding="utf-8")


class UncountedFlops(ValueError):
    """An operation that costs much and has no formula: a count without it would be wrong."""


# Parts of the names of operations whose cost is of the order of a matrix product and that torch's counter passes over
# in silence.
_HEAVY = (
    "lstm", "gru", "rnn", "sparse", "mm", "einsum", "bilinear", "attention", "conv", "cdist", "fft_", "linalg", "svd",
    "cholesky", "triangular_solve", "ctc_loss",
)  # fmt: skip
_LIGHT = ("sparse_mask", "sparse_coo_tensor", "to_sparse", "upsample", "vector_norm", "_convert", "convert_")


def count_flops(step: Callable[[], Any]) -> float:
    """Floating-point operations of one call, a multiply-add counted as two.

    Products of matrices and vectors, convolutions and attention are counted; elementwise work is not, as is usual.
    Attention is run by the math backend meanwhile, so the count does not depend on the device or on which fused kernel
    it would have taken. The call is really executed: the caller restores whatever it changes.

    Args:
        step: usually one forward and backward pass.

    Raises:
        UncountedFlops: a heavy operation (an LSTM, a sparse product) has no formula; it is named.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    aten = torch.ops.aten
    vectors: dict[Any, Callable[..., int]] = {
        aten.mv: lambda a, b, *_, **__: 2 * a[0] * a[1],
        aten.addmv: lambda c, a, b, *_, **__: 2 * a[0] * a[1],
        aten.dot: lambda a, b, *_, **__: 2 * a[0],
    }

    class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            packet = func._overloadpacket
            name = str(packet)
            known = packet in flop_registry or packet in vectors
            sparse = any(isinstance(a, torch.Tensor) and a.layout is not torch.strided for a in args)
            heavy = any(part in name for part in _HEAVY) and not any(part in name for part in _LIGHT)
            if (known and sparse) or (heavy and not known):
                what = f"{name} on a sparse tensor" if known else name
                raise UncountedFlops(
                    f"{what} has no FLOP formula, so a count would leave it out. "
                    "Give the budget in tokens, steps or seconds, or register one with torch.utils.flop_counter."
                )
            return func(*args, **(kwargs or {}))

    refuse = Refuse()  # type: ignore[no-untyped-call]
    # The counter stands inside: what it decomposes into reaches `Refuse` too.
    with sdpa_kernel(SDPBackend.MATH), refuse, FlopCounterMode(display=False, custom_mapping=vectors) as counter:
        step()
    return float(counter.get_total_flops())


def analytic_flops(parameters: int, tokens: int, layers: int, hidden: int, seq_len: int) -> float:
    """FLOPs of training a transformer, forward and backward: ``tokens * (6 N + 12 L H T)``.

    Two per parameter and token forward, four backward, and attention over the whole sequence (a causal mask saves
    nothing here). Higher than the truth where parameters are frozen: their gradient is not computed.

    Args:
        parameters: N, those that multiply activations; leave out an embedding table that is only looked up.
        tokens: that pass through the model.
        layers: L.
        hidden: H, heads times their size.
        seq_len: T.

    Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, appendix B.
    """
    return float(tokens) * (6.0 * parameters + 12.0 * layers * hidden * seq_len)

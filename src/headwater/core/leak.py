"""What stands where data must not be reached: test sets inside a method's hook, training data of tasks gone by."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["Sealed", "TestLeak"]


class TestLeak(RuntimeError):
    """Code that may not see some data reached for it."""

    __test__ = False  # pytest collects classes whose name begins with Test


class Sealed:
    """A stand-in for data out of reach: whatever is done with it raises ``TestLeak``.

    Passing it around, ``is`` and ``repr`` are allowed, so that tracebacks and debuggers can name it.

    Args:
        what: what is kept away, for the message, e.g. ``"the test set"``.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        object.__setattr__(self, "_what", what)

    def __repr__(self) -> str:
        return f"Sealed({object.__getattribute__(self, '_what')!r})"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        what = object.__getattribute__(self, "_what")
        raise TestLeak(f"{what} is out of reach here. Only the evaluator may read it; use what the hook was given.")

    __getattr__ = __setattr__ = __delattr__ = _refuse
    __getitem__ = __setitem__ = __contains__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __array__ = __index__ = __int__ = __float__ = __eq__ = __hash__ = _refuse
    __reduce_ex__ = _refuse

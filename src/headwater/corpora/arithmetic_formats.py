"""What a problem of arithmetic looks like: one line, or a scratchpad with every step; and reading it back.

    plain           128+367=495
    padded          $128+367=0495$      operands of d digits, result of d + 1 (of d under -, 2d under *)
    reverse         $128+367=594$       the least significant digit first, a sign last
    padded_reverse  $128+367=5940$
    simple          Input, Target; "A->5 , C->1" for each column from the right, the last with a full stop; 495
    detailed        Input, Target; <scratch>, the digits, for each column what is left of the operands, the answer so
                    far, the carry and the sum, </scratch>; 4 9 5

``-`` goes column by column with a borrow C, and takes 10^d off what the columns give where a borrow is left over. ``*``
takes the first factor times each digit of the second, with the partial product B and the sum of products C. ``sin``
shows the partial sums of its Taylor series, cut to d decimals, up to the first term below a ten-thousandth of the last
decimal. ``sqrt`` takes Newton's steps from 1, each cut to d decimals, until they no longer fall; the last is the root,
cut, exactly, as in the integer square root.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MAX_DIGITS", "ArithmeticFormat", "Operation", "Style", "results", "styles_of"]

Operation = Literal["+", "-", "*", "sin", "sqrt"]
Style = Literal["plain", "padded", "reverse", "padded_reverse", "simple", "detailed"]

MAX_DIGITS = 9
"""So that a product fits 64 bits."""

_SCRATCHPADS = ("simple", "detailed")


def styles_of(op: Operation) -> tuple[Style, ...]:
    """The styles that an operation has: columns are for integers, and simple ones for sums and differences."""
    if op in ("sin", "sqrt"):
        return ("plain", "detailed")
    return tuple(style for style in get_args(Style) if style != "simple" or op != "*")


def results(op: Operation, pairs: ArrayLike, digits: int) -> NDArray[np.int64]:
    """The right answers, ``(n,)``; of sin and sqrt in units of the last decimal, cut towards zero.

    Args:
        op: the operation.
        pairs: ``(n, 2)`` integers; for sin and sqrt the first column in units of 10^-digits, the second 0.
        digits: decimals of sin and sqrt.
    """
    x, y = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    if op == "sqrt":
        return np.array([math.isqrt(value * 10**digits) for value in x.tolist()], dtype=np.int64)
    if op == "sin":
        found: NDArray[np.int64] = np.trunc(np.sin(x / 10**digits) * 10**digits).astype(np.int64)
        return found
    return x + y if op == "+" else x - y if op == "-" else x * y


@dataclass(frozen=True)
class ArithmeticFormat:
    r"""One way to write problems down.

    Attributes:
        op: the operation; sin and sqrt have one operand, in units of 10^-digits, and y is 0.
        style: see the module.
        digits: of padded operands, and decimals of sin and sqrt.
        wrap: stands around a line; None: "$", and nothing around plain lines. Scratchpads have none.
        spaced: puts a space between neighbouring digits, for tokenizers that merge them.

    Raises:
        ValueError: a style that the operation lacks, digits outside 1 to 9, or a wrap that could be read as a number.

    Example:
        >>> ArithmeticFormat("+", "reverse").render(128, 367)
        '$128+367=594$\n'
    """

    op: Operation
    style: Style
    digits: int = 3
    wrap: str | None = None
    spaced: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"digits must be from 1 to {MAX_DIGITS}; got {self.digits}.")
        if self.style not in styles_of(self.op):
            raise ValueError(f"{self.op} has no style {self.style!r}; take one of {', '.join(styles_of(self.op))}.")
        if self.wrap is not None and re.search(r"[\d\s.+*-]", self.wrap):
            raise ValueError(f"wrap must not hold digits, signs or space; got {self.wrap!r}.")

    @property
    def alphabet(self) -> str:
        """Every character that a problem may have, each once."""
        sample = {"-": (10, 21), "sin": (-(10**self.digits), 0), "sqrt": (10**self.digits, 0)}.get(self.op, (21, 10))
        return "".join(sorted(set("0123456789" + self.render(*sample))))

    @property
    def _wrapped(self) -> str:
        if self.style in _SCRATCHPADS:
            return ""
        return ("" if self.style == "plain" else "$") if self.wrap is None else self.wrap

    def render(self, x: int, y: int = 0) -> str:
        """A whole problem, closed by a line feed; see ``render_many``."""
        return self.render_many([(x, y)])[0]

    def prompt(self, x: int, y: int = 0) -> str:
        """The part of ``render`` that is given; the answer follows without anything between."""
        return self.prompts([(x, y)])[0]

    def result(self, x: int, y: int = 0) -> int | float:
        """The right answer, as ``parse`` gives it."""
        return self._value(int(results(self.op, [(x, y)], self.digits)[0]))

    def render_many(self, pairs: ArrayLike) -> list[str]:
        """``render`` of pairs ``(n, 2)``.

        Raises:
            ValueError: an operand that the operation or a padded style has no room for.
        """
        sides = zip(self.prompts(pairs), self.answers(pairs), strict=True)
        return [f"{prompt}{answer}\n" for prompt, answer in sides]

    def prompts(self, pairs: ArrayLike) -> list[str]:
        """``prompt`` of pairs ``(n, 2)``; raises as ``render_many``."""
        rows = self._checked(pairs)
        if self.op in ("sin", "sqrt"):
            shown = [f"{self._opening}{self.op}({self._decimal(x)}){self._closing}" for x in rows[:, 0].tolist()]
            return self._all_spaced(shown)
        place = f"%0{self.digits}d" if "padded" in self.style else "%d"
        template = f"{self._opening.replace('%', '%%')}{place}{self.op}{place}{self._closing}"
        return self._all_spaced([template % (x, y) for x, y in rows.tolist()])

    def answers(self, pairs: ArrayLike) -> list[str]:
        """What follows the prompts of pairs ``(n, 2)``, without the last line feed; raises as ``render_many``."""
        rows = self._checked(pairs)
        right = results(self.op, rows, self.digits).tolist()
        if self.style in ("plain", "reverse") and self.op in ("+", "-", "*") and not self.spaced:
            step, wrap = -1 if self.style == "reverse" else 1, self._wrapped
            return [f"{str(value)[::step]}{wrap}" for value in right]
        finals = [self._final(value) for value in right]
        if self.style not in _SCRATCHPADS:
            return [final + self._wrapped for final in finals]
        steps = self._all_spaced([self._steps(x, y) for x, y in rows.tolist()])
        return [step + final for step, final in zip(steps, finals, strict=True)]

    def parse(self, completion: str) -> int | float | None:
        """The answer that is written after a prompt; None where it is not written as this style has it.

        What follows the end of the answer is not read. Steps of a scratchpad may be wrong; ``verify`` holds them to
        the truth.
        """
        end = re.escape(self._wrapped) if self._wrapped else r"(?:\n|\Z)"
        before = {
            "simple": r"(?:A->\d , C->\d\n)*A->\d , C->\d\.\n",
            "detailed": r"<scratch>\n(?:(?!</scratch>)[^\n]*\n)*</scratch>\n",
        }.get(self.style, "")
        match = re.match(f"{before}(-?[0-9. ]*[0-9]-?){end}", completion)
        if match is None:
            return None
        bare = match[1].replace(" ", "").replace(".", "")
        bare = bare[::-1] if "reverse" in self.style else bare
        if not re.fullmatch(r"-?[0-9]{1,19}", bare) or self._final(int(bare)) != match[1]:
            return None
        return self._value(int(bare))

    def verify(self, text: str) -> bool:
        """Whether ``text`` is a whole problem in this style of which every step and the answer are right.

        A problem has one way of being written, so its operands are read and it is written anew.
        """
        number = r"(-?\d+)" if self.op in ("+", "-", "*") else r"(-?\d+\.\d+)"
        problem = f"{number}{re.escape(self.op)}{number}" if self.op in ("+", "-", "*") else rf"{self.op}\({number}\)"
        bare = re.sub(r"(?<=\d) (?=\d)", "", text)
        match = re.match(f"{re.escape(self._opening)}{problem}{self._closing}", bare)
        if match is None:
            return False
        x, y = ([int(group.replace(".", "")) for group in match.groups()] + [0])[:2]
        try:
            return self.render(x, y) == text
        except ValueError:
            return False

    @property
    def _opening(self) -> str:
        return "Input:\n" if self.style in _SCRATCHPADS else self._wrapped

    @property
    def _closing(self) -> str:
        return "\nTarget:\n" if self.style in _SCRATCHPADS else "="

    def _checked(self, pairs: ArrayLike) -> NDArray[np.int64]:
        rows = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        low, high = _range(self.op, self.digits if "padded" in self.style or self.op in ("sin", "sqrt") else MAX_DIGITS)
        wrong = (
            (rows < low) | (rows > high) if self.op in ("+", "-", "*") else (rows[:, :1] < low) | (rows[:, :1] > high)
        )
        if wrong.any():
            value = rows[:, : wrong.shape[1]][wrong][0]
            raise ValueError(
                f"operands of {self.op} in style {self.style!r} with digits={self.digits} are from {low} to {high}; "
                f"got {value}. Raise digits, or leave it out."
            )
        return rows

    def _decimal(self, units: int) -> str:
        whole, part = divmod(abs(units), 10**self.digits)
        return f"{'-' if units < 0 else ''}{whole}.{part:0{self.digits}d}"

    def _value(self, units: int) -> int | float:
        return units if self.op in ("+", "-", "*") else float(self._decimal(units))

    def _final(self, value: int) -> str:
        """The answer itself, as it is written."""
        if self.op in ("sin", "sqrt"):
            return self._all_spaced([self._decimal(value)])[0]
        width = {"+": self.digits + 1, "-": self.digits, "*": 2 * self.digits}[self.op] if "padded" in self.style else 1
        shown = f"{'-' if value < 0 else ''}{abs(value):0{width}d}"
        if self.style == "detailed":
            return re.sub(r"(?<=\d)(?=\d)", " ", shown)
        return self._all_spaced([shown[::-1] if "reverse" in self.style else shown])[0]

    def _all_spaced(self, texts: list[str]) -> list[str]:
        return [re.sub(r"(?<=\d)(?=\d)", " ", text) for text in texts] if self.spaced else texts

    def _steps(self, x: int, y: int) -> str:
        if self.style == "simple":
            steps = [f"A->{column.digit} , C->{column.carry}" for column in _columns(self.op, x, y)]
            return "\n".join(steps) + ".\n"
        lines = {"+": self._sum, "-": self._sum, "*": self._product}.get(self.op)
        shown = lines(x, y) if lines else self._sine(x) if self.op == "sin" else self._root(x)
        return "\n".join(["<scratch>", *shown, "</scratch>", ""])

    def _sum(self, x: int, y: int) -> list[str]:
        lines, op = _counted(x, y), self.op
        left, right, answer = list(map(int, str(x))), list(map(int, str(y))), list[int]()
        carry = 0
        for column in _columns(op, x, y):
            worked = f"{column.a}{op}{column.b}{op}{carry}={column.total}"
            state = f"{_listed(left)} {op} {_listed(right)} , A={_listed(answer)} , C={carry}"
            lines.append(f"{state} , {worked} , A->{column.digit} , C->{column.carry}")
            left, right, answer, carry = left[:-1], right[:-1], [column.digit, *answer], column.carry
        close = "END"
        if op == "-" and carry:  # the columns give the difference and 10^d too much
            close = f"{int(''.join(map(str, answer)))}-{10 ** len(answer)}={x - y} , END"
        return [*lines, f"[] {op} [] , A={_listed(answer)} C={carry} , {close}"]

    def _product(self, x: int, y: int) -> list[str]:
        lines, total = _counted(x, y), 0
        for place, digit in enumerate(map(int, reversed(str(y)))):
            single, scaled = x * digit, x * digit * 10**place
            state = f"{_listed(_split(x))} * {digit} , A={_listed(_split(single))} , k={10**place}"
            lines.append(f"{state} , B={_listed(_split(scaled))} , C={total}+{scaled}={total + scaled}")
            total += scaled
        return [*lines[:-1], f"{lines[-1]} , END"]

    def _sine(self, x: int) -> list[str]:
        total = term = value = x / 10**self.digits
        lines, number = [f"x_0={self._decimal(x)}"], 0
        while number == 0 or abs(term) >= 10.0 ** -(self.digits + 4):
            number += 1
            power, sign = 2 * number + 1, "-" if number % 2 else "+"
            term *= -(value**2) / (power * (power - 1))
            total += term
            shown = self._decimal(math.trunc(total * 10**self.digits))
            lines.append(f"x_{number}: x_{number - 1} {sign} 1/({power}!)*(x^{power}) , x_{number}={shown}")
        return [*lines[:-1], f"{lines[-1]} , END"]

    def _root(self, x: int) -> list[str]:
        unit = 10**self.digits
        value, lines = unit, [f"x_0={self._decimal(unit)}"]
        while True:
            step = (value + x * unit // value) // 2
            before, shown = self._decimal(value), self._decimal(step)
            if step >= value and len(lines) > 1:
                break
            number = len(lines)
            lines.append(f"x_{number}: 1/2*({before}+{self._decimal(x)}/{before}) , x_{number}={shown}")
            value = step
        return [*lines[:-1], f"{lines[-1]} , END"]


def _range(op: Operation, digits: int) -> tuple[int, int]:
    """The least and the largest operand."""
    if op == "sin":
        return -math.floor(math.pi / 2 * 10**digits), math.floor(math.pi / 2 * 10**digits)
    return (10**digits, 10 ** (digits + 1) - 1) if op == "sqrt" else (0, 10**digits - 1)


@dataclass(frozen=True)
class _Column:
    """One column: its digits, their sum or difference with the carry from the right, and what that gives."""

    a: int
    b: int
    total: int
    digit: int
    carry: int


def _columns(op: Operation, x: int, y: int) -> list[_Column]:
    found, carry, sign = [], 0, 1 if op == "+" else -1
    for place in range(max(len(str(x)), len(str(y)))):
        a, b = x // 10**place % 10, y // 10**place % 10
        total = a + sign * (b + carry)
        carry = abs(total // 10)
        found.append(_Column(a, b, total, total % 10, carry))
    return found


def _split(number: int) -> list[int]:
    return list(map(int, str(number)))


def _listed(digits: Sequence[int]) -> str:
    return f"[{','.join(map(str, digits))}]"


def _counted(x: int, y: int) -> list[str]:
    return [f"{_listed(_split(number))} has {len(str(number))} digits." for number in (x, y)]

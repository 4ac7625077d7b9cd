"""Programs as a step of curation, a block of datatrove: has them written and runs them; needs the extra ``curate``."""

from __future__ import annotations

from typing import Any

from headwater.corpora.prox_programs import Limits, Programmer, Written, run_program
from headwater.modalities.text.docs import CorpusError

try:
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers.disk_base import DiskWriter
except ImportError as error:
    raise ImportError("curation stands on datatrove: pip install 'headwater[curate]'.") from error

__all__ = ["RunPrograms", "WrongLanguage", "check_language"]

BATCH = 64
FEW = 100
WRONG = 0.3
SHOWN = 5


class WrongLanguage(CorpusError):
    """The programmer writes what cannot be read as programs."""


def check_language(wrong: int, total: int, examples: list[str]) -> None:
    """Stop if too large a share of the programs holds too many errors.

    Args:
        wrong: programs with too many errors.
        total: all programs.
        examples: some of the wrong ones.

    Raises:
        WrongLanguage: more than 30 %.
    """
    if wrong > WRONG * total:
        shown = "; ".join(repr(text[:200]) for text in examples[:SHOWN])
        raise WrongLanguage(
            f"the programmer does not speak the language: {wrong} of {total} programs hold too many errors. Use a "
            f"model that was tuned to write programs, or a larger one. It wrote: {shown}."
        )


class RunPrograms(BaseFilter):  # type: ignore[misc]  # datatrove has no annotations
    """Have a program written for each document, and run it.

    Every document that was there, kept or removed, gets ``program`` (as it was written), ``program_status`` (refined,
    dropped, kept, rejected) and ``program_errors`` in its metadata, and the tokens that a generator read and wrote.

    Args:
        programmer: writes; see ``LineProgrammer`` and ``ProgramGenerator``.
        limits: what a program may do.
        batch_size: documents that the programmer sees at once.
        exclusion_writer: where dropped documents go, as for every filter of datatrove.

    Raises:
        WrongLanguage: while it runs, as soon as more than 30 % of a hundred programs or more hold too many errors.
    """

    def __init__(
        self,
        programmer: Programmer,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        batch_size: int = BATCH,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.name = "programs"
        self.programmer, self.limits = programmer, limits
        self._total = self._wrong = 0
        self._examples: list[str] = []

    @property
    def about(self) -> dict[str, Any]:  # Any: JSON data
        """What decides the outcome."""
        return {"programmer": self.programmer.fingerprint, "limits": self.limits.model_dump(mode="json")}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether to keep the document, whose text may change; if not, for which reason."""
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """``filter`` for several documents, which the programmer sees together."""
        asked = [document for document in batch if document.text.strip()]
        written = dict(zip(map(id, asked), self.programmer.programs([d.text for d in asked]), strict=True))
        return [self._run(document, written.get(id(document), Written("", ()))) for document in batch]

    def _run(self, document: Document, written: Written) -> bool | tuple[bool, str]:
        result = run_program(document.text, written.program, self.limits, written.errors)
        document.metadata |= {
            "program": written.text,
            "program_status": result.status,
            "program_errors": result.errors,
            "program_tokens": [written.prompt_tokens, written.completion_tokens],
        }
        self._total += 1
        if result.errors >= self.limits.max_errors:
            self._wrong += 1
            self._examples = [*self._examples, written.text][-SHOWN:]
        if self._total >= FEW:
            check_language(self._wrong, self._total, self._examples)
        if result.status == "dropped":
            return False, "empty" if not document.text.strip() else "dropped by its program"
        document.text = result.text
        return True

"""(f) How long until ``headwater`` answers: ``--help`` and ``methods`` against ``python -c "import typer"``?

    python -m benchmarks.startup

Processor seconds of child processes, all with bytecode written beforehand, as an installation has it. The program is
started by the entry point that an installation makes, not by ``python -m``, which imports ``runpy`` besides.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.harness import ROOT, Bound, alternate, child_usage, report

ROUNDS = 20
ENTRY = "import sys; sys.argv[0] = 'headwater'; from headwater.cli import main; main()"
COMMANDS = {
    "typer": [sys.executable, "-c", "import typer"],
    "help": [sys.executable, "-c", ENTRY, "--help"],
    "methods": [sys.executable, "-c", ENTRY, "methods"],
}
BOUND = Bound("lower", floor=1.5)


def check() -> str:
    """What is timed must be an answer: every command is named in the help, every method in the list."""
    from headwater.cli import app
    from headwater.core.catalogue import Catalogue

    help_text, listed = (
        subprocess.run(COMMANDS[name], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        for name in ("help", "methods")
    )
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    missing = [name for name in commands if f"  {name} " not in help_text]
    assert not missing, f"--help does not name {missing}"
    ids = {line.split()[0].split("/")[1] for line in listed.splitlines()}
    assert ids == set(Catalogue.load()), "methods does not list the catalogue"
    return f"--help names {len(commands)} commands; methods lists the {len(ids)} entries of the catalogue"


def children() -> float:
    """Processor seconds of the child processes so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = cache
        checked = check()
        sides = {name: partial(child_usage, command) for name, command in COMMANDS.items()}
        seconds = alternate(sides, repeats=ROUNDS, clock=children)
    report(
        "How much longer does the command line take to answer than its parser to import?",
        {name: (seconds[name] / seconds["typer"], BOUND) for name in ("help", "methods")},
        seconds=seconds,
        checked=checked,
        notes={"rounds": ROUNDS, "time": "processor seconds of child processes"},
    )


if __name__ == "__main__":
    main()

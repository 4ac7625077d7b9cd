"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater import __version__
from headwater.core.catalogue import Catalogue
from headwater.core.launch import launched_processes, launched_rank, leave_launched
from headwater.core.signals import Interrupted

if TYPE_CHECKING:
    from headwater.core.catalogue import Entry
    from headwater.core.compare import Comparison

__all__ = ["app", "main"]

app = typer.Typer(
    help="What to do with a pretrained model, your data and your budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Without a default typer 0.29 imports pydantic to convert a --help that was not given, in every command.
    context_settings={"default_map": {"help": False, "methods": {"help": False}}},
)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field; repeatable.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    context.obj = debug


def main() -> None:
    """Entry point of ``headwater``: user errors become one message and exit code 2, signals 128 + number."""
    try:
        app()
    except Interrupted as stopped:
        typer.echo(f"stopped: {stopped}", err=True)
        sys.exit(128 + stopped.signum)
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


# The words are what the parser leaves over: as a parameter they too would cost the import of pydantic.
@app.command(options_metavar="[WORDS]... [OPTIONS]", context_settings={"allow_extra_args": True})
def methods(
    context: typer.Context,
    as_json: AsJson = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="With `show ID`: print the citation only.")] = False,
) -> None:
    """List the catalogue, search it for WORDS, or show one method: `headwater methods show ID`."""
    words, catalogue = context.args, Catalogue.load()
    if words and words[0] == "show":
        if len(words) != 2:
            raise ValueError("`headwater methods show` takes one id, e.g. `headwater methods show gda`")
        _show(catalogue[words[1]], as_json=as_json, bibtex=bibtex)
        return
    found = catalogue.search(" ".join(words)) if words else list(catalogue.values())
    if as_json:
        # References are the baselines of every comparison, not methods; a search may still find them.
        chosen = found if words else [entry for entry in found if entry.kind == "method"]
        typer.echo(_json([entry.to_dict() for entry in chosen]))
        return
    if not found:
        typer.echo(f"No method matches {' '.join(words)!r}. `headwater methods` lists all.")
    for entry in found:
        mark = "  (reference)" if entry.kind == "reference" else ""
        typer.echo(f"{entry.stage + '/' + entry.id:<30} {entry.summary}{mark}")


def _show(entry: Entry, *, as_json: bool, bibtex: bool) -> None:
    if bibtex:
        typer.echo(entry.bibtex())
        return
    if as_json:
        typer.echo(_json({**entry.to_dict(), "schema": entry.recipe_class().model_json_schema()}))
        return
    typer.echo(f"{entry.stage}/{entry.id}: {entry.title}\n\n{entry.summary}\n\n{entry.docstring}\n")
    typer.echo(f"Needs: {', '.join(entry.needs)}\nGives: {', '.join(entry.gives)}\nCost:  {entry.cost}\n\nFields:")
    for name, field in entry.recipe_class().model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        typer.echo(f"  {name} = {default}\n      {field.description}")
    for evidence in entry.evidence():
        stale = " (stale: the code changed since)" if evidence.stale else ""
        typer.echo(f"\nClaim at scale {evidence.scale}: {evidence.verdict}{stale}\n  {evidence.data['statement']}")


def _json(data: object) -> str:
    import json

    return json.dumps(data, indent=2)


@app.command()
def init(method: Annotated[str, typer.Argument(metavar="ID", help="A method's id.")]) -> None:
    """Print a recipe with every field explained, to be saved and edited."""
    from headwater.core.explain import explained_recipe

    typer.echo(explained_recipe(Catalogue.load()[method]), nl=False)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    out: Out,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what an earlier run left there.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Run one method on your model and data."""
    from headwater.core.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry:
        typer.echo(loaded.to_yaml(), nl=False)
        return
    from headwater.core.run import execute

    with _logging():
        result = execute(loaded, out, resume=resume)
    leave_launched()
    if launched_rank():
        return
    width = max(map(len, result.metrics), default=0)
    for name, value in result.metrics.items():
        typer.echo(f"{name:<{width}}  {value:.6g}")
    typer.echo(f"\n{out}")


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(help="A comparison in YAML, or the name of one that comes with it.")],
    out: Out,
    overrides: Set = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Run so many seeds, counted from 0.")] = None,
) -> None:
    """Run several methods at equal budget over seeds, and write the leaderboard and report.

    `headwater compare domain` runs every way of taking a model to a domain; `--set shared.model=DIR` and the like put
    your own model and text in.
    """
    from headwater.core.compare import Comparison

    changes = [*(overrides or []), *_seed_override(seeds)]
    named = comparison.name == str(comparison) and not comparison.is_file()
    shipped = _shipped(comparison.name) if named else None
    with _logging():
        if shipped is None:
            _compare(Comparison.load(comparison, changes), out)
        else:
            _compare(Comparison.parse(shipped, changes, source=f"{comparison}.yaml"), out)


def _shipped(name: str) -> str | None:
    """The text of the comparison of this name that comes with the package; None if there is none."""
    from importlib import resources

    file = resources.files("headwater").joinpath("comparisons", f"{name}.yaml")
    return file.read_text(encoding="utf-8") if file.is_file() else None


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE", help="Write the demo's comparison here, for you to edit, and stop."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds per contestant; 3 give intervals.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Half of every contestant's steps.")] = False,
) -> None:
    """Compare ways of teaching a small general model about networkx, on data that is already here."""
    text = _shipped("demo")
    assert text is not None
    if write is not None:
        if write.exists():
            raise ValueError(f"{write} exists; give another name, so that nothing is overwritten")
        write.write_text(text, encoding="utf-8")
        typer.echo(
            f"Wrote {write}. Put your model, domain and general text in, then:\n"
            f"  headwater compare {write} --out runs/mine"
        )
        return
    from headwater.core.compare import Comparison
    from headwater.core.yamlio import load_yaml

    overrides = _seed_override(seeds)
    if quick:
        tokens = load_yaml(text)["shared"]["budget"]["tokens"]
        overrides.append(f"shared.budget.tokens={tokens // 2}")
    with _logging():
        _compare(Comparison.parse(text, overrides, source="demo.yaml"), out)


def _refuse_launched() -> None:
    if launched_processes() > 1:
        raise ValueError(
            f"this command was launched in {launched_processes()} processes and is made of many runs; start it once, "
            "without torchrun. A comparison's `workers` says how many runs go at a time."
        )


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _seed_override(seeds: int | None) -> list[str]:
    return [] if seeds is None else [f"seeds=[{', '.join(map(str, range(seeds)))}]"]


def _compare(comparison: Comparison, out: Path) -> None:
    from headwater.core.compare import compare

    _refuse_launched()
    model = comparison.shared.get("model")
    if isinstance(model, str) and model.startswith("headwater:"):
        # Made here once, with all processors, instead of by every worker waiting for the first.
        from headwater.core.recipe import ModelRef
        from headwater.modalities.models import model_directory

        _say(f"preparing {model} (trained on the first use, then kept in the cache)")
        model_directory(ModelRef(name=model))
    leaderboard = compare(comparison, out, progress=_say)
    typer.echo(leaderboard.to_text())
    typer.echo(f"\n{leaderboard.recommendation}\n\nReport: {out / 'report.html'}")


@app.command()
def advise(
    have: Annotated[
        list[str] | None,
        typer.Option("--have", metavar="THING", help="Something you have; repeatable. Without any: what can be said."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """From what you have, list what to try: what it needs, what it costs, and what it gained where it was checked."""
    from headwater.core.advise import advise as ask

    catalogue = Catalogue.load()
    advice = ask(catalogue, have or [])
    if as_json:
        typer.echo(_json([item.to_dict() for item in advice]))
        return
    if not have:
        things = sorted({need for entry in catalogue.methods for need in entry.needs})
        typer.echo("Say what you have with --have, once for each:\n  " + "\n  ".join(things))
        return
    for item in advice:
        typer.echo(item.to_text())
    if not advice:
        typer.echo("Nothing in the catalogue runs on these alone. `headwater advise` lists what can be named.")


@app.command()
def reproduce(
    method: Annotated[str | None, typer.Argument(metavar="ID", help="A method's id.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method's claim.")] = False,
    scale: Annotated[str, typer.Option("--scale", help="smoke, small or full.")] = "small",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="How many seeds; the claim's own list by default.")
    ] = None,
    out: Out = Path("runs/claims"),
    publish: Annotated[
        Path | None, typer.Option("--publish", metavar="DIR", help="Also write DIR/ID.SCALE.json, for others to read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a method's claim here and write its verdict; exit 0 whatever the verdict is."""
    if every == (method is not None):
        raise ValueError("name one method, or give --all")
    _refuse_launched()
    from headwater.core.cache import atomic_write_text
    from headwater.core.claim import reproduce as check

    ids = [entry.id for entry in Catalogue.load().methods] if method is None else [method]
    verdicts = []
    for id in ids:
        with _logging():
            verdict = check(id, out / id, scale=scale, seeds=seeds, progress=_say)
        verdicts.append(verdict)
        if publish is not None:
            publish.mkdir(parents=True, exist_ok=True)
            atomic_write_text(publish / f"{id}.{scale}.json", _json(verdict) + "\n")
        if not as_json:
            typer.echo(_verdict_text(verdict) + f"\n  {out / id / 'verdict.json'}")
    if as_json:
        typer.echo(_json(verdicts if every else verdicts[0]))


def _verdict_text(verdict: dict[str, Any]) -> str:  # Any: JSON data
    lines = [
        f"{verdict['id']} ({verdict['scale']}, seeds {verdict['seeds']}): {verdict['verdict'].upper()}",
        f"  {verdict['statement']}",
    ]
    for words in verdict["unmet"]:
        lines.append(f"  precondition not met: {words}")
    for part in verdict["parts"]:
        interval = "no interval" if part["ci95"] is None else "[{:+.4f}, {:+.4f}]".format(*part["ci95"])
        role = "" if part["decides"] else " (reported only)"
        lines.append(
            f"  {part['verdict']:<14} {part['difference']:+.4f} {interval}, margin {part['margin']:+g}: "
            f"{part['statement']}{role}"
        )
    return "\n".join(lines)


@app.command()
def curate(
    curation: Annotated[Path, typer.Argument(metavar="CURATION.yaml", help="Sources and steps.")],
    out: Out,
    overrides: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make again what other settings left there, instead of refusing.")
    ] = False,
) -> None:
    """Clean a corpus by steps that you name; show what was removed and why.

    Run again, it goes on where it stopped. `kept/` opens in `datasets`, datatrove and here.
    """
    _refuse_launched()
    from headwater.core.recipe import apply_overrides, validate
    from headwater.core.report import write_report
    from headwater.core.yamlio import read_yaml
    from headwater.corpora.curation import Curation

    chosen = validate(Curation, apply_overrides(read_yaml(curation), overrides or []), where=str(curation))
    with _logging():
        for name, done in chosen.run_all(out, overwrite=overwrite).items():
            first, last = done.steps[0], done.steps[-1]
            typer.echo(f"{name}: {last.docs_out:,} of {first.docs_in:,} documents kept in {out / name / 'kept'}")
    typer.echo(f"Report: {write_report(out)}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What a command wrote to.")],
) -> None:
    """Write an HTML page that anyone can open."""
    from headwater.core.report import write_report

    typer.echo(write_report(directory))


@contextmanager
def _logging() -> Iterator[None]:
    """Show the library's log on standard error while a command runs."""
    import logging

    logger, handler = logging.getLogger("headwater"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)

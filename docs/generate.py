"""Writes what is generated: a page per method, their index, and the table of methods in the README.

python docs/generate.py            write
python docs/generate.py --check    exit 1 if a committed file would change
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.core.catalogue import Catalogue, Entry, Evidence

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- methods: begin (generated) -->", "<!-- methods: end -->"


def verdict_line(evidence: Evidence) -> str:
    """One verdict in words: scale, outcome, effect and interval."""
    data = evidence.data
    interval = "" if data["ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*data["ci95"])
    stale = " (stale: the code changed since)" if evidence.stale else ""
    return f"**{evidence.verdict}** ({evidence.scale}): {data['metric']} {data['difference']:+.3f}{interval}{stale}"


def table(entries: list[Entry], link: Callable[[Entry], str]) -> str:
    """Markdown table of methods with the status of their claims; ``link`` gives where a method's name leads."""
    lines = ["| method | stage | what it does | its claim, checked here |", "|---|---|---|---|"]
    for entry in entries:
        checked = "<br>".join(verdict_line(e) for e in entry.evidence()) or "not checked yet"
        lines.append(f"| [`{entry.id}`]({link(entry)}) | {entry.stage} | {entry.summary} | {checked} |")
    return "\n".join(lines)


def page(entry: Entry) -> str:
    """A method's page: what it is, its equation and source, its fields, its claim."""
    authors = ", ".join(entry.authors)
    address = f"[arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.doi
    lines = [f"# {entry.short}", "", f"*{entry.title}*. {authors}, {entry.year}. {address}", "", entry.summary, ""]
    lines += [f"**Needs** {', '.join(entry.needs)}. **Gives** {', '.join(entry.gives)}. **Cost** {entry.cost}.", ""]
    lines += ["```text", entry.docstring, "```", "", "## Fields", "", "| field | default | meaning |", "|---|---|---|"]
    for name, field in entry.recipe_class().model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        lines.append(f"| `{name}` | {default.replace('|', '&#124;')} | {field.description} |")
    lines += ["", f"`headwater init {entry.id} > recipe.yaml` writes them down.", "", "## Claim", ""]
    for evidence in entry.evidence():
        lines += claim(evidence)
    if not entry.evidence():
        lines += [f"Not checked yet: `headwater reproduce {entry.id}`.", ""]
    lines += ["## Parts", "", f"::: {entry.module}", "", "## Citation", "", "```bibtex", entry.bibtex(), "```"]
    return "\n".join(lines) + "\n"


def claim(evidence: Evidence) -> list[str]:
    """A verdict with all its parts."""
    data: dict[str, Any] = evidence.data  # Any: JSON data
    lines = [data["statement"], "", f"Finding it restates: {data['source']}", "", verdict_line(evidence), ""]
    lines += [f"- precondition not met: {words}" for words in data["unmet"]] + [""]
    lines += ["| part | difference | 95 % interval | margin | verdict |", "|---|---|---|---|---|"]
    for part in data["parts"]:
        interval = "none" if part["ci95"] is None else "[{:+.4f}, {:+.4f}]".format(*part["ci95"])
        role = "" if part["decides"] else " (reported only)"
        lines.append(
            f"| {part['statement']}{role} | {part['difference']:+.4f} | {interval} | {part['margin']:+g} "
            f"| {part['verdict']} |"
        )
    machine = data["environment"]
    lines += ["", f"Seeds {', '.join(map(str, data['seeds']))}; {data['seconds']:.0f} s on {machine['processor']}, "]
    lines[-1] += f"{machine['cpus']} processors, torch {machine['packages']['torch']}."
    return [*lines, ""]


def pages() -> dict[Path, str]:
    """Every page and its text."""
    methods = Catalogue.load().methods
    files = {ROOT / "docs" / "methods" / f"{entry.id}.md": page(entry) for entry in methods}
    files[ROOT / "docs" / "methods" / "index.md"] = f"# Methods\n\n{table(methods, lambda e: f'{e.id}.md')}\n"
    return files


def readme() -> str:
    """The README with its table made anew."""
    before, rest = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)
    made = table(Catalogue.load().methods, lambda entry: f"src/{entry.module.replace('.', '/')}.py")
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write, or with ``--check`` compare."""
    if "--check" in sys.argv:
        stale = readme() != (ROOT / "README.md").read_text(encoding="utf-8")
        if stale:
            sys.stderr.write("the README's table of methods is out of date: run `make docs`\n")
        return int(stale)
    for path, text in {**pages(), ROOT / "README.md": readme()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

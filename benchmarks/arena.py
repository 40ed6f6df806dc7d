"""What the arenas found, in words, from the results that ``diffalign arena`` wrote; runs nothing.

python benchmarks/arena.py          # the section of RESULTS.md, and the table of the README
"""

from __future__ import annotations

import re
from pathlib import Path

from _results import write_section

from diffalign.arena.results import ArenaResults, headline, markdown, read

HERE = Path(__file__).parent
FOLDERS = ("arena", "arena/long")


def described(results: ArenaResults, folder: str) -> str:
    """One arena: where it ran, its headline and every answer."""
    used = [one.final.evaluations for one in results.entries if one.final]
    budget = f"{min(used):,.0f} to {max(used):,.0f} network evaluations per method and seed"
    shown = [
        f"### {results.title}",
        f"`{results.command}`, {results.machine}. [Page]({folder}/arena.html). {budget}; tuning: {results.tuning}.",
    ]
    shown.append(" ".join(headline(results)))
    questions: dict[str, list[str]] = {}
    for reach in results.reaches:
        questions.setdefault(reach.target.question, []).extend(reach.texts)
    for answer in results.contrasts:
        questions.setdefault(answer.contrast.question, []).append(answer.text)
    shown.append("\n".join(f"- *{question}* {' '.join(texts)}" for question, texts in questions.items()))
    shown.append(markdown(results).strip())
    return "\n\n".join(shown)


def main() -> None:
    found = {folder: read(HERE / folder / "results.json") for folder in FOLDERS}
    write_section("Arena", "\n\n".join(described(results, folder) for folder, results in found.items()))
    path = HERE.parent / "README.md"
    text = path.read_text(encoding="utf-8")
    table = f"<!-- arena -->\n{markdown(found['arena'])}<!-- /arena -->"
    path.write_text(
        re.sub(r"<!-- arena -->.*?<!-- /arena -->", lambda _: table, text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

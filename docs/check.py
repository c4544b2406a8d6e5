"""Checks the documentation: links lead somewhere, and numbers stand in the benchmark results they claim to come from.

    python docs/check.py            # fails if something is wrong
    python docs/check.py --write    # renders the numbers anew from benchmarks/results

A block between `<!-- numbers: NAME -->` and `<!-- end -->` is rendered by the function of that name in `docs/tables`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tables import deployment, pruning, quantization, search, training

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)")
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TABLES = (deployment, pruning, quantization, training, search)
RENDERERS: dict[str, Callable[[], str]] = {
    name: function for module in TABLES for name, function in vars(module).items() if not name.startswith("_")
}


def check(path: Path, *, write: bool) -> list[str]:
    """Problems of one document; with `write`, its number blocks are rendered anew first."""
    text = path.read_text()
    rendered = BLOCK.sub(lambda block: f"{block[1]}{RENDERERS[block[2]]()}\n{block[4]}", text)
    if write and rendered != text:
        path.write_text(rendered)
        text = rendered
    name = path.relative_to(ROOT)
    problems = [] if rendered == text else [f"{name}: numbers differ from benchmarks/results; run with --write"]
    for target in LINK.findall(text):
        if not (path.parent / target).exists():
            problems.append(f"{name}: {target} does not exist")
    return problems


def main() -> None:
    """Checks every Markdown file outside hidden and generated directories."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    problems = [problem for path in sorted(documents) for problem in check(path, write="--write" in sys.argv)]
    print("\n".join(problems) or f"{len(documents)} documents are in order")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

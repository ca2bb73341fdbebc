"""Compare the quickstart's output with the one that README shows: python .ci/readme_output.py OUTPUT.

Numbers and verdicts differ between processors, so they are masked; names, columns and order must agree.
"""

import re
import sys
from pathlib import Path

MARKER = "<!-- output of the quickstart"
VARYING = re.compile(r"<?[−-]?\d+(\.\d+)?|larger gap|smaller gap|cannot tell")


def masked(text: str) -> list[str]:
    """The lines of ``text`` without what varies."""
    return [" ".join(VARYING.sub("#", line).split()) for line in text.splitlines()]


def main() -> None:
    readme = Path("README.md").read_text(encoding="utf-8")
    shown = readme.partition(MARKER)[2].partition("```text\n")[2].partition("```")[0]
    wanted, given = masked(shown), masked(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not wanted or "\n".join(wanted) not in "\n".join(given):
        sys.exit(f"README shows other output than the quickstart prints:\n{shown}")


if __name__ == "__main__":
    main()

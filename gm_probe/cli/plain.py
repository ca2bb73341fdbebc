"""Text for a terminal or file that cannot show ρ, λ, τ or ±: spelled in what it can."""

from __future__ import annotations

import codecs
import sys
import unicodedata

HANDLER = "gm_probe.plain"
"""Name of the codec error handler: ``stream.reconfigure(errors=HANDLER)``."""
SIGNS = {
    "±": "+/-",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": "*",
    "…": "...",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "²": "^2",
    "√": "sqrt ",
    "∞": "inf",
    "‖": "||",
    "λ": "lambda",  # Unicode's name has no b
    "Λ": "Lambda",
}


def spelled(character: str) -> str:
    """ASCII for one character: rho for ρ, T for ᵀ, ? for what has no such spelling."""
    if character in SIGNS:
        return SIGNS[character]
    name = unicodedata.name(character, "")
    if name.startswith("GREEK ") and " LETTER " in name:
        letter = name.split(" LETTER ")[1].split()[0].lower()
        return letter.capitalize() if " CAPITAL " in name else letter
    simpler = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return simpler or "?"


def _handle(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(spelled, error.object[error.start : error.end])), error.end


codecs.register_error(HANDLER, _handle)


def plain(text: str) -> str:
    """``text`` as stdout can show it; before a table is laid out, since a spelling is longer than its letter."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, HANDLER).decode(encoding)

"""What counts as the same word: case, accents and widths are folded, and scripts without spaces are cut up."""

import re
import unicodedata
from collections.abc import Iterator

JOINERS = "'._"  # within words such as "don't", "3.14" and "a_b", whose parts stand side by side
# marks up to here are letters' own (nukta, voicing, virama); those above are accents and points, which people leave out
OWN_MARKS = 9
# Scripts whose words are not told apart by spaces. In the first a word has about two characters (Chinese, and Korean
# without its endings), in the others about four (kana, Thai, Lao, Burmese, Khmer).
SHORT, LONG = 2, 4
SHORT_WORDS = "\u3005\u3007\u3400-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff"
LONG_WORDS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u3096\u30a1-\u30fa\u30fc"

_UNSPACED = re.compile(f"[{SHORT_WORDS}{LONG_WORDS}]")
_RUNS = re.compile(f"(?P<short>[{SHORT_WORDS}]+)|(?P<long>[{LONG_WORDS}]+)|[^{SHORT_WORDS}{LONG_WORDS}\\s]+")


class _Table(dict[int, str | None]):
    """For `str.translate`: a character of a decomposed text, what becomes of it; filled as characters come."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        kind = unicodedata.category(char)
        kept: str | None = " "
        if char in JOINERS or kind[0] in "LN":
            kept = char
        elif kind[0] == "M":
            accent = unicodedata.combining(char) > OWN_MARKS or "\ufe00" <= char <= "\ufe0f"  # or a variation selector
            kept = None if accent else char
        elif kind == "Cf":  # invisible, such as a soft hyphen
            kept = None
        elif kind == "So":  # an emoji or another sign is a word of its own
            kept = f" {char} "
        self[code] = kept
        return kept


_TABLE = _Table({ord("\u2019"): "'", ord("\u0640"): None})  # a typographic apostrophe; Arabic letters drawn out


def fold(text: str) -> str:
    """Words between spaces, in lower case and without accents; characters of scripts without spaces one by one."""
    return _UNSPACED.sub(r" \g<0> ", _letters(text))


def phrases(query: str) -> Iterator[str]:
    """What to look for in folded text, each as parts that follow each other; a word that is asked twice comes twice.

    What has no letter, digit or sign is left out.
    """
    for run in _RUNS.finditer(_letters(query)):
        piece, size = run[0], SHORT if run["short"] else LONG
        if run["short"] or run["long"]:
            for start in range(max(len(piece) - size, 0) + 1):
                yield " ".join(piece[start : start + size])
        elif piece.strip(JOINERS):
            yield piece


def _letters(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", text).casefold().translate(_TABLE))

"""Replaces invisible characters, and those that control a terminal, by visible ones."""

_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: "\u2421"} | {code: "\ufffd" for code in range(0x80, 0xA0)}
# overrides of the writing direction would reorder the text after them
_PICTURES |= {code: "\ufffd" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str, *, marked: bool) -> str:
    """`text` for display: CRLF as one line end, control characters as pictures, an arrow at line ends in nuggets."""
    shown = text.replace("\r\n", "\n").translate(_PICTURES)
    return shown.replace("\n", "\u21b5\n") if marked else shown

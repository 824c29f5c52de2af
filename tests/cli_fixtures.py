"""What the tests of the command line and of inspection work on."""

from pathlib import Path

import tiny

# What files hold and terminals mind: CRLF, emoji, special-token strings, markup, NUL, an escape sequence.
TEXT = (
    "A lighthouse marks the rocks, and its keeper trims the lamp. Ships pass at night! 😀 Café costs 3 € here.\r\n"
    'Literal strings such as </s> or <|endoftext|> are ordinary text; <b>tags</b> & "quotes" too.\x00\x1b[31m\n'
) * 4


def save_tiny_model(folder: Path, *, seed: int = 0, name: str | None = None, **options: object) -> Path:
    """A model that knows nothing and calls itself `name`, or by its folder so that memories lead back to it."""
    tiny.trained("llama", "copies", seed, name=name or str(folder), **options).save_pretrained(folder)
    return folder

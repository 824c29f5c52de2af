"""`Fingerprint`: digests of the base LM's weights and the tokenizer that can read a memory."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

# 1: a digest over everything that a model had, adapters and scorer too (files of version 1); 2: over the base alone
SCHEME = 2
# of models and methods, in a file: as long as paths are
Name = Annotated[str, StringConstraints(max_length=4096)]


@dataclass(frozen=True)
class Fingerprint:
    """Hexadecimal digests of what a reader must have, and the model's name.

    Attributes:
        name: of the model that made the memory, for messages.
        model: of the weights of the base LM. Adapters and methods have records of their own (`ReaderSpec`,
            `MethodRecord`).
        tokenizer: of the tokenizer.
        scheme: what `model` was computed over, see `SCHEME`.
    """

    name: Name
    model: str
    tokenizer: str
    scheme: int = 1

"""Who can read a memory: the base LM's weights and the tokenizer, as digests."""

from dataclasses import dataclass

# 1: a digest over everything that a model had, adapters and scorer too (files of version 1); 2: over the base alone
SCHEME = 2


@dataclass(frozen=True)
class Fingerprint:
    """Digests, in hexadecimal digits, of what a reader must have; and the model's name for messages.

    Attributes:
        name: how messages call the model that made the memory.
        model: of the weights of the base LM. Adapters and methods are recorded apart (`ReaderSpec`, `MethodRecord`).
        tokenizer: of the tokenizer.
        scheme: what `model` was computed over, see `SCHEME`.
    """

    name: str
    model: str
    tokenizer: str
    scheme: int = 1

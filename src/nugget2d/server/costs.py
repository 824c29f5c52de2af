"""What requests will take, known before the work: tokens of a text, bytes of a memory and of a cache.

The bytes are those that were measured at the peak of each kind of work, rounded up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import LimitError
from nugget2d.memory.states import row_nbytes
from nugget2d.methods.base import native_dtype
from nugget2d.methods.options import CompressOptions
from nugget2d.modeling.network import Network
from nugget2d.text.segmentation import tokenize

# characters that a token has at most, on average: tokens alone do not bound the work, as one may stand for 80 spaces
CHARS = 8
PIECE = 10_000  # characters that are tokenized between two looks at the clock
BODY = 4  # a body, the same in one piece, and as text: of characters outside Latin-1 the latter is larger
TOKENIZED = 500  # bytes of one token while it is made: its number and text, offsets, and the same in Python
ROW = 3  # a cache, its copy with room for the answer, and what it is copied from
MADE = 5  # a memory, the parts that it is joined of, its file


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int, check: Callable[[], None]) -> int:
    """About how many tokens texts have (each cut may add one), without reading more than is allowed.

    Args:
        tokenizer: the model's.
        texts: of one request.
        most: tokens of all of them.
        check: called now and then; it raises where the work is in vain.

    Raises:
        LimitError: there are more, or more than `CHARS` characters for each that is allowed.
        InputError: see `tokenize`.
    """
    tokens, chars = 0, sum(map(len, texts))
    if chars > CHARS * most:
        raise LimitError(f"the text has {chars:,} characters, the server reads {CHARS * most:,}; send less")
    for text in texts:
        for start in range(0, len(text), PIECE):
            check()
            tokens += len(tokenize(tokenizer, text[start : start + PIECE])[0])
            if tokens > most:
                raise LimitError(f"the text has more than {most:,} tokens, which is what the server reads; send less")
    return tokens


@dataclass(frozen=True)
class Costs:
    """Bytes that work with one model takes.

    Attributes:
        token: bytes of one token in a cache.
        shape: key-value heads and head_dim of every layer.
        context: tokens that it reads of memories, at most.
    """

    token: int
    shape: Sequence[tuple[int, int]]
    context: int

    @staticmethod
    def of(model: Network) -> "Costs":
        """Those of `model`; it must not be in use."""
        with torch.no_grad():
            numbers = sum(2 * heads * width for heads, width in model.readable.kv_shape)
        return Costs(numbers * model.lm.dtype.itemsize, model.readable.kv_shape, model.config.context)

    def memory(self, model: Network, options: CompressOptions, tokens: int) -> int:
        """Of the memory of a text, at most; of one that is a text or embeddings, far less."""
        dtype = options.config.get("dtype") or native_dtype(model)
        token = sum(2 * heads * row_nbytes(width, dtype) for heads, width in self.shape)
        budget = options.budget  # without one every token may be kept
        return token * (tokens if budget is None else budget.count(tokens, token))

    def compression(self, made: int, tokens: int) -> int:
        """Of making a memory of `made` bytes of a text."""
        return MADE * made + min(tokens, self.context) * self.token

    def entries(self, nuggets: int, tokens: int) -> int:
        """Entries of a cache of `tokens` after memories of so many nuggets."""
        return min(nuggets, self.context) + tokens

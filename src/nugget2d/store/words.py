"""`Words`: the text of each segment of a memory, by which a store finds it."""

from typing import TYPE_CHECKING

from pydantic import ValidationError

from nugget2d.config import Frozen
from nugget2d.errors import StoreError

if TYPE_CHECKING:  # a search without a model does without torch
    from nugget2d.memory.memory import Memory
    from nugget2d.model import Nugget2D


class Words(Frozen):
    """The words of a memory.

    Attributes:
        texts: of each segment, as far as they are known.
        spans: the characters that each of them stands for.
    """

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of_text(memory: "Memory", text: str) -> "Words":
        """Of the text that a memory was made of."""
        whole = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
        spans = tuple((segment.start, segment.end) for segment in memory.segments)
        return Words(texts=tuple(whole[start:end] for start, end in spans), spans=spans)

    @staticmethod
    def of_states(memory: "Memory", model: "Nugget2D") -> "Words":
        """Of the tokens that are decoded from a memory's states by `model`, which made it."""
        from nugget2d.inference.token_decoding import decode_texts

        spans = tuple((segment.start, segment.end) for segment in memory.segments)
        if memory.kind != "kv":  # read as a whole
            spans = ((0, memory.num_chars),)
        return Words(texts=tuple(decode_texts(model, memory)), spans=spans)

    @staticmethod
    def of_tokens(data: bytes, memory: "Memory", model: "Nugget2D") -> "Words":
        """Of what an earlier version kept (`are_tokens`): ids of `model`'s tokenizer.

        Of memories that the base reads these are all tokens of the text, in order, of others those of the states, in
        none.

        Raises:
            StoreError: they are damaged.
        """
        if memory.reader.role != "base":
            return Words.of_states(memory, model)
        import safetensors.numpy
        from safetensors import SafetensorError

        try:
            parts = safetensors.numpy.load(data)
            ids, spans, start = parts["tokens"].tolist(), parts["spans"].tolist(), 0
            texts = []
            for count in parts["counts"].tolist():
                texts.append(model.text(ids[start : start + count]))
                start += count
            return Words(texts=tuple(texts), spans=tuple(map(tuple, spans)))
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise StoreError("its words are damaged") from error

    def to_bytes(self) -> bytes:
        """For a store's index."""
        return self.model_dump_json().encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Words":
        """The inverse of `to_bytes`.

        Raises:
            StoreError: they are damaged.
        """
        try:
            words = Words.model_validate_json(data)
        except ValidationError as error:
            raise StoreError("its words are damaged") from error
        if len(words.texts) != len(words.spans):
            raise StoreError("its words are damaged")
        return words


def are_tokens(data: bytes) -> bool:
    """Whether an earlier version kept these words: as safetensors, which begin with a length in eight bytes."""
    return data[4:8] == bytes(4)

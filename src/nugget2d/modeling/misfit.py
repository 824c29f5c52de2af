"""Why a model cannot read a memory that names its fingerprint: a file can claim any, and any shapes and tokens."""

from dataclasses import dataclass

from nugget2d.config import NuggetConfig
from nugget2d.memory.kv import KVPayload, LayerShape
from nugget2d.memory.memory import Memory
from nugget2d.memory.payload import EmbeddingsPayload

# beyond the window: a text is not cut inside what is shown as one character
SPARE_TOKENS = 256


@dataclass(frozen=True)
class Readable:
    """What a model reads.

    Attributes:
        layers: as `KVPayload.shapes`.
        vocabulary: rows of its embeddings.
        width: of its embeddings.
        compressor: its configuration; None of a plain LM.
    """

    layers: list[tuple[LayerShape, LayerShape]]
    vocabulary: int
    width: int
    compressor: NuggetConfig | None

    @property
    def kv_shape(self) -> list[tuple[int, int]]:
        """Key-value heads and head_dim of each layer."""
        return [keys for keys, _ in self.layers]

    @property
    def longest(self) -> int:
        """Tokens of a segment that its decoder may be asked for: a cut inside a word can make more than a window."""
        config = self.compressor
        return 0 if config is None else max(2 * config.window, config.context) + SPARE_TOKENS


def misfit(memory: Memory, model: Readable) -> str | None:
    """What in `memory` the model cannot read; None: it can."""
    if memory.reader.role == "decoder":
        if model.compressor is None:
            return "it is read by a decoder, which a plain LM does not have"
        tokens = max(segment.num_tokens for segment in memory.segments)
        if tokens > model.longest:
            return f"it has a segment of {tokens:,} tokens, more than the model decodes at once"
    if isinstance(memory.payload, EmbeddingsPayload):
        width = memory.payload.vectors.data.shape[1]
        return None if width == model.width else f"its vectors have {width} numbers, the model's {model.width}"
    if not isinstance(memory.payload, KVPayload):
        return None
    if memory.payload.shapes != model.layers:
        return "its keys and values have other shapes than the model's"
    patched = [] if memory.exact is None else [token for patch in memory.exact.patches for token in patch.values()]
    ids = (*memory.payload.prefix_ids, memory.payload.last_id or 0, max(patched, default=0))
    return None if max(ids) < model.vocabulary else f"it has a token {max(ids)}, which the model does not know"

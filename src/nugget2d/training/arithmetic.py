"""Estimates of the memory that training needs, for shapes too large to measure (docs/SCALING.md)."""

from dataclasses import dataclass
from math import ceil

from nugget2d.config import Adapters

GIB = 2**30
OPTIMIZED = 4 + 4 + 8  # bytes of a trained weight: itself, its gradient, AdamW's two moments, all float32


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped LM."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: four projections of attention, three of the feed-forward block, two norms."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def outer_weights(self) -> int:
        """Weights outside of the layers: embeddings, head, last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def weights(self) -> int:
        """All weights of the LM."""
        return self.layers * self.layer_weights + self.outer_weights

    def adapter_weights(self, rank: int) -> int:
        """Weights of two adapters of `rank` on the projections of queries, values and outputs."""
        queries = outputs = self.hidden + self.heads * self.head_dim
        values = self.hidden + self.kv_heads * self.head_dim
        return 2 * self.layers * rank * (queries + values + outputs)


SHAPES = {
    "1B": Shape(128_256, 2048, 8192, 16, 32, 8, 64, tied=True),
    "8B": Shape(128_256, 4096, 14_336, 32, 32, 8, 128),
    "70B": Shape(128_256, 8192, 28_672, 80, 64, 8, 128),
}


@dataclass(frozen=True)
class Cost:
    """Bytes of one training run: `weights` and `states` are shared out under FSDP, the rest every GPU has.

    Attributes:
        weights: frozen ones.
        states: trained weights with their gradients and moments.
        gathered: weights that one GPU has whole: the outer ones, the last layers, the layer that runs and the next.
        activations: of the micro-batch.
        nuggets: keys and values of the memory, within `activations`.
    """

    weights: int
    states: int
    gathered: int
    activations: int
    nuggets: int

    def per_gpu(self, gpus: int) -> int:
        """Bytes on each of `gpus` under FSDP; one GPU gathers nothing."""
        spread = ceil((self.weights + self.states) / gpus)
        return spread + self.activations + (self.gathered if gpus > 1 else 0)

    def gpus(self, capacity: int, *, usable: float = 0.9) -> int:
        """The smallest power of two of GPUs of `capacity` bytes that suffices.

        Args:
            capacity: of one GPU.
            usable: the share that is not lost to fragments and buffers.

        Returns:
            0 if no number does: what every GPU has is too much.
        """
        if self.activations + self.gathered >= usable * capacity and self.per_gpu(1) > usable * capacity:
            return 0
        gpus = 1
        while self.per_gpu(gpus) > usable * capacity:
            gpus *= 2
        return gpus


def layer_activations(shape: Shape) -> int:
    """Bytes that one layer keeps of each token under autocast to bfloat16, without checkpointing.

    26 d: two norms keep their input and its normalized form in float32 (16 d), and each of five projections its own
    copy of the input in bfloat16 (10 d). Attention keeps queries, keys, values, output; the feed-forward block four
    vectors.
    """
    attention = 2 * 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    return 26 * shape.hidden + attention + 4 * 2 * shape.intermediate


def training_cost(
    shape: Shape,
    adapters: Adapters,
    *,
    tokens: int,
    ratio: float,
    checkpoint: bool,
    rank: int = 32,
    base_bytes: int = 4,
) -> Cost:
    """The cost of autoencoding: the encoder reads `tokens`, and the decoder reads them after the nuggets.

    Args:
        shape: the LM.
        adapters: "lora" freezes it; "copies" trains it and a second set of its layers.
        tokens: of one GPU's micro-batch.
        ratio: of tokens to nuggets.
        checkpoint: `checkpoint_activations`: each layer keeps its input, and one layer at a time what it computes.
        rank: of the adapters.
        base_bytes: of a frozen weight.
    """
    copies = adapters == "copies"
    scorer = shape.hidden * (shape.hidden + 2)
    second = shape.layers * shape.layer_weights + shape.hidden  # the encoder's own layers and last norm
    trained = scorer + (shape.weights + second if copies else shape.adapter_weights(rank))
    frozen = 0 if copies else base_bytes * shape.weights
    whole = 4 if copies else base_bytes
    # both stacks' last layers if there are two
    gathered = whole * (shape.outer_weights + (4 if copies else 3) * shape.layer_weights)
    nuggets = int(tokens / ratio * shape.layers * 2 * 2 * shape.kv_heads * shape.head_dim)
    one_layer = layer_activations(shape)
    passes = 2 * shape.layers * (4 * shape.hidden if checkpoint else one_layer) + (one_layer if checkpoint else 0)
    logits = (2 + 4 + 4 + 4) * shape.vocabulary  # bfloat16, float32, log-softmax, and a gradient
    return Cost(frozen, OPTIMIZED * trained, gathered, tokens * (passes + logits) + nuggets, nuggets)


def training_flops(shape: Shape, adapters: Adapters, *, checkpoint: bool) -> int:
    """Floating point operations for each token of autoencoding, attention's own products left out (windows are short).

    Two for each weight in the forward pass, two more for the gradient of its input and two for its own, which a frozen
    weight has not; a layer that runs again costs its forward pass again.
    """
    each = 4 if adapters == "lora" else 6
    layers = 2 * shape.layers * shape.layer_weights  # encoder and decoder
    return each * (layers + shape.vocabulary * shape.hidden) + (2 * layers if checkpoint else 0)

"""Tiny random models and a byte-level tokenizer, made in memory: what every test works on."""

from functools import cache
from typing import NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nugget2d import Nugget2D

END = "<|endoftext|>"
ADAPTERS = ("lora", "copies")
WINDOW = 32


class Kind(NamedTuple):
    """An architecture: its configuration class, what it changes of `_SHAPE`, and what is special about it."""

    config: type[hf.PreTrainedConfig]
    changes: dict[str, object]
    # learned positions cannot be moved: a whole text of the suite must fit into one segment
    movable: bool = True


# wide weights: with the usual 0.02 a random model attends to everything alike and would hide mistakes
_SHAPE: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

KINDS = {
    "llama": Kind(hf.LlamaConfig, {"num_hidden_layers": 3}),
    "qwen2": Kind(hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": Kind(hf.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": Kind(hf.MistralConfig, {"sliding_window": None}),
    "mistral-window": Kind(hf.MistralConfig, {"sliding_window": 512}),
    "gemma3": Kind(
        hf.Gemma3TextConfig,
        {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": 512, "layer_types": _ALTERNATING},
    ),
    "phi3": Kind(hf.Phi3Config, {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "olmo2": Kind(hf.Olmo2Config, {}),
    "smollm3": Kind(hf.SmolLM3Config, {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "neox": Kind(hf.GPTNeoXConfig, {"rotary_pct": 0.5}),
    "gpt2": Kind(hf.GPT2Config, {"max_position_embeddings": 1024}, movable=False),
    "opt": Kind(
        hf.OPTConfig,
        {"ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.2, "max_position_embeddings": 1024},
        movable=False,
    ),
}
# both kinds of parameters on one architecture, the one with more to go wrong on the others
CASES = [
    ("llama", "lora"),
    ("llama", "copies"),
    *((kind, "lora") for kind in ("qwen2", "mistral-window", "phi3", "smollm3", "neox", "gpt2", "opt")),
    *((kind, "copies") for kind in ("qwen3", "mistral", "gemma3", "olmo2")),
]

TEXT = """\
The lighthouse keeper wrote in the log every evening, whether or not a ship had passed. On some days there was \
only the weather to note: wind from the west, rain before noon, a clear sky at dusk. On others, he counted sails. \
"Seven," he would say to the dog, and the dog would look up as if it had counted too.

In winter the road to the village was closed for weeks. He kept bread, salted fish and oil for the lamp; he kept \
three books, which he had read so often that he no longer needed to open them. When the mail boat came in March, it \
brought forty letters, two newspapers and a parcel of seeds. He planted beans behind the wall, where the wind could \
not reach them, and peas in front of it, because he liked to see them bend.

A young engineer arrived in the spring to install an electric light. She measured the tower, the stairs and the \
lantern room, and asked how many hours the lamp burned in a year. "Four thousand and some," said the keeper. "It is \
in the log." She opened the first volume, then the second, and did not come down until evening. What she found there \
was more than hours: it was the sea, written down a line at a time, for thirty-one years.
"""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with every byte in its alphabet, so that it can hold any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    bpe.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def lm(kind: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random causal LM of two or three layers, in float32, in eval mode."""
    config = KINDS[kind].config(**(_SHAPE | KINDS[kind].changes | {"vocab_size": len(tokenizer())} | changes))
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def make(kind: str = "llama", adapters: str = "lora", seed: int = 0, **options: object) -> Nugget2D:
    """A fresh untrained compressor over a tiny LM."""
    base = lm(kind, seed)
    torch.manual_seed(seed + 1)
    window = WINDOW if KINDS[kind].movable else 256
    fields = {"lora_rank": 4, "scorer_layer": 2, "window": window} | options
    return Nugget2D.from_base(base, tokenizer(), adapters=adapters, **fields)


def trained(kind: str = "llama", adapters: str = "lora", seed: int = 0, **options: object) -> Nugget2D:
    """A compressor whose encoder, decoder and flag differ, as after training."""
    model = make(kind, adapters, seed, **options)
    torch.manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in [
            *model.parameters_by_role.encoder_parameters(),
            *model.parameters_by_role.decoder_parameters(),
        ]:
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.flag.add_(torch.randn_like(model.flag) * 0.2)
        for prompt in model.prompts.values():
            prompt.add_(torch.randn_like(prompt) * 0.2)
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random tokens, never the end of text."""
    return torch.randint(1, len(tokenizer()), (rows, length), generator=torch.Generator().manual_seed(seed))

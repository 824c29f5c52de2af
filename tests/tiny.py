"""Tiny random models and a byte-level tokenizer, made in memory: what every test works on."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nugget2d import Nugget2D

END = "<|endoftext|>"
KINDS = ("llama", "qwen2", "mistral")
ADAPTERS = ("lora", "copies")
WINDOW = 32

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
    shape = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # wide weights: with the usual 0.02 a random model attends to everything alike and would hide mistakes
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**(shape | {"tie_word_embeddings": True}))).eval()
    return MistralForCausalLM(MistralConfig(**({"sliding_window": None} | shape))).eval()


def make(kind: str = "llama", adapters: str = "lora", seed: int = 0, **options: object) -> Nugget2D:
    """A fresh untrained compressor over a tiny LM."""
    base = lm(kind, seed)
    torch.manual_seed(seed + 1)
    fields = {"lora_rank": 4, "scorer_layer": 2, "window": WINDOW} | options
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

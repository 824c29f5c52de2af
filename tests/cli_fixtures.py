"""A tiny random model in a folder, for the command line: it knows nothing, but exact mode still returns every byte."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nugget2d import Nugget2D

# threads cost a model of this size more than they give
torch.set_num_threads(1)

TEXT = (
    "A lighthouse marks the rocks, and its keeper trims the lamp. Ships pass at night! 😀 Café costs 3 € here.\r\n"
    'Literal strings such as </s> or <|endoftext|> are ordinary text; <b>tags</b> & "quotes" too.\x00\x1b[31m\n'
) * 4


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["A lighthouse marks the rocks, and its keeper trims the lamp."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_tiny_model(folder: Path, *, seed: int = 0, name: str | None = None) -> Path:
    """A model that calls itself `name`, or by its folder so that memories lead back to it."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    options = {"adapters": "copies", "scorer_layer": 1, "window": 48, "name": name or str(folder)}
    Nugget2D.from_base(lm, tokenizer, **options).save_pretrained(folder)
    return folder

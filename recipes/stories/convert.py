"""A llama2.c checkpoint and tokenizer as a folder that transformers loads.

    python recipes/stories/convert.py stories260K.bin tok512.bin runs/stories/base

Layout of the checkpoint (version 0): seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len; a negative vocab_size says that the output matrix is not the embedding's), then float32 tensors. Of the
tokenizer: int32 longest token, then for each token float32 score, int32 length, bytes. Before anything is written,
logits and encodings are compared with llama2.c's own arithmetic (reference.py).
"""

import argparse
import random
import sys
from math import prod
from pathlib import Path

import numpy as np
import torch
from reference import Llama2c, Tokens
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nugget2d.errors import ModelError, NuggetError

HEADER = 7
UNKNOWN, START, END = "<unk>", "<s>", "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOLERANCE = 1e-4


def main() -> None:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        lm, tokenizer = read_checkpoint(options.checkpoint), read_tokenizer(options.tokenizer)
        difference = compare(lm, tokenizer, options.checkpoint, options.tokenizer)
    except NuggetError as error:
        sys.exit(f"error: {error}")
    lm.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{lm.num_parameters():,} parameters in {options.out}; logits are llama2.c's within {difference:.1e}")


def read_checkpoint(path: Path) -> LlamaForCausalLM:
    """The LM in a version 0 checkpoint.

    Raises:
        ModelError: the file is not one.
    """
    data = path.read_bytes()
    if len(data) < 4 * HEADER:
        raise ModelError(f"{path} is no llama2.c checkpoint: it is shorter than a header")
    dim, hidden, layers, heads, kv_heads, signed, positions = np.frombuffer(data, "<i4", HEADER).tolist()
    vocabulary = abs(signed)
    if min(dim, hidden, layers, heads, kv_heads, vocabulary, positions) < 1 or dim % (2 * heads) or heads % kv_heads:
        raise ModelError(f"{path} is no llama2.c checkpoint: its header has impossible sizes")
    head = dim // heads
    table = {
        "embed": (vocabulary, dim),
        "rms_att": (layers, dim),
        "wq": (layers, heads * head, dim),
        "wk": (layers, kv_heads * head, dim),
        "wv": (layers, kv_heads * head, dim),
        "wo": (layers, dim, heads * head),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "rotary tables, computed anew": (2, positions, head // 2),
        **({"head": (vocabulary, dim)} if signed < 0 else {}),
    }
    expected = 4 * (HEADER + sum(map(prod, table.values())))
    if len(data) != expected:
        raise ModelError(f"{path} has {len(data):,} bytes, its header promises {expected:,}; copy it again")
    flat = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=4 * HEADER)
    parts = flat.split([prod(shape) for shape in table.values()])
    w = {name: part.view(shape) for (name, shape), part in zip(table.items(), parts, strict=True)}
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=signed > 0,
        bos_token_id=1,
        eos_token_id=1,  # what stands between the stories that it was trained on
        pad_token_id=None,
    )
    state = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["rms_final"]}
    state["lm_head.weight"] = w.get("head", w["embed"])
    for layer in range(layers):
        names = {
            "input_layernorm": w["rms_att"][layer],
            "self_attn.q_proj": halves(w["wq"][layer], heads),
            "self_attn.k_proj": halves(w["wk"][layer], kv_heads),
            "self_attn.v_proj": w["wv"][layer],
            "self_attn.o_proj": w["wo"][layer],
            "post_attention_layernorm": w["rms_ffn"][layer],
            "mlp.gate_proj": w["w1"][layer],
            "mlp.down_proj": w["w2"][layer],
            "mlp.up_proj": w["w3"][layer],
        }
        state |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in names.items()}
    lm = LlamaForCausalLM(config)
    lm.load_state_dict(state)
    return lm.eval()


def halves(weight: Tensor, heads: int) -> Tensor:
    """(heads * d, n) rows for transformers, which rotates (i, i + d / 2), from llama2.c, which rotates (2i, 2i + 1)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """llama2.c's tokenizer as a fast one: BPE over the whole text, bytes for unknown characters, a space put before it.

    `tokenizer(text)` begins with `<s>`, as llama2.c does; `<s>` also ends a text.

    Raises:
        ModelError: the file is damaged, or its first tokens are not sentencepiece's.
    """
    pieces, scores = read_pieces(path)
    first = [UNKNOWN, START, END, *BYTES]
    names = [piece.strip("\n") if id_ < 3 else piece for id_, piece in enumerate(pieces)]
    if names[: len(first)] != first or len(set(names)) != len(names):
        raise ModelError(f"{path} does not begin with {UNKNOWN}, {START}, {END} and 256 bytes, or repeats a token")
    vocabulary = {name: id_ for id_, name in enumerate(names)}
    ordinary = set(names[len(first) :])
    by_score = sorted(ordinary, key=lambda name: (-scores[vocabulary[name]], vocabulary[name]))
    merges = [
        (name[:cut], name[cut:])
        for name in by_score
        for cut in range(1, len(name))
        if name[:cut] in ordinary and name[cut:] in ordinary
    ]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, byte_fallback=True))
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=START,
        clean_up_tokenization_spaces=False,
    )


def read_pieces(path: Path) -> tuple[list[str], list[float]]:
    """Strings and scores of all tokens.

    Raises:
        ModelError: the file ends inside a token, or a token is not UTF-8.
    """
    data = memoryview(path.read_bytes())
    pieces, scores, place = [], [], 4
    try:
        while place < len(data):
            (score,), (length,) = np.frombuffer(data, "<f4", 1, place), np.frombuffer(data, "<i4", 1, place + 4)
            piece = bytes(data[place + 8 : place + 8 + length])
            if len(piece) != length:
                raise ValueError("it ends inside a token")
            pieces.append(piece.decode())
            scores.append(float(score))
            place += 8 + int(length)
    except ValueError as error:
        raise ModelError(f"{path} is no llama2.c tokenizer: {error}") from error
    return pieces, scores


def compare(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, tokens: Path) -> float:
    """The greatest difference of any logit on random tokens.

    Raises:
        ModelError: it is not small, or random texts are encoded otherwise than by llama2.c.
    """
    theirs, draw = Tokens(tokens), random.Random(0)
    letters = [*"  aAeEtT.,!?\n\"'é漢🙂", *tokenizer.get_vocab()]
    for _ in range(200):
        text = "".join(draw.choices(letters, k=draw.randrange(40)))
        if tokenizer(text, split_special_tokens=True)["input_ids"] != [1, *theirs.encode(text)]:
            raise ModelError(f"the converted tokenizer encodes {text!r} otherwise than llama2.c")
    ids = draw.choices(range(lm.config.vocab_size), k=min(64, lm.config.max_position_embeddings))
    with torch.no_grad():
        mine = lm(torch.tensor([ids])).logits[0].numpy()
    difference = float(np.abs(mine - Llama2c(checkpoint).logits(ids)).max())
    if not difference < TOLERANCE:
        raise ModelError(f"logits of the converted model differ by {difference:.2e} from llama2.c's")
    return difference


if __name__ == "__main__":
    main()

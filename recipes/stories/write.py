"""Let a small LM write stories: the text that its compressor learns from, one JSON object with `text` a line.

    python recipes/stories/write.py runs/stories/base runs/stories/train.jsonl --tokens 2_000_000 --seed 0

Temperature 1, the likeliest tokens that make up 0.9 of the probability, from nothing to the end of the story (or of the
LM's positions: such stories are left out). Same seed, same stories, on the same machine.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.files import atomic_write

ROWS = 256
TOP_P = 0.9


def main() -> None:
    """Write the file, or leave it as it is if it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, required=True, help="at least so many")
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    lm = AutoModelForCausalLM.from_pretrained(options.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    torch.manual_seed(options.seed)
    count = written = 0
    with atomic_write(options.out) as file:
        for ids in stories(lm, tokenizer):
            text = tokenizer.decode(ids)
            file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
            count, written = count + 1, written + len(ids)
            if written >= options.tokens:
                break
    print(f"{count:,} stories of {written / count:.0f} tokens in {options.out}")


@torch.no_grad()
def stories(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Ids of one story after the other, without end, from torch's global generator."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    while True:
        begin = torch.full((ROWS, 1), start)
        rows = cast(Any, lm).generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_p=TOP_P,
            top_k=0,
            max_length=lm.config.max_position_embeddings,
            pad_token_id=end,
        )
        for row in rows[:, 1:].tolist():
            if end in row:
                yield row[: row.index(end)]


if __name__ == "__main__":
    main()

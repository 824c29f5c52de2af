"""Documents to token packs: read text files, train a tokenizer, keep ids as one flat array.

A pack is a folder with `tokenizer.json`, `train.bin` and `held_out.bin` (little-endian uint16 or uint32 ids, documents
separated by the end-of-text token). Once made it is all that training reads, so it can be carried to another machine.
"""

import json
import lzma
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nugget2d.checkpoints.base import load_tokenizer
from nugget2d.errors import RecipeError
from nugget2d.training.recipe import DataConfig, Source, TokenizerConfig

END_OF_TEXT = "<|endoftext|>"


def documents(source: Source, folder: Path) -> Iterator[str]:
    """Texts of a source, in order, up to its `max_chars`.

    Raises:
        RecipeError: no such file, an unknown suffix, or a record without `text`.
    """
    paths = sorted(folder.glob(source.path)) if set("*?[") & set(source.path) else [folder / source.path]
    if not paths or not all(path.is_file() for path in paths):
        raise RecipeError(f"data path {source.path!r} matches no file under {folder.resolve()}; correct it")
    left = source.max_chars
    for text in chain.from_iterable(_read(path, source.where) for path in paths):
        yield text if left is None else text[:left]
        if left is not None:
            left -= len(text)
            if left <= 0:
                return


def _read(path: Path, where: dict[str, str]) -> Iterator[str]:
    name = path.name
    opener = lzma.open if name.endswith(".xz") else open
    stem = name.removesuffix(".xz")
    if not stem.endswith((".txt", ".jsonl")):
        raise RecipeError(f"cannot read {path}: give a .txt, .jsonl or .jsonl.xz file")
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        if stem.endswith(".txt"):
            yield file.read()
            return
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                text = record["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(f"{path} line {number} is not a JSON object with a `text` field") from error
            if all(str(record.get(key)) == value for key, value in where.items()):
                yield text


def train_tokenizer(sources: Sequence[Source], folder: Path, config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no normalisation, every byte in the alphabet, so any UTF-8 text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = (source.model_copy(update={"max_chars": config.sample_chars}) for source in sources)
    tokenizer.train_from_iterator(chain.from_iterable(documents(s, folder) for s in samples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


class Pack:
    """A flat array of token ids that windows are drawn from."""

    def __init__(self, path: Path) -> None:
        """Map the file; its ids are not read into memory at once."""
        self.ids = np.memmap(path, dtype=_dtype_of(path), mode="r")

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.ids)

    def windows(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """(rows, length) ids at random places.

        Raises:
            RecipeError: the pack is shorter than a window.
        """
        self._check(length)
        starts = torch.randint(len(self.ids) - length + 1, (rows,), generator=generator).tolist()
        return self._stack(starts, length)

    def spread(self, rows: int, length: int) -> Tensor:
        """(rows, length) ids at evenly spaced places, always the same: for evaluation."""
        self._check(length)
        starts = np.linspace(0, len(self.ids) - length, rows).astype(int).tolist()
        return self._stack(starts, length)

    def _stack(self, starts: Sequence[int], length: int) -> Tensor:
        return torch.from_numpy(np.stack([self.ids[s : s + length] for s in starts]).astype(np.int64))

    def _check(self, length: int) -> None:
        if len(self.ids) < length:
            raise RecipeError(f"the data has {len(self.ids)} tokens, a window needs {length}; give more text")


def make_pack(
    pack: Path, data: DataConfig, folder: Path, config: TokenizerConfig | None, base: str | None
) -> PreTrainedTokenizerBase:
    """Make (or reuse) a pack in `pack`; returns its tokenizer: trained, or the base's own.

    Raises:
        RecipeError: see `documents`.
        ModelError: the base's tokenizer cannot be loaded.
    """
    if (pack / "done").is_file():
        return load_tokenizer(pack)
    pack.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(base)) if config is None else train_tokenizer(data.train, folder, config)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    for name, sources, limit in (("train", data.train, data.max_tokens), ("held_out", data.held_out, None)):
        _write(pack / f"{name}.bin", tokenizer, sources, folder, dtype, limit)
    tokenizer.save_pretrained(pack)
    (pack / "done").write_text(np.dtype(dtype).name)
    return tokenizer


def _write(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    folder: Path,
    dtype: type,
    limit: int | None,
) -> None:
    """Sources take turns document by document, so that a token limit cuts all of them alike."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = _interleave([documents(source, folder) for source in sources])
    written = 0
    with path.open("wb") as file:
        while batch := list(islice(texts, 64)):
            encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
            ids = np.concatenate([np.asarray([*row, *end], dtype=dtype) for row in encoded["input_ids"]])
            ids = ids if limit is None else ids[: limit - written]
            file.write(ids.tobytes())
            written += len(ids)
            if written == limit:
                return


def _interleave(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def _dtype_of(path: Path) -> str:
    return (path.parent / "done").read_text()

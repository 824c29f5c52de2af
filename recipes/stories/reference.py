"""What llama2.c computes, in plain numpy: an independent forward pass and tokenizer to hold a conversion against.

Slow and simple on purpose; reads the files by itself and shares no code with convert.py.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Llama2c:
    """A version 0 checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read header and weights."""
        with path.open("rb") as file:
            self.dim, hidden, self.layers, self.heads, self.kv_heads, vocab, positions = struct.unpack(
                "<7i", file.read(28)
            )

            def take(*shape: int) -> Array:
                return np.fromfile(file, dtype="<f4", count=int(np.prod(shape))).reshape(shape)

            dim, layers = self.dim, self.layers
            self.width = dim // self.heads
            kv = self.width * self.kv_heads
            self.embedding = take(abs(vocab), dim)
            self.rms_att = take(layers, dim)
            self.wq, self.wk, self.wv = take(layers, dim, dim), take(layers, kv, dim), take(layers, kv, dim)
            self.wo = take(layers, dim, dim)
            self.rms_ffn = take(layers, dim)
            self.w1, self.w2, self.w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
            self.rms_final = take(dim)
            take(positions, self.width)  # cosines and sines, which llama2.c too computes anew
            self.head = take(-vocab, dim) if vocab < 0 else self.embedding

    def logits(self, ids: Sequence[int]) -> Array:
        """n ids -> (n, vocabulary), token after token with a cache, as run.c does it."""
        keys: list[list[Array]] = [[] for _ in range(self.layers)]
        values: list[list[Array]] = [[] for _ in range(self.layers)]
        return np.stack([self._step(id_, position, keys, values) for position, id_ in enumerate(ids)])

    def _step(self, id_: int, position: int, keys: list[list[Array]], values: list[list[Array]]) -> Array:
        x = self.embedding[id_].copy()
        for layer in range(self.layers):
            normed = _norm(x, self.rms_att[layer])
            query = _rotate((self.wq[layer] @ normed).reshape(self.heads, self.width), position)
            keys[layer].append(_rotate((self.wk[layer] @ normed).reshape(self.kv_heads, self.width), position))
            values[layer].append((self.wv[layer] @ normed).reshape(self.kv_heads, self.width))
            mixed = []
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                weights = np.array([query[head] @ key[kv] for key in keys[layer]]) / np.sqrt(self.width)
                weights = np.exp(weights - weights.max())
                weights /= weights.sum()
                mixed.append(sum(w * value[kv] for w, value in zip(weights, values[layer], strict=True)))
            x = x + self.wo[layer] @ np.concatenate(mixed)
            normed = _norm(x, self.rms_ffn[layer])
            gate = self.w1[layer] @ normed
            x = x + self.w2[layer] @ (gate / (1 + np.exp(-gate)) * (self.w3[layer] @ normed))
        return self.head @ _norm(x, self.rms_final)


def _norm(x: Array, weight: Array) -> Array:
    return weight * x / np.sqrt((x * x).mean() + 1e-5)


def _rotate(x: Array, position: int) -> Array:
    """(heads, d): each pair of neighbours turns by its own angle."""
    turned = np.empty_like(x)
    for i in range(0, x.shape[1], 2):
        angle = position / 10_000.0 ** (i / x.shape[1])
        turned[:, i] = x[:, i] * np.cos(angle) - x[:, i + 1] * np.sin(angle)
        turned[:, i + 1] = x[:, i] * np.sin(angle) + x[:, i + 1] * np.cos(angle)
    return turned


class Tokens:
    """A tokenizer file."""

    def __init__(self, path: Path) -> None:
        """Read strings and scores."""
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        with path.open("rb") as file:
            file.read(4)
            while header := file.read(8):
                score, length = struct.unpack("<fi", header)
                self.pieces.append(file.read(length))
                self.scores.append(score)
        self.ids = {piece: id_ for id_, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Ids without a start token: characters, or bytes, merged greedily, the best score first, then the leftmost."""
        ids: list[int] = [self.ids[b" "]] if text else []
        for character in text:
            code = character.encode()
            ids += [self.ids[code]] if code in self.ids else [byte + 3 for byte in code]
        while True:
            best, place = -float("inf"), -1
            for i in range(len(ids) - 1):
                merged = self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])
                if merged is not None and self.scores[merged] > best:
                    best, place = self.scores[merged], i
            if place < 0:
                return ids
            ids[place : place + 2] = [self.ids[self.pieces[ids[place]] + self.pieces[ids[place + 1]]]]

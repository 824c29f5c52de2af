"""Bits per character of general-purpose compressors on the same texts."""

import lzma
from collections.abc import Callable, Sequence


def coder_bits(texts: Sequence[str]) -> dict[str, float]:
    """Bits per character of xz (preset 9, extreme) and zstd (level 19), containers included.

    "each" codes every text by itself, "stream" all of them as one, where a coder adapts across texts.
    """
    import zstandard

    coders: dict[str, Callable[[bytes], bytes]] = {
        "xz": _xz,
        "zstd": zstandard.ZstdCompressor(level=19).compress,
    }
    characters = sum(map(len, texts))
    stream = "".join(texts).encode()
    bits = {}
    for name, code in coders.items():
        bits[f"{name}_each"] = 8 * sum(len(code(text.encode())) for text in texts) / characters
        bits[f"{name}_stream"] = 8 * len(code(stream)) / characters
    return {name: round(value, 4) for name, value in bits.items()}


def _xz(data: bytes) -> bytes:
    # the preset's dictionary of 64 MiB would take most of the time; one as long as the data gives the same result
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(data))}
    return lzma.compress(data, filters=[lzma2])

"""GGUF files, converted once into an ordinary transformers folder in the cache.

Dequantizing takes a hundred times as long as loading the result.
"""

import hashlib
import shutil
from importlib import util
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nugget2d.errors import ModelError, OutputError
from nugget2d.files import cache_folder, file_identity

MAX_STEM = 48  # characters of the file's name in that of its folder: a name has up to 255 bytes, a character up to 4


def is_gguf(name: str | Path) -> bool:
    """Whether `name` is that of a GGUF file, which may be missing."""
    return Path(name).suffix.lower() == ".gguf"


def converted(path: Path) -> Path:
    """The folder with the LM and tokenizer of a GGUF file as bfloat16 safetensors; made if this file has none yet.

    Raises:
        ModelError: no such file, not a causal LM that transformers can read, or the package `gguf` is missing.
        OutputError: the cache folder cannot be written.
    """
    path = path.absolute()
    try:
        identity = file_identity(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem[:MAX_STEM]}-{digest}"
    if folder.is_dir():
        return folder
    if util.find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the package gguf: pip install 'nugget2d[gguf]'")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(dir=folder.parent, prefix=".nugget2d-"))
    except OSError as error:
        raise OutputError(f"cannot write the converted {path}: {error}; set NUGGET2D_CACHE to a folder") from error
    try:
        _convert(path, made)
        made.chmod(0o755)  # mkdtemp allows only its owner
        made.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise OutputError(f"cannot write the converted {path} to {folder}: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": path.name}
    whole = GgufConfig(dequantize=True)  # else weights would stay packed where there is a kernel for them
    try:
        auto = cast(Any, AutoModelForCausalLM)
        lm, report = auto.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            quantization_config=whole,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **options)
    except Exception as error:  # damaged files cause errors of any type
        raise ModelError(f"cannot read {path}: {error}") from error
    if report["missing_keys"]:
        raise ModelError(f"{path} is no whole language model: no weights for {sorted(report['missing_keys'])[:3]}")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

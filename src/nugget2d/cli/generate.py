"""`nugget2d generate`: continues a prompt after a memory."""

from typing import Annotated, Any

import typer

from nugget2d.cli.options import MemoryFile, ReaderName, Seed, Temperature
from nugget2d.cli.shared import load_memory, load_reader, require_temperature, write_stdout


def generate(
    file: MemoryFile,
    prompt: Annotated[str, typer.Option("--prompt", help="What to continue, as if it came after the text.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Stop after so many tokens.")] = 64,
    temperature: Temperature = 0,
    seed: Seed = 0,
    model: ReaderName = None,
) -> None:
    """Continue a prompt after a memory; the text is printed as it is generated."""
    require_temperature(temperature)
    memory = load_memory(file)
    reader = load_reader(memory, model)
    import torch

    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    parts = reader.generate(prompt, memory=memory, max_new_tokens=max_new_tokens, stream=True, **options)
    for part in parts:
        write_stdout(part.encode())
    write_stdout(b"\n")

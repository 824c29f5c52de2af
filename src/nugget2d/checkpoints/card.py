"""The model card of a folder: README.md with metadata for the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from nugget2d.config import NuggetConfig

CARD_FILE = "README.md"
# to edit a card, remove this line: saving again then keeps the card
MARK = "<!-- Written by save_pretrained, and written again by the next one unless this line is removed. -->"

_METHOD = "https://arxiv.org/abs/2310.02409"
_METRICS = {
    "accuracy": "share of tokens reconstructed from one nugget in {}, teacher-forced",
    "continue_none": "nats per token of the continuation, nothing seen",
    "continue_10x": "nats per token of the continuation, one nugget in 10 tokens seen",
    "continue_full": "nats per token of the continuation, all seen",
    "lm_loss": "nats per token as a plain language model",
}


def write_card(folder: Path, config: NuggetConfig, base: str | None, metrics: Mapping[str, object]) -> None:
    """Write README.md, unless there is one that was edited.

    Args:
        folder: of the model.
        config: what it was trained with.
        base: hub id of its base, if it has one.
        metrics: `evaluation.held_out` metrics from its training; may be empty.
    """
    path = folder / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return
    path.write_text(model_card(config, base, metrics), encoding="utf-8")


def model_card(config: NuggetConfig, base: str | None, metrics: Mapping[str, object]) -> str:
    """Markdown with YAML front matter. The licence is left to the owner: it depends on base and text."""
    metadata = {
        "library_name": "nugget2d",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "see-base-model-and-training-text",
        "tags": ["nugget2d", "context-compression", "kv-cache"],
        **({} if base is None else {"base_model": base, "base_model_relation": _RELATIONS[config.adapters]}),
    }
    return "\n".join([
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        MARK,
        f"# {config.name}",
        "",
        f"A [Nugget2D]({_METHOD}) context compressor for nugget2d: a text of n tokens becomes n / ratio *nuggets*, "
        "keys and values that",
        "the model reads in place of the text.",
        "",
        "```python",
        "from nugget2d import Nugget2D",
        "",
        'model = Nugget2D.from_pretrained("path-or-hub-id")',
        "memory = model.compress(text, ratio=10)",
        'print(model.generate("In the end", memory=memory))',
        "print(model.reconstruct(memory))",
        "```",
        "",
        *_table("configuration", {key: _value(value) for key, value in config.model_dump().items()}),
        *(_table("held-out text", _described(metrics)) if metrics else []),
    ])  # fmt: skip


_RELATIONS = {"lora": "adapter", "copies": "finetune"}


def _described(metrics: Mapping[str, object]) -> dict[str, str]:
    rows = {}
    for name, value in metrics.items():
        kind, _, ratio = name.partition("_")
        text = _METRICS.get(name) or _METRICS.get(kind, "").format(ratio.removesuffix("x"))
        if text and isinstance(value, float):
            rows[text] = f"{value:.3f}"
    return rows


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

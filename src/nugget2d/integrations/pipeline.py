"""The pipeline "compressed-text-generation": compresses contexts and continues prompts after their memories."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import Pipeline

from nugget2d.errors import InputError, ModelError
from nugget2d.memory.memory import Memory
from nugget2d.model import Nugget2D

TASK = "compressed-text-generation"

COMPRESSING = ("method", "ratio", "nuggets", "nbytes", "selection", "dtype")


class CompressedTextGeneration(Pipeline):
    """Compresses contexts, all of a call together, and continues prompts after them.

        pipe({"context": book, "prompt": "In the end"}, ratio=10, max_new_tokens=32)  # [{"generated_text": "..."}]

    An input is a context (a text, or a `Memory` made before), or a mapping with `context` and perhaps `prompt`. One
    input gives one list of answers, a list of inputs a list of such lists. `method`, `ratio`, `nuggets`,
    `nbytes`, `selection` and `dtype` are those of `Nugget2D.compress`; all else goes to `Nugget2D.generate`.
    """

    _load_tokenizer: Any = False
    _load_processor: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        """As any pipeline; of an adapter or a plain LM named by its folder, transformers loads the base for it.

        Raises:
            ModelError: the model is no Nugget2D.
        """
        if not isinstance(model, Nugget2D):
            raise ModelError(
                f"the pipeline {TASK} needs a Nugget2D, and transformers loads {type(model).__name__} here; give "
                "model=Nugget2D.from_pretrained(...)"
            )
        super().__init__(cast(Any, model), *arguments, **options)

    def __call__(self, inputs: Any, *_: Any, **parameters: Any) -> Any:
        """Compress the contexts and continue each.

        Raises:
            InputError: no context, an empty one, or an impossible option.
        """
        single = isinstance(inputs, str | Mapping | Memory)
        forward = self._sanitize_parameters(**parameters)[1]
        rows = [self.preprocess(row) for row in ([inputs] if single else inputs)]
        answers = self.postprocess(self._forward(rows, **{**self._forward_params, **forward}))
        return answers[0] if single else answers

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, parameters, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """One input as a mapping with both `context` and `prompt`."""
        row = dict(input_) if isinstance(input_, Mapping) else {"context": input_}
        if "context" not in row or row.keys() - {"context", "prompt"}:
            raise InputError(f"an input is a text or has the keys `context` and `prompt`, not {sorted(row)}")
        return {"prompt": ""} | row

    def _forward(self, input_tensors: Any, **parameters: Any) -> Any:
        model, rows = cast(Nugget2D, self.model), input_tensors
        compressing = {key: parameters.pop(key) for key in COMPRESSING if key in parameters}
        texts = [row["context"] for row in rows if not isinstance(row["context"], Memory)]
        made = iter(model.compress(texts, **compressing) if texts else [])
        memories = [row["context"] if isinstance(row["context"], Memory) else next(made) for row in rows]
        return [
            model.generate(row["prompt"], memory=memory, **parameters)
            for row, memory in zip(rows, memories, strict=True)
        ]

    def postprocess(self, model_outputs: Any, **_: Any) -> list[list[dict[str, str]]]:
        """Answers as transformers' text generation gives them, the prompt not repeated."""
        return [
            [{"generated_text": text} for text in ([texts] if isinstance(texts, str) else texts)]
            for texts in model_outputs
        ]

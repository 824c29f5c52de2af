"""Support in transformers for saved model folders and a pipeline, after a call of `register`.

from nugget2d.integrations.transformers import register

register()
model = AutoModel.from_pretrained("folder")  # a Nugget2D
pipe = pipeline("compressed-text-generation", model="folder")
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from nugget2d.checkpoints.layout import MODEL_TYPE
from nugget2d.errors import InputError
from nugget2d.integrations.pipeline import TASK, CompressedTextGeneration
from nugget2d.model import Nugget2D

LOADING = {"base", "device", "device_map", "dtype", "quantization_config"}


class Nugget2DConfig(PreTrainedConfig):
    """The `AutoConfig` of a folder's config.json; the configuration itself is in its nugget2d.json."""

    model_type = MODEL_TYPE


class Nugget2DLoader:
    """The loader that `AutoModel` calls for a folder of that configuration."""

    config_class = Nugget2DConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: Nugget2DConfig | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        adapter_kwargs: object = None,
        **options: Any,
    ) -> Nugget2D:
        """A Nugget2D from a folder or hub id; `options` are those of `Nugget2D.from_pretrained`.

        `config` and `adapter_kwargs` are passed by transformers and not used.

        Raises:
            InputError: an option that is none of them.
            ModelError: see `Nugget2D.from_pretrained`.
        """
        # transformers passes its own along, switched off or with an underscore
        wanted = {key: value for key, value in options.items() if value and not key.startswith("_")}
        if unknown := sorted(wanted.keys() - LOADING):
            raise InputError(
                f"Nugget2D cannot be loaded with {', '.join(unknown)}; it takes {', '.join(sorted(LOADING))}"
            )
        return Nugget2D.from_pretrained(
            name, revision=revision, token=token, local_files_only=local_files_only, **wanted
        )


def register() -> None:
    """Register nugget2d with `AutoConfig`, `AutoModel` and `pipeline`; repeated calls have no effect."""
    AutoConfig.register(Nugget2DConfig.model_type, Nugget2DConfig, exist_ok=True)
    AutoModel.register(Nugget2DConfig, Nugget2DLoader, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=CompressedTextGeneration, pt_model=AutoModel)

"""transformers loads saved model folders, and has a pipeline for them, once `register` was called.

from nugget2d.integrations.transformers import register

register()
model = AutoModel.from_pretrained("folder")  # a Nugget2D
pipe = pipeline("compressed-text-generation", model="folder")
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from nugget2d.checkpoints.layout import MODEL_TYPE
from nugget2d.errors import InputError
from nugget2d.integrations.pipeline import TASK, CompressedTextGeneration
from nugget2d.model import Nugget2D

LOADING = {"base", "device", "device_map", "dtype", "quantization_config"}


class Nugget2DConfig(PreTrainedConfig):
    """What `AutoConfig` makes of a folder's config.json; all choices are in its nugget2d.json."""

    model_type = MODEL_TYPE


class Nugget2DLoader:
    """What `AutoModel` calls with a folder of that configuration."""

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

        `config` and `adapter_kwargs` are what transformers found out on its way; neither is needed.

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
        if local_files_only and not Path(name).is_dir():
            name = snapshot_download(str(name), revision=revision, token=token, local_files_only=True)
        return Nugget2D.from_pretrained(name, revision=revision, token=token, **wanted)


def register() -> None:
    """Make nugget2d known to `AutoConfig`, `AutoModel` and `pipeline`; again does no harm."""
    AutoConfig.register(Nugget2DConfig.model_type, Nugget2DConfig, exist_ok=True)
    AutoModel.register(Nugget2DConfig, Nugget2DLoader, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=CompressedTextGeneration, pt_model=AutoModel)

"""Resolves model names: a bundled model, a folder, or a repository of the hub."""

from importlib import resources
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from nugget2d.checkpoints.gguf import is_gguf
from nugget2d.checkpoints.layout import CONFIG_FILE, HUB_FILE
from nugget2d.errors import ModelError
from nugget2d.modeling.adapters import ADAPTER_FILE


def bundled_models() -> list[str]:
    """Names of the models shipped inside the package."""
    root = resources.files("nugget2d") / "models"
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file()) if root.is_dir() else []


def find_compressor(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path | None:
    """The folder of a compressor: bundled, local, or of the hub (then it is downloaded); None: it is none.

    Args:
        name: which.
        revision: branch, tag or commit of a repository; None takes its main branch.
        token: for private or gated repositories; None takes the one that `hf auth login` stored.

    Raises:
        ModelError: there is neither a compressor nor another model of that name.
    """
    if str(name) in bundled_models():
        return Path(str(resources.files("nugget2d") / "models" / str(name)))
    if is_gguf(name):
        return None
    if exists(name):
        return _local_compressor(Path(name))
    if hub_file(str(name), CONFIG_FILE, revision=revision, token=token) is None:
        return None
    try:
        return Path(snapshot_download(str(name), revision=revision, token=token))
    except Exception as error:  # whatever the hub client raises
        raise ModelError(f"cannot get model {str(name)!r} from the hub: {error}") from error


def on_this_machine(name: str | Path, *, revision: str | None = None) -> str | Path:
    """`name`, if it is bundled, a folder or a file, else the folder that a repository was downloaded to before.

    A folder, as transformers asks the hub for some files of a hub id even with `local_files_only`.

    Raises:
        ModelError: it is none of these; the hub is not asked.
    """
    if str(name) in bundled_models() or is_gguf(name) or exists(name):
        return name
    if not is_hub_id(str(name)):
        raise _unknown(str(name), "and it cannot be a hub id")
    try:
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
    except Exception as error:  # whatever the hub client raises
        raise _unknown(str(name), "and nothing of that name was downloaded from the hub before") from error


def _local_compressor(place: Path) -> Path | None:
    if exists(place / CONFIG_FILE):
        return place
    if not any(exists(place / file) for file in (HUB_FILE, ADAPTER_FILE)):  # an adapter is refused with its remedy
        raise ModelError(
            f"{place} is no model: a compressor's folder has {CONFIG_FILE}, that of an LM has {HUB_FILE}; give one of "
            "these, a .gguf file, or a hub id"
        )
    return None


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder of that name here.

    Raises:
        ModelError: that cannot be told: a name too long, a folder that may not be entered.
    """
    try:
        return Path(path).exists()
    except OSError as error:
        raise ModelError(f"cannot look up model {str(path)[:80]!r}: {error.strerror}") from error


def hub_file(name: str, file: str, *, revision: str | None = None, token: str | None = None) -> Path | None:
    """One file of the repository `name`, downloaded; None where the repository has no such file.

    Raises:
        ModelError: `name` is no repository, or the hub cannot be reached and nothing of it was downloaded before.
    """
    if not is_hub_id(name):
        raise _unknown(name, "and it cannot be a hub id")
    try:
        return Path(hf_hub_download(name, file, revision=revision, token=token))
    except LocalEntryNotFoundError as error:  # the hub was not asked
        here = (try_to_load_from_cache(name, known, revision=revision) for known in (HUB_FILE, ADAPTER_FILE))
        if any(isinstance(path, str) for path in here):
            return None
        raise _unknown(name, f"and the hub cannot be asked: {error}") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # whatever the hub client raises: unknown, gated, no route
        raise _unknown(name, f"and the hub gives none: {error}") from error


def is_hub_id(name: str) -> bool:
    """Whether `name` could be a repository of the hub and is no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _unknown(name: str, reason: str) -> ModelError:
    return ModelError(
        f"unknown model {name!r}: not bundled ({', '.join(bundled_models()) or 'none'}), no folder, no .gguf file, "
        f"{reason}"
    )

"""`CompressOptions`: how a text is compressed, as one record for Python, command line, store, indexing and server."""

import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from pydantic import model_validator

from nugget2d.config import Frozen
from nugget2d.errors import InputError
from nugget2d.memory.memory import Memory
from nugget2d.methods.base import Method
from nugget2d.methods.budget import Budget
from nugget2d.methods.registry import DEFAULT, make_method
from nugget2d.modeling.network import Network

# keywords of earlier versions, which still work for one release
RENAMED = {"quality": "target_accuracy", "refine": "optimize_steps"}


class CompressOptions(Frozen):
    """A method with its configuration, and a budget; everything that was left out is filled in.

    Attributes:
        method: its name in the registry.
        config: its configuration.
        ratio: see `Budget`; of the three at most one is given, none where the configuration says how much is kept.
        nuggets: see `Budget`.
        nbytes: see `Budget`.
    """

    method: str
    config: dict[str, Any]
    ratio: float | None = None
    nuggets: int | None = None
    nbytes: int | None = None

    @staticmethod
    def of(
        model: Network,
        *,
        method: str | None = None,
        ratio: float | None = None,
        nuggets: int | None = None,
        nbytes: int | None = None,
        **options: Any,
    ) -> "CompressOptions":
        """The arguments of `Nugget2D.compress`; what was left out becomes what the model would take.

        Raises:
            InputError: unknown method or option, a value that is out of range, more than one budget.
        """
        name = method or ("nugget2d" if model.has_compressor else DEFAULT)
        chosen = make_method(name, _current(options)).bound(model)
        if (ratio, nuggets, nbytes) == (None, None, None):
            ratio = None if chosen.sets_budget else chosen.default_ratio
        how = CompressOptions(
            method=name, config=chosen.model_dump(mode="json"), ratio=ratio, nuggets=nuggets, nbytes=nbytes
        )
        _ = how.budget  # refused here, before any work
        return how

    @property
    def budget(self) -> Budget | None:
        """What may be kept."""
        given = (self.ratio, self.nuggets, self.nbytes)
        return None if given == (None, None, None) else Budget(*given)

    def make(self) -> Method:
        """The method."""
        return make_method(self.method, self.config)

    def compress(
        self, model: Network, texts: Sequence[str], on_progress: Callable[[int, int], None] | None = None
    ) -> list[Memory]:
        """`texts` compressed so.

        Raises:
            InputError, ModelError: see `Method.compress`; something that is no text.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {number} is {type(text).__name__}, not str; decode bytes first")
        return self.make().compress(model, texts, self.budget, on_progress)

    def address(self, text: str, model: Network) -> str:
        """Content address of the memory that `model` makes of `text`, in 32 hexadecimal digits.

        All trained weights count for methods that were trained; others share addresses with any wrapper of the base.
        """
        base = model.fingerprint
        # encoder and scorer make the memory too, not only what reads it
        compressor = model.legacy_fingerprint.model if self.make().needs_training else ""
        return digest("text", base.model, base.tokenizer, compressor, self.model_dump_json(), text)

    @model_validator(mode="before")
    @classmethod
    def _from_version_1(cls, data: Any) -> Any:
        """Records of earlier stores knew nugget2d alone, by these keywords."""
        if not isinstance(data, dict) or "refine" not in data:
            return data
        old = dict(data)
        ratio = old.pop("ratio")
        return {"method": "nugget2d", "ratio": ratio, "config": {RENAMED.get(key, key): old[key] for key in old}}


def digest(kind: str, *parts: str) -> str:
    """32 hexadecimal digits of a list of texts."""
    made = blake2b(digest_size=16, person=kind.encode())
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)  # the length: no two lists of parts are one stream
    return made.hexdigest()


def _current(options: dict[str, Any]) -> dict[str, Any]:
    """Options under their current names; those that were not given (None) are left out."""
    current = {}
    for name, value in options.items():
        if name in RENAMED:
            warnings.warn(f"{name}= is now {RENAMED[name]}=", DeprecationWarning, stacklevel=4)
            name = RENAMED[name]
            if options.get(name) is not None:
                raise InputError(f"{name} is given twice, under its old and its new name; leave out the old one")
        if value is not None:
            current[name] = value
    return current

"""`CompressOptions`: how to compress a text, as one record for Python API, command line, store, indexing and server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, model_validator

from nugget2d.config import Frozen, wrong_field
from nugget2d.deprecation import renamed_keywords
from nugget2d.errors import InputError
from nugget2d.methods.budget import Budget
from nugget2d.methods.registry import DEFAULT, make_method

if TYPE_CHECKING:  # the records of a store hold options: lists of them must not wait for torch
    from nugget2d.memory.memory import Memory
    from nugget2d.memory.states import StoreDtype
    from nugget2d.methods.base import Method
    from nugget2d.modeling.network import Network

# former names of options, in calls and in the records of earlier stores
RENAMED = {"quality": "target_accuracy", "refine": "optimize_steps"}

# how states are kept unless asked otherwise: a quarter of float32, without a measurable loss (docs/RESULTS.md)
KEPT_DTYPE: "StoreDtype" = "int8"


class CompressOptions(Frozen):
    """A method, its configuration and a budget, with defaults filled in.

    Attributes:
        method: its name in the registry.
        config: its configuration.
        ratio: see `Budget`; of the three at most one is given, none where the configuration determines how much is
            kept.
        nuggets: see `Budget`.
        nbytes: see `Budget`.
    """

    method: str
    config: dict[str, Any]
    ratio: float | None = None
    nuggets: int | None = None
    nbytes: int | None = None

    @staticmethod
    @renamed_keywords(**RENAMED)
    def of(
        model: "Network",
        /,
        *,
        method: str | None = None,
        ratio: float | None = None,
        nuggets: int | None = None,
        nbytes: int | None = None,
        **options: Any,
    ) -> "CompressOptions":
        """From the arguments of `Nugget2D.compress`; what was left out gets the model's defaults.

        Raises:
            InputError: unknown method or option, a value that is out of range, more than one budget.
        """
        name = method or ("nugget2d" if model.has_compressor else DEFAULT)
        given = {option: value for option, value in options.items() if value is not None}
        chosen = make_method(name, given).bound(model)
        if (ratio, nuggets, nbytes) == (None, None, None):
            ratio = None if chosen.sets_budget else chosen.default_ratio
        config = chosen.model_dump(mode="json")
        try:
            how = CompressOptions(method=name, config=config, ratio=ratio, nuggets=nuggets, nbytes=nbytes)
        except ValidationError as error:
            raise wrong_field(error) from error
        _ = how.budget  # refused here, before any work
        return how

    @staticmethod
    def to_keep(model: "Network", /, **options: Any) -> "CompressOptions":
        """The same for a memory that is kept in a file or a store: its states are int8 unless a dtype is given.

        Raises:
            InputError: see `of`.
        """
        how = CompressOptions.of(model, **options)
        if options.get("dtype") is not None or "dtype" not in how.config:
            return how
        return how.model_copy(update={"config": {**how.config, "dtype": KEPT_DTYPE}})

    @property
    def budget(self) -> Budget | None:
        """What may be kept."""
        given = (self.ratio, self.nuggets, self.nbytes)
        return None if given == (None, None, None) else Budget(*given)

    def make(self) -> "Method":
        """The method."""
        return make_method(self.method, self.config)

    def compress(
        self, model: "Network", texts: Sequence[str], on_progress: Callable[[int, int], None] | None = None
    ) -> "list[Memory]":
        """Compress `texts`.

        Raises:
            InputError, ModelError: see `Method.compress`; a text that is not a string.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {number} is {type(text).__name__}, not str; decode bytes first")
        return self.make().compress(model, texts, self.budget, on_progress)

    def address(self, text: str, model: "Network") -> str:
        """Content address of the memory that `model` makes of `text`, in 32 hexadecimal digits.

        For methods that need training it depends on all trained weights; for others on the base and tokenizer only.
        """
        return self.addresses(model).of(text)

    def addresses(self, model: "Network") -> "Addresses":
        """The addresses of all memories that `model` makes in this way, for when the model is not at hand."""
        base = model.fingerprint
        # the memory depends on encoder and scorer too
        compressor = model.legacy_fingerprint.model if self.make().needs_training else ""
        return Addresses((base.model, base.tokenizer, compressor, self.model_dump_json()))

    @model_validator(mode="before")
    @classmethod
    def _from_version_1(cls, data: Any) -> Any:
        """Records of earlier stores: always nugget2d, with the former names of its options."""
        if not isinstance(data, dict) or "refine" not in data:
            return data
        old = dict(data)
        ratio = old.pop("ratio")
        return {"method": "nugget2d", "ratio": ratio, "config": {RENAMED.get(key, key): old[key] for key in old}}


@dataclass(frozen=True)
class Addresses:
    """Content addresses of what one model makes of texts in one way.

    Attributes:
        made: digests of the base, the tokenizer and the compressor, and the options as JSON.
    """

    made: tuple[str, ...]

    def of(self, text: str) -> str:
        """See `CompressOptions.address`."""
        return digest("text", *self.made, text)


def digest(kind: str, *parts: str) -> str:
    """32 hexadecimal digits of a list of texts."""
    made = blake2b(digest_size=16, person=kind.encode())
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)  # the length makes the encoding unambiguous
    return made.hexdigest()

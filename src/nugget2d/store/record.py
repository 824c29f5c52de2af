"""What a store knows of a memory without opening it, and the addresses that keep work from being done twice."""

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from hashlib import blake2b

from nugget2d.config import Frozen, SelectionName
from nugget2d.memory.memory import Fingerprint, Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.methods.nugget.compressing import DEFAULT_RATIO
from nugget2d.methods.nugget.encoding import native_dtype
from nugget2d.model import Nugget2D


class Settings(Frozen):
    """How a text was compressed: what `Nugget2D.compress` was asked, with its defaults filled in."""

    ratio: float | None
    quality: float | None
    refine: int
    exact: bool
    selection: str
    dtype: str

    @staticmethod
    def of(
        model: Nugget2D,
        *,
        ratio: float | None = None,
        quality: float | None = None,
        refine: int = 0,
        exact: bool = False,
        selection: SelectionName | None = None,
        dtype: StoreDtype | None = None,
    ) -> "Settings":
        """The arguments of `Nugget2D.compress`; what was left out becomes what the model would take."""
        if ratio is None and (quality is None or refine):
            ratio = DEFAULT_RATIO
        return Settings(
            ratio=ratio,
            quality=quality,
            refine=refine,
            exact=exact,
            selection=selection or model.config.selection,
            dtype=dtype or native_dtype(model),
        )

    def compress(self, model: Nugget2D, text: str, on_progress: Callable[[int, int], None] | None = None) -> Memory:
        """`text` compressed so; errors and warnings are those of `Nugget2D.compress`."""
        return model.compress(text, **self.model_dump(), on_progress=on_progress)

    def address(self, text: str, fingerprint: Fingerprint) -> str:
        """Content address of the memory that the model with `fingerprint` makes of `text`, in hexadecimal digits."""
        return _digest("text", fingerprint.model, fingerprint.tokenizer, self.model_dump_json(), text)


class Record(Frozen):
    """One memory in a store, as one owner sees it.

    Attributes:
        id: in hexadecimal digits, made of `key` and `owner`.
        key: content address of the memory: that of text, model and settings, or the memory's own checksum.
        name: what a person calls it, such as a file name.
        tags: any words, to filter by.
        owner: namespace; a record exists for its owner only.
        created: UTC, ISO 8601.
        num_tokens: tokens of the text (n).
        num_nuggets: tokens kept (k).
        num_chars: characters of the text.
        ratio: n / k.
        nbytes: bytes of keys, values and scales (`Memory.nbytes`).
        model: who can read it.
        settings: how it was made, if the store was told.
    """

    id: str
    key: str
    name: str
    tags: tuple[str, ...]
    owner: str
    created: str
    num_tokens: int
    num_nuggets: int
    num_chars: int
    ratio: float
    nbytes: int
    model: Fingerprint
    settings: Settings | None

    @staticmethod
    def of(
        memory: Memory, key: str, *, name: str, tags: Sequence[str], owner: str, settings: Settings | None
    ) -> "Record":
        """A record of `memory`, created now."""
        return Record(
            id=record_id(key, owner),
            key=key,
            name=name,
            tags=tuple(tags),
            owner=owner,
            created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            num_tokens=memory.num_tokens,
            num_nuggets=memory.num_nuggets,
            num_chars=memory.num_chars,
            ratio=memory.ratio,
            nbytes=memory.nbytes,
            model=memory.fingerprint,
            settings=settings,
        )


def record_id(key: str, owner: str) -> str:
    """The id under which `owner` has the memory at `key`; like it, 32 hexadecimal digits."""
    return _digest("record", key, owner)


def _digest(kind: str, *parts: str) -> str:
    digest = blake2b(digest_size=16, person=kind.encode())
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)  # the length: no two lists of parts are one stream
    return digest.hexdigest()

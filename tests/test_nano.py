"""The bundled model: what its card promises, measured on the bundled document."""

from importlib import resources
from pathlib import Path

import pytest
import torch

from nugget2d import Memory, Nugget2D
from nugget2d.evaluation.fidelity import bleu
from nugget2d.inference.token_decoding import decode_tokens
from nugget2d.store import MemoryStore
from nugget2d.training.recipe import load_recipe

pytestmark = pytest.mark.slow

FOLDER = Path(str(resources.files("nugget2d") / "models" / "nano"))
TEXT = (resources.files("nugget2d") / "cli" / "demo.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nano() -> Nugget2D:
    return Nugget2D.from_pretrained("nano")


def test_size() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000


def test_tokenizer_is_compact_on_english(nano: Nugget2D) -> None:
    assert len(TEXT) / len(nano.ids(TEXT)[0]) >= 3.9


@pytest.mark.parametrize(("ratio", "floor"), [(1, 99.0), (4, 99.5), (10, 99.0), (18, 97.0), (20, 90.0)])
def test_a_document_comes_back(nano: Nugget2D, ratio: float, floor: float) -> None:
    memory = nano.compress(TEXT, ratio=ratio)
    assert memory.ratio == pytest.approx(ratio, rel=0.02)
    assert memory.nbytes * ratio == pytest.approx(memory.full_nbytes, rel=0.03)
    assert bleu([nano.reconstruct(memory)], [TEXT]) >= floor


@pytest.mark.parametrize("text", [TEXT, "Ünïcode 😀 中文 \r\n\0 </s><|endoftext|> " * 8])
def test_exact_mode_needs_no_fallback(
    nano: Nugget2D, text: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    nano.compress(text, ratio=20, exact=True, dtype="int8").save(tmp_path / "a.nugget")
    assert nano.reconstruct(Memory.load(tmp_path / "a.nugget")) == text
    assert not recwarn.list


def test_going_on_from_a_memory_is_no_worse_than_from_nothing(nano: Nugget2D) -> None:
    cut = TEXT.index("\n", len(TEXT) // 2)
    before, after = TEXT[:cut], TEXT[cut : cut + 600]
    alone = nano.score(after)
    for ratio in (4, 10, 20):
        assert nano.score(after, memory=nano.compress(before, ratio=ratio)) < alone + 0.2


@pytest.mark.parametrize(("ratio", "floor"), [(4, 0.99), (20, 0.9)])
def test_its_nuggets_spell_the_text(nano: Nugget2D, ratio: float, floor: float) -> None:
    """What search knows of a memory: nearly all tokens of every segment, whichever were chosen."""
    memory = nano.compress(TEXT, ratio=ratio, dtype="int8")
    found, tokens = decode_tokens(nano, memory), nano.ids(TEXT)[0].split([one.num_tokens for one in memory.segments])
    common = 0
    for mine, theirs in zip(found, tokens, strict=True):
        assert len(mine) <= len(theirs)
        counts = [torch.bincount(ids, minlength=len(nano.tokenizer)) for ids in (mine, theirs)]
        common += int(torch.minimum(*counts).sum())
    assert common >= floor * memory.num_tokens


def test_search_knows_words_that_no_nugget_was_chosen_for(nano: Nugget2D, tmp_path: Path) -> None:
    parts = [part for part in TEXT.split("\n") if len(part) > 400][:6]
    with MemoryStore(tmp_path) as store:
        for number, part in enumerate(parts):
            store.add(nano, part, ratio=20, name=str(number))
        found = [store.search(part[150:300], top=1)[0].record.name for part in parts]
    assert found == [str(number) for number in range(len(parts))] and len(parts) > 3


def test_plain_language_modelling(nano: Nugget2D) -> None:
    assert nano.score(TEXT[:1500]) < 5.5  # a uniform guess costs 9.2 nats
    shuffled = " ".join(sorted(TEXT[:1500].split()))
    assert nano.score(TEXT[:1500]) < nano.score(shuffled)


def test_weights_are_those_of_the_recipe(nano: Nugget2D) -> None:
    shape = load_recipe(Path(__file__).parent.parent / "research" / "recipes" / "nano-cpu.yaml").model
    assert shape is not None
    assert nano.lm.config.hidden_size == shape.hidden_size
    assert nano.lm.config.num_hidden_layers == shape.num_layers + 1  # and the induction heads of `nano-lookup`
    assert (FOLDER / "README.md").is_file()

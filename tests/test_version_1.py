"""Files and stores of version 1, written by commit b2f7a23 with the bundled `nano`, are read as they were.

tests/data/v1: memories as float32, int8 and exact, a store with two of them, and what that commit read from them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import MismatchError
from nugget2d.store import MemoryStore

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data" / "v1"
EXPECTED = json.loads((DATA / "expected.json").read_text())
AFTER = " It is built on a rock."


@pytest.fixture(scope="module")
def nano() -> Nugget2D:
    return Nugget2D.from_pretrained("nano")


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(shutil.copytree(DATA / "store", tmp_path / "store"))


def test_a_memory_reads_as_it_did(nano: Nugget2D) -> None:
    memory = Memory.load(DATA / "float32.nugget")
    assert (memory.kind, memory.method.name, memory.num_tokens, memory.num_nuggets) == ("kv", "nugget2d", 102, 6)
    assert nano.reconstruct(memory) == EXPECTED["reconstructed"]
    assert nano.generate("It", memory=memory, max_new_tokens=8) == EXPECTED["generated"]
    assert nano.score(AFTER, memory=memory) == pytest.approx(EXPECTED["score"], abs=1e-4)


def test_segments_and_accuracies_survive(nano: Nugget2D) -> None:
    memory = Memory.map(DATA / "segments-int8.nugget")
    assert len(memory.segments) == 3
    assert memory.accuracy is None
    assert nano.reconstruct(memory) == EXPECTED["segments_reconstructed"]
    assert nano.score(AFTER, memory=memory) == pytest.approx(EXPECTED["segments_score"], abs=1e-4)


def test_an_exact_memory_is_exact(nano: Nugget2D) -> None:
    memory = Memory.load(DATA / "exact-int8.nugget")
    assert memory.accuracy is not None
    assert nano.reconstruct(memory) == EXPECTED["short"]


def test_the_same_checkpoint_still_makes_the_same_states(nano: Nugget2D) -> None:
    """Bit by bit where it was written; other processors round differently."""
    before, after = Memory.load(DATA / "float32.nugget"), nano.compress(EXPECTED["short"], ratio=20)
    assert after.positions == before.positions and after.spans == before.spans
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        torch.testing.assert_close(new.data, old.data, atol=1e-4, rtol=1e-4)


def test_a_memory_of_version_1_becomes_one_of_version_2(nano: Nugget2D, tmp_path: Path) -> None:
    old = Memory.load(DATA / "float32.nugget")
    old.save(tmp_path / "new.nugget")
    new = Memory.load(tmp_path / "new.nugget")
    assert nano.reconstruct(new) == EXPECTED["reconstructed"]
    assert new.full_nbytes == old.full_nbytes == 102 * nano.compress("a").token_nbytes


def test_another_model_is_still_refused() -> None:
    with pytest.raises(MismatchError, match="'nano'"):
        tiny.trained("llama", "copies").score("a", memory=Memory.load(DATA / "float32.nugget"))


def test_a_store_is_read_searched_and_goes_on(nano: Nugget2D, store: MemoryStore) -> None:
    records = {record.name: record for record in store.records()}
    assert {name: record.id for name, record in records.items()} == EXPECTED["ids"]
    assert records["lighthouse"].settings.method == "nugget2d"
    assert records["lighthouse"].settings.ratio == 20
    assert records["two"].settings.config["exact"] is True
    assert nano.reconstruct(store.get(records["two"].id)).startswith(EXPECTED["short"])
    assert [hit.record.name for hit in store.search("ships at night", model=nano)] == ["lighthouse", "two"]
    assert store.verify() == []
    store.add(nano, "Ships pass the lighthouse at night.", name="new")
    assert {hit.record.name for hit in store.search("ships at night", model=nano)} == {"lighthouse", "two", "new"}

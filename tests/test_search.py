"""Searching a store by words: what is found in any script, what is not, and what an index survives."""

import math
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, SearchWarning, StoreError
from nugget2d.methods.options import digest
from nugget2d.store import MemoryStore, fulltext
from nugget2d.store.backend import entry_digest
from nugget2d.store.folding import fold, phrases
from nugget2d.store.words import Words

TEXT = "The dog looked up as if it had counted too. In winter the road was closed for weeks."
NOTES = {
    "german": "Die Straße am Fluß war für Fußgänger über Nacht gesperrt.",
    "french": "L'été dernier, nous n'avons rien déjà vu au café.",
    "russian": "Смотритель маяка зажёг лампу в полночь.",
    "greek": "Ο φάρος άναψε στη θάλασσα.",
    "arabic": "أَضَاءَ الحَارِسُ المَنَارَةَ لَيْلًا",
    "korean": "등대지기는 한국어를 공부했다.",
    "chinese": "灯塔看守人在半夜点亮了灯。",
    "japanese": "灯台守は東京タワーの絵を描いた。",
    "thai": "ผู้ดูแลประภาคารจุดตะเกียงตอนเที่ยงคืน",
    "hindi": "प्रकाशस्तंभ का रखवाला हिन्दी में लिखता है।",
    "english": "The keeper of the lighthouse was running e.g. 3.14 miles, don't ask. NASA 🙂 C'est tout.",
}
INDEX = fulltext.FullText(None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="module")
def memory(llama: Nugget2D) -> Memory:
    return llama.compress("Notes.", ratio=2)


def put(store: MemoryStore, memory: Memory, name: str, text: str, **more: Any) -> str:
    """A record that is found by `text`; the states are always the same, and no model is needed."""
    segment = replace(memory.segments[0], end=len(text))
    told = replace(memory, segments=(segment,))
    return store.put(told, key=digest("test", name), name=name, text=text, **more).id


def names(store: MemoryStore, query: str) -> list[str]:
    return [hit.record.name for hit in store.search(query)]


# ---- what is found ----


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory, memory: Memory) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path_factory.mktemp("notes")) as store:
        for name, text in NOTES.items():
            put(store, memory, name, text)
        yield store


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("STRASSE", "german"),
        ("straße", "german"),
        ("fussganger", "german"),
        ("ÜBER", "german"),
        ("ete", "french"),
        ("DÉJÀ", "french"),
        ("Cafe\u0301", "french"),
        ("МАЯКА", "russian"),
        ("зажег", "russian"),
        ("ΦΑΡΟΣ", "greek"),
        ("θαλασσα", "greek"),
        ("الحارس", "arabic"),
        ("한국어", "korean"),
        ("등대지기", "korean"),
        ("灯塔", "chinese"),
        ("半夜", "chinese"),
        ("灯塔看守人在哪里", "chinese"),
        ("東京", "japanese"),
        ("タワー", "japanese"),
        ("ﾀﾜｰ", "japanese"),
        ("ประภาคาร", "thai"),
        ("ตะเกียง", "thai"),
        ("हिन्दी", "hindi"),
        ("Lighthouse", "english"),
        ("ＫＥＥＰＥＲ", "english"),
        ("nasa", "english"),
        ("runs", "english"),
        ("DON’T", "english"),
        ("3.14", "english"),
        ("🙂", "english"),
        ("zzz AND lighthouse", "english"),
        ('"lighthouse', "english"),
        ("lighthouse*", "english"),
        ("text:lighthouse", "english"),
        ("NEAR(lighthouse keeper, 2)", "english"),
        ("-lighthouse ^keeper", "english"),
    ],
)
def test_words_of_any_script_are_found(notes: MemoryStore, query: str, name: str) -> None:
    found = notes.search(query)
    assert found[0].record.name == name and all(found[0].score > other.score for other in found[1:])


NOWHERE = ["!?", "...", "'", "\"'*()", "+ - = $ €", "\u200b", "\x00", "\ud800", "a\x00b", "AND", "NOT", "NEAR(zzz)"]
NOWHERE += [
    "火車",
    "大阪城",
    "поезд",
    "전화기",
    "รถไฟฟ้า",
    "السفينة",
    "τρένο",
    "railway",
    "light",
    "house",
    "3.15 or 2.71",
    "🚂",
]


@pytest.mark.parametrize("query", NOWHERE)
def test_what_no_note_has_is_not_found(notes: MemoryStore, query: str) -> None:
    assert names(notes, query) == []


def test_an_empty_query_is_refused(notes: MemoryStore) -> None:
    for query in ("", " \n"):
        with pytest.raises(InputError, match="the query is empty"):
            notes.search(query)


@given(st.text(max_size=30))
def test_any_text_is_a_query_and_can_be_indexed(text: str) -> None:
    words = Words(texts=(text.encode("utf-8", "replace").decode(),), spans=((0, 9),))
    INDEX.add([fulltext.Indexed("a", "", None, words)])
    found = list(INDEX.search(text, fulltext.Scope()))
    INDEX.remove(["a"])
    assert len(found) == bool(list(phrases(text)))


@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12))
def test_case_and_form_make_no_difference(word: str) -> None:
    assert fold(word.casefold()).split() == fold(word).split()
    assert list(phrases(word)) and all(set(phrase.split()) <= set(fold(word).split()) for phrase in phrases(word))


# ---- ranking ----


def test_scores_are_bm25(store: MemoryStore, memory: Memory) -> None:
    """Rare words, repeated words and short texts count more; words that are asked twice count twice."""
    texts = {"a": "dog dog cat", "b": "dog bird bird bird", "c": "cat", "d": "fish fish"}
    for name, text in texts.items():
        put(store, memory, name, text)

    def score(word: str, name: str) -> float:
        split = {name: text.split() for name, text in texts.items()}
        having, often = sum(word in words for words in split.values()), split[name].count(word)
        mean = sum(map(len, split.values())) / len(split)
        rarity = math.log1p((len(split) - having + 0.5) / (having + 0.5))
        return rarity * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(split[name]) / mean))

    found = {hit.record.name: hit.score for hit in store.search("Dog? cat, dog!")}
    wanted = {name: 2 * score("dog", name) + score("cat", name) for name in "abc"}
    assert found == pytest.approx(wanted) and list(found) == sorted(wanted, key=lambda name: -wanted[name])


def test_a_word_of_every_note_still_counts(store: MemoryStore, memory: Memory) -> None:
    """In a store of two notes FTS5 alone would rank by the words that both have."""
    put(store, memory, "harbour", "the the the the harbour")
    put(store, memory, "lighthouse", "the lighthouse")
    assert names(store, "the lighthouse") == ["lighthouse", "harbour"]
    assert min(hit.score for hit in store.search("the")) > 0.05


def test_the_best_segment_is_shown(store: MemoryStore, llama: Nugget2D) -> None:
    parts = ["Beans grow behind the wall, peas before it. " * 2, "Ships! Sails! Seven of them, he said, seven. " * 2]
    texts = [parts[0] + parts[1], "Snow on the road, bread and salted fish in the larder, and oil. " * 3]
    records = [store.add(llama, text, ratio=4, name=str(number)) for number, text in enumerate(texts)]
    for record, text in zip(records, texts, strict=True):
        for segment in store.get(record.id).segments:
            best = store.search(text[segment.start : segment.end])[0]
            assert best.record == record
            assert fold(text[best.start : best.end]).split() == fold(text[segment.start : segment.end]).split()
    assert len(store.search("the wall", top=1)) == 1 and len({hit.record.id for hit in store.search("the")}) == 2


def test_a_search_keeps_to_owner_tag_and_reader(store: MemoryStore, memory: Memory, llama: Nugget2D) -> None:
    put(store, memory, "ann", "a dog", owner="ann", tags=["x", "y"])
    put(store, memory, "bob", "a dog and a cat", owner="bob", tags=["y"])
    before = store.search("dog", owner="ann")
    assert [hit.record.name for hit in before] == ["ann"]
    assert [hit.record.name for hit in store.search("dog", tag="y")] == ["ann", "bob"]
    assert store.search("dog", tag="z") == [] == store.search("dog", owner="ann", tag="z") == store.search("dog", top=0)
    assert len(store.search("dog", model=llama)) == 2
    assert store.search("dog", model=tiny.trained("llama", "copies", seed=9)) == []
    # how rare a word is for others does not show
    for number in range(5):
        put(store, memory, f"bob {number}", "a dog", owner="bob")
    after = store.search("dog", owner="ann")[0].score
    assert after == pytest.approx(before[0].score, rel=0.2)


# ---- words without a text ----


def test_states_tell_the_words_to_their_model(store: MemoryStore, llama: Nugget2D) -> None:
    """Put with its model a memory is found at once; without, by the first search with that model, then by all."""
    store.put(llama.compress("Snow lay on the road.", ratio=1), name="snow", model=llama)
    beans = store.put(llama.compress("Beans grow behind the wall.", ratio=1), name="beans")
    with pytest.warns(SearchWarning, match=rf"^not searched: {beans.id}: only their model .*--model"):
        assert store.search("beans") == [] != store.search("snow")
    assert [hit.record.name for hit in store.search("beans", model=llama)] == ["beans"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(store, "beans") == ["beans"]
        assert names(store, "snow") == ["snow"]


def test_token_ids_of_an_earlier_version_are_read_with_their_model(tmp_path: Path, llama: Nugget2D) -> None:
    """All of a text that a training-free memory was made of, though no states tell them."""
    memory = llama.compress(TEXT, method="knorm", ratio=20)
    with MemoryStore(tmp_path) as store:
        record = store.put(memory, text=TEXT)
    ids = llama.ids(TEXT)[0].numpy().astype("int32")
    arrays = {"tokens": ids, "counts": ids[:1] * 0 + len(ids), "spans": (ids[:2] * 0 + [0, len(TEXT)])[None]}
    set_words(
        tmp_path, record.id, safetensors.numpy.save({name: array.astype("int32") for name, array in arrays.items()})
    )
    with MemoryStore(tmp_path) as store:
        with pytest.warns(SearchWarning, match="give it once"):
            assert store.search("counted") == []
        assert all(store.search(word, model=llama)[0].end == len(TEXT) for word in TEXT.rstrip(".").split())
        assert len(store.search("counted")) == 1


def set_words(folder: Path, id: str, words: bytes) -> None:
    """With a checksum that fits, as a writer of that version would."""
    db = sqlite3.connect(folder / "index.db")
    (text,) = db.execute("SELECT record FROM records WHERE id = ?", (id,)).fetchone()
    with db:
        values = (words, entry_digest(text, words), id)
        db.execute("UPDATE records SET words = ?, digest = ? WHERE id = ?", values)
    db.close()


# ---- damage ----


@pytest.mark.parametrize(
    "words", [b"garbage", b"\xff" * 40, b"[]", b'{"texts":["a"],"spans":[]}', b"\x10\0\0\0\0\0\0\0{"]
)
def test_damaged_words_end_no_search(tmp_path: Path, memory: Memory, llama: Nugget2D, words: bytes) -> None:
    with MemoryStore(tmp_path) as store:
        ids = [put(store, memory, name, f"a {name}") for name in ("dog", "cat")]
    set_words(tmp_path, ids[0], words)
    with MemoryStore(tmp_path) as store:
        for _ in range(2):
            with pytest.warns(SearchWarning, match=rf"^not searched: {ids[0]}: .*; (add|give)"):
                assert names(store, "cat dog") == ["cat"]
        with warnings.catch_warnings(record=True):
            assert "cat" in {hit.record.name for hit in store.search("cat notes", model=llama)}


def test_a_record_that_does_not_fit_its_checksum_is_left_out(tmp_path: Path, memory: Memory) -> None:
    with MemoryStore(tmp_path) as store:
        ids = [put(store, memory, name, f"a {name}") for name in ("dog", "cat")]
    db = sqlite3.connect(tmp_path / "index.db")
    with db:
        db.execute("UPDATE records SET record = 'garbage' WHERE id = ?", ids[:1])
    db.close()
    with MemoryStore(tmp_path) as store, pytest.warns(SearchWarning, match=ids[0]):
        assert names(store, "cat dog") == ["cat"]


@pytest.mark.parametrize("content", [b"", b"plain text" * 999, b"SQLite format 3\0" + b"\xff" * 5000])
def test_an_index_that_is_none_is_made_again(tmp_path: Path, memory: Memory, content: bytes) -> None:
    with MemoryStore(tmp_path) as store:
        put(store, memory, "dog", "a dog")
        (tmp_path / "words.db").write_bytes(content)
        assert names(store, "dog") == ["dog"]
    assert (tmp_path / "words.db").read_bytes().startswith(b"SQLite format 3")


def test_an_index_of_another_program_or_damaged_within_is_made_again(tmp_path: Path, memory: Memory) -> None:
    db = sqlite3.connect(tmp_path / "words.db")
    db.execute("CREATE TABLE records (a)")
    db.close()
    with MemoryStore(tmp_path) as store:
        put(store, memory, "dog", "a dog")
        assert names(store, "dog") == ["dog"]
    data = bytearray((tmp_path / "words.db").read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    (tmp_path / "words.db").write_bytes(data)
    with MemoryStore(tmp_path) as store:
        assert names(store, "dog") == ["dog"]
    with MemoryStore(tmp_path) as store:
        assert names(store, "dog") == ["dog"]


def test_without_a_place_for_a_file_the_index_is_in_memory(tmp_path: Path, memory: Memory) -> None:
    (tmp_path / "words.db").mkdir()  # no user, root or not, can write a file there
    with MemoryStore(tmp_path) as store:
        put(store, memory, "dog", "a dog")
        assert names(store, "dog") == ["dog"]
        put(store, memory, "dogs", "two dogs")
        assert len(names(store, "dog")) == 2


def test_a_folder_of_any_bytes_is_searched(tmp_path: Path, memory: Memory) -> None:
    folder = tmp_path / "caf\udce9"
    with MemoryStore(folder) as store:
        put(store, memory, "a", "a dog")
        assert names(store, "dog") == ["a"] and (folder / "words.db").is_file()


def test_an_index_that_cannot_be_written_is_copied(tmp_path: Path, memory: Memory, monkeypatch) -> None:
    """Of a read-only folder only what is new is indexed anew, in memory."""
    with MemoryStore(tmp_path) as store:
        put(store, memory, "dog", "a dog")
        store.search("dog")
        put(store, memory, "cat", "a cat")
    before = (tmp_path / "words.db").read_bytes()
    connect, read = fulltext._connect, list[str]()
    monkeypatch.setattr(fulltext, "_connect", lambda uri: connect(uri.replace("mode=rwc", "mode=ro")))
    with MemoryStore(tmp_path) as store:
        entries = store._backend.entries
        monkeypatch.setattr(store._backend, "entries", lambda ids: read.extend(ids) or entries(ids))
        assert names(store, "a dog or a cat") == ["dog", "cat"] and names(store, "cat") == ["cat"]
        assert [store.record(id).name for id in set(read)] == ["cat"]
    assert (tmp_path / "words.db").read_bytes() == before


def test_sqlite_without_fts5_is_named(store: MemoryStore, monkeypatch) -> None:
    monkeypatch.setattr(fulltext, "_SCHEMA", "CREATE VIRTUAL TABLE words USING fts9 (text)")
    with pytest.raises(StoreError, match=r"search needs SQLite with FTS5: no such module: .*; use a Python"):
        store.search("dog")


# ---- keeping up ----


def test_what_is_removed_is_no_longer_found(tmp_path: Path, memory: Memory) -> None:
    with MemoryStore(tmp_path) as store, MemoryStore(tmp_path) as other:
        ids = [put(store, memory, name, "a dog") for name in "abc"]
        assert sorted(names(other, "dog")) == ["a", "b", "c"] == sorted(names(store, "dog"))
        store.remove(ids[1])
        assert sorted(names(other, "dog")) == ["a", "c"] == sorted(names(store, "dog"))
        put(other, memory, "b", "a cat")
        assert names(store, "cat") == ["b"]


def test_what_is_written_again_is_found_as_it_is_now(tmp_path: Path, memory: Memory) -> None:
    with MemoryStore(tmp_path) as store:
        for tag, text in (("old", "a dog"), ("new", "a cat")):
            record = store.put(memory, name=tag, tags=[tag], text=text)
            assert [hit.record.name for hit in store.search(text[2:], tag=tag)] == [tag]
            store.remove(record.id)
        store.put(memory, tags=["new"], text="a cat")
        assert store.search("cat", tag="old") == store.search("dog") == []


def test_searches_and_additions_at_once(tmp_path: Path, memory: Memory) -> None:
    """Several stores, as of several processes, and threads of each: every search finds what was there before it."""
    stores = [MemoryStore(tmp_path) for _ in range(3)]
    errors = list[BaseException]()

    def work(store: MemoryStore, number: int) -> None:
        try:
            for turn in range(8):
                name = f"{number}-{turn}"
                record = store.put(memory, key=f"{number:016x}{turn:016x}", name=name, text="Notes.")
                assert record.id in {hit.record.id for hit in store.search("notes", top=99)}
                if turn % 3 == 2:
                    store.remove(record.id)
                    assert record.id not in {hit.record.id for hit in store.search("notes", top=99)}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(stores[number % 3], number)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for store in stores:
        assert len(store.search("notes", top=99)) == 6 * 6
        store.close()
    with fulltext.closing(sqlite3.connect(tmp_path / "words.db")) as db:
        counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("records", "segments", "words")]
    assert counts == [(36,)] * 3

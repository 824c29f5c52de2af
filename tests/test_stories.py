"""The road of a llama2.c model (recipes/stories): converted exactly, tokenized exactly, read back without loss."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny
from nugget2d import Nugget2D
from nugget2d.checkpoints.base import load_base
from nugget2d.errors import ModelError
from nugget2d.text.detokenizer import detokenize_answer
from nugget2d.text.segmentation import detokenize, split, tokenize, tokenize_after

FOLDER = Path(__file__).parent.parent / "recipes" / "stories"
# in an order of merging in which greedy-by-score and left-to-right differ
PIECES = [" t", "he", " the", "er", "ther", "at", " cat", " c", "the", *" abcdehiklnorstuxy.,!é"]


def script(name: str) -> ModuleType:
    """A script of the folder, which its siblings import by name too."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


reference, convert = script("reference"), script("convert")


def write_tokens(path: Path) -> Path:
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    rows = [struct.pack("<fi", -float(i), len(p.encode())) + p.encode() for i, p in enumerate(pieces)]
    path.write_bytes(struct.pack("<i", 8) + b"".join(rows))
    return path


def write_checkpoint(path: Path, *, tied: bool = True, heads: int = 4, kv_heads: int = 2) -> Path:
    dim, hidden, layers, positions, vocabulary = 16, 20, 2, 128, 259 + len(PIECES)
    draw, kv = np.random.default_rng(0), dim // heads * kv_heads
    blocks = [dim * vocabulary, layers * dim, layers * dim * dim, layers * kv * dim, layers * kv * dim]
    blocks += [layers * dim * dim, layers * dim, *[layers * dim * hidden] * 3, dim, positions * dim // heads]
    blocks += [] if tied else [dim * vocabulary]
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocabulary if tied else -vocabulary, positions)
    weights = draw.normal(0, 0.3, sum(blocks)).astype("<f4")
    path.write_bytes(header + weights.tobytes())
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tok.bin")


@pytest.fixture(scope="module")
def tokenizer(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As users get it: saved beside a Llama's configuration and loaded as any base is."""
    folder = tmp_path_factory.mktemp("base")
    convert.read_checkpoint(write_checkpoint(folder / "model.bin")).save_pretrained(folder)
    convert.read_tokenizer(tokens).save_pretrained(folder)
    return load_base(folder).tokenizer


@pytest.mark.parametrize(("tied", "heads", "kv_heads"), [(True, 4, 2), (False, 4, 2), (True, 2, 2), (True, 4, 1)])
def test_a_converted_model_computes_what_llama2c_does(tmp_path: Path, tied: bool, heads: int, kv_heads: int) -> None:
    path = write_checkpoint(tmp_path / "model.bin", tied=tied, heads=heads, kv_heads=kv_heads)
    lm = convert.read_checkpoint(path)
    lm.save_pretrained(tmp_path / "base")
    convert.read_tokenizer(write_tokens(tmp_path / "tok.bin")).save_pretrained(tmp_path / "base")
    loaded = load_base(tmp_path / "base").lm
    ids = [1, 270, 5, 261, 261, 280, 1, 262, 33, 259]
    with torch.no_grad():
        mine = loaded(torch.tensor([ids])).logits[0].numpy()
    theirs = reference.Llama2c(path).logits(ids)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_a_wrong_conversion_is_noticed(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "model.bin")
    assert convert.compare(convert.read_checkpoint(path), convert.read_tokenizer(tokens), path, tokens) < 1e-4
    monkeypatch.setattr(convert, "halves", lambda weight, heads: weight)
    with pytest.raises(ModelError, match="logits of the converted model differ"):
        convert.compare(convert.read_checkpoint(path), convert.read_tokenizer(tokens), path, tokens)


def test_damaged_files_are_refused_by_name(tmp_path: Path, tokens: Path) -> None:
    path = write_checkpoint(tmp_path / "model.bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model\.bin has .* bytes, its header promises"):
        convert.read_checkpoint(path)
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match="no llama2"):
        convert.read_checkpoint(path)
    short = tmp_path / "tok.bin"
    short.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends inside a token"):
        convert.read_tokenizer(short)
    short.write_bytes(struct.pack("<ifi", 1, 0.0, 1) + b"a")
    with pytest.raises(ModelError, match="does not begin with"):
        convert.read_tokenizer(short)


TEXT = st.lists(
    st.one_of(
        st.sampled_from(PIECES),
        st.sampled_from([" ", "  ", "\n", "<s>", "<unk>", "</s>", "<0x41>"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
).map("".join)


@given(text=TEXT)
def test_encodings_are_those_of_llama2c(tokens: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    theirs = reference.Tokens(tokens).encode(text)
    assert tokenize(tokenizer, text)[0] == theirs
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == [1, *theirs]


@given(text=TEXT.filter(bool), window=st.integers(16, 40))
def test_a_tokenizer_that_puts_a_space_before_texts_loses_nothing(
    tokenizer: PreTrainedTokenizerFast, text: str, window: int
) -> None:
    segments = split(tokenizer, text, window)
    assert "".join(segment.text for segment in segments) == text
    for segment in segments:
        assert detokenize(tokenizer, segment.ids) == segment.text
        assert segment.offsets[-1][1] == segment.start + len(segment.text)


@given(before=TEXT, text=TEXT.filter(bool))
def test_what_goes_on_from_a_text_is_not_set_apart_from_it(
    tokenizer: PreTrainedTokenizerFast, before: str, text: str
) -> None:
    ids = tokenize_after(tokenizer, text)
    assert detokenize_answer(tokenizer, ids) == text
    # no longer so for the text on its own, which gets a space
    assert ids != tokenize(tokenizer, text)[0]
    whole = detokenize(tokenizer, [*tokenize(tokenizer, before)[0], *ids])
    assert whole == before + text if before else whole == text.removeprefix(" ")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_other_tokenizers_go_on_as_they_begin(text: str) -> None:
    assert tokenize_after(tiny.tokenizer(), text) == tokenize(tiny.tokenizer(), text)[0]
    assert detokenize_answer(tiny.tokenizer(), tokenize(tiny.tokenizer(), text)[0]) == text


def test_prompts_and_answers_join_the_words_of_a_memory(tmp_path: Path, tokens: Path) -> None:
    lm, tokenizer = convert.read_checkpoint(write_checkpoint(tmp_path / "model.bin")), convert.read_tokenizer(tokens)
    model = Nugget2D.from_base(lm, tokenizer, window=16, lora_rank=2, scorer_layer=1)
    text = "the other cat, the other cat. " * 3
    memory = model.compress(text, ratio=2, exact=True)
    assert model.reconstruct(memory) == text
    assert model.ids_after("he cat").tolist()[0] == tokenizer.convert_tokens_to_ids(["he", " cat"])
    answer = model.generate("he", memory=memory, max_new_tokens=12)
    assert "".join(model.generate("he", memory=memory, max_new_tokens=12, stream=True)) == answer
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in (" cat", "<0x0A>", " the")]
    assert detokenize_answer(tokenizer, ids) == " cat\n the"

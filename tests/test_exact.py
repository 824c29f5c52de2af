"""Exact mode: whatever the text and however bad the model, the very same string comes back, or the user is told."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import ExactFallbackWarning, InputError, MemoryFileError
from nugget2d.memory.exact import _pack, _unpack, find_patch

ODD_TEXTS = {
    "one character": "x",
    "space": " ",
    "newline": "\n",
    "nul": "a\x00b\x00",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n",
    "special tokens": "</s> <s> <|endoftext|> [INST] <unk> <pad> <|endoftext|>",
    "emoji": "👩‍👩‍👧‍👦 and 👍🏽 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️ 🫖",
    "arabic": "كان حارس المنارة يكتب في السجل كل مساء",
    "chinese": "灯塔看守人每天晚上都在日志上写字。他数着帆船。“七艘。”",
    "thai": "ผู้ดูแลประภาคารเขียนบันทึกทุกเย็น",
    "combining": "e\u0301 a\u0308 Z\u0351\u036b\u0343\u036a\u0302 \u0301",
    "no spaces": "".join(chr(97 + i * 7 % 26) for i in range(700)),
    "one long run": "a" * 500,
    "blank": "  \t  \n" * 30,
    "bom and controls": "\ufeff\x01\x02\x7f\x85\u2028\u2029\u00a0\u200b",
    "private and astral": "\ue000\U000f0000\U0010ffff\ufffd\uffff",
}


@pytest.fixture(autouse=True)
def _no_fallback():
    """Unless a test expects it, using the lossless copy is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExactFallbackWarning)
        yield


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_odd_texts_come_back(llama: Nugget2D, text: str) -> None:
    memory = llama.compress(text, ratio=20, exact=True)
    assert llama.reconstruct(memory) == text
    assert memory.exact.patch_nbytes > 0


@pytest.mark.slow
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=120),
    ratio=st.sampled_from([1, 3, 20, 50]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(llama: Nugget2D, text: str, ratio: float) -> None:
    memory = llama.compress(text, ratio=ratio, exact=True)
    assert llama.reconstruct(memory) == text
    assert memory.exact.text() == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_comes_back_from_a_file_in_every_dtype(model: Nugget2D, dtype: str, tmp_path) -> None:
    texts = [tiny.TEXT, *ODD_TEXTS.values()]
    memories = model.compress(texts, ratio=10, exact=True, dtype=dtype)
    for number, memory in enumerate(memories):
        memory.save(tmp_path / f"{number}.nugget")
    assert model.reconstruct([Memory.load(tmp_path / f"{n}.nugget") for n in range(len(texts))]) == texts


def test_comes_back_from_a_bfloat16_model() -> None:
    model = tiny.trained("llama", "copies").to(torch.bfloat16)
    memory = model.compress(tiny.TEXT, ratio=10, exact=True)
    assert memory.dtype == "bfloat16"
    assert model.reconstruct(memory) == tiny.TEXT
    for name in ("learned", "window", "even"):
        assert isinstance(model.reconstruct(model.compress("The dog.", ratio=2, selection=name)), str)


def test_joined_exact_memories_are_exact(llama: Nugget2D) -> None:
    texts = ["One\r\n", "👍🏽", tiny.TEXT[:200]]
    joined = Memory.join(llama.compress(texts, ratio=10, exact=True))
    assert llama.reconstruct(joined) == "".join(texts)
    assert joined.exact.text() == "".join(texts)
    with pytest.raises(InputError, match="exact and ordinary"):
        Memory.join([joined, llama.compress("plain", ratio=2)])


def test_an_exact_memory_keeps_its_dtype(llama: Nugget2D) -> None:
    memory = llama.compress("The dog.", ratio=2, exact=True)
    assert memory.to("float32") is memory
    with pytest.raises(InputError, match="compress again"):
        memory.to("int8")


def test_a_tampered_patch_falls_back_and_says_so(llama: Nugget2D) -> None:
    memory = llama.compress(tiny.TEXT, ratio=10, exact=True)
    patches = list(memory.exact.patches)
    index, token = next(iter(patches[2].items()))
    patches[2] = patches[2] | {index: token % 300 + 50}
    tampered = replace(memory, exact=replace(memory.exact, patches=tuple(patches)))
    with pytest.warns(ExactFallbackWarning, match=f"1 of {len(patches)} segments"):
        assert llama.reconstruct(tampered) == tiny.TEXT


def test_another_rounding_falls_back_and_says_so() -> None:
    model = tiny.trained("llama", "copies", seed=3)
    memory = model.compress(tiny.TEXT, ratio=2, exact=True)
    other = copy.deepcopy(model)
    assert other.fingerprint == model.fingerprint
    with torch.no_grad():  # after the fingerprint was taken: like a device that computes differently
        other.lm.get_output_embeddings().weight.add_(torch.randn_like(other.lm.get_output_embeddings().weight))
    with pytest.warns(ExactFallbackWarning):
        assert other.reconstruct(memory) == tiny.TEXT


def test_a_tampered_copy_is_never_returned(llama: Nugget2D) -> None:
    memory = llama.compress("The dog looked up.", ratio=10, exact=True)
    other = llama.compress("The cat looked up.", ratio=10, exact=True)
    record = replace(memory.exact, patches=({},), copy=other.exact.copy)
    with pytest.raises(MemoryFileError, match="digest"), pytest.warns(ExactFallbackWarning):
        llama.reconstruct(replace(memory, exact=record))


def test_a_tokenizer_that_normalises_falls_back_and_says_so() -> None:
    lossy = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tiny.tokenizer().backend_tokenizer), eos_token=tiny.END
    )
    lossy.backend_tokenizer.normalizer = normalizers.NFC()
    model = Nugget2D.from_base(tiny.lm(), lossy, adapters="copies", scorer_layer=1, window=32)
    text = "e\u0301 is not \u00e9"
    with pytest.warns(ExactFallbackWarning):
        assert model.reconstruct(model.compress(text, ratio=3, exact=True)) == text


def test_an_ordinary_memory_of_an_untrained_model_is_not_exact(llama: Nugget2D) -> None:
    assert llama.reconstruct(llama.compress(tiny.TEXT, ratio=10)) != tiny.TEXT


def test_lone_surrogates_are_refused(llama: Nugget2D) -> None:
    with pytest.raises(InputError, match="surrogate"):
        llama.compress("broken \udcff", exact=True)


def test_near_ties_are_patched_too() -> None:
    """Another device may round them the other way."""
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 4.999, 0.0], [5.0, 1.0, 0.0], [5.0, 4.9, 0.0]])
    ids = torch.tensor([0, 0, 2, 0])
    assert find_patch(logits, ids) == {1: 0, 2: 2}
    assert find_patch(logits.bfloat16(), ids) == {1: 0, 2: 2, 3: 0}


PATCH = st.dictionaries(st.integers(0, 5000), st.integers(0, 300_000), max_size=40)


@given(patches=st.lists(PATCH, max_size=8))
def test_patches_survive_packing(patches: list[dict[int, int]]) -> None:
    assert list(_unpack(_pack(patches), [5001] * len(patches))) == patches

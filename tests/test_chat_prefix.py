"""Contexts compressed behind the chat template's own tokens: what is read is what the template gives."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import chat_templates as templates
import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError
from nugget2d.inference.prompting import Message, split_around
from nugget2d.inference.scoring import score_ids
from nugget2d.modeling.losses import token_losses
from nugget2d.text.segmentation import tokenize_after

CONTEXT = tiny.TEXT[:200]
QUESTION, ANSWER = "\n\nHow many sails did he count?", "Seven."
CHAT = ["chatml", "llama3", "mistral-v2", "mistral-v3", "gemma", "qwen3", "smollm3"]
TOKENIZERS = {"bytes": templates.byte_level, "words": templates.sentencepiece}


def plain(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Nugget2D:
    tiny.lm(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Nugget2D.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("context", [CONTEXT, " led by spaces", "ends with a line\n", "</s><|im_end|>"], ids=repr)
def test_prefix_context_and_question_are_what_the_template_gives(
    make: str, name: str, context: str, tmp_path: Path
) -> None:
    model = plain(tmp_path, TOKENIZERS[make](templates.TEMPLATES[name]))
    tokenizer, asked = model.tokenizer, [Message("user", context + QUESTION)]
    if context.strip() != context and name in ("llama3", "gemma") and context[0] == " ":  # which trim
        with pytest.raises(InputError, match="cannot be split around"):
            model.compress(context, method="knorm", chat=True)
        return
    after = torch.tensor([split_around(tokenizer, asked, 0, (0, len(context))).after])
    answer = torch.tensor([tokenize_after(tokenizer, ANSWER)])
    memory = model.compress(context, method="knorm", ratio=1, chat=True)
    read = [*memory.kv.prefix_ids, *tokenize_after(tokenizer, context), *after[0].tolist()]
    if "</s>" not in context:
        turns = [{"role": "user", "content": context + QUESTION}]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        if make == "words" and name.startswith("mistral"):  # a space there is part of the first word, or put before it
            assert tokenizer.decode(read).replace(" ", "") == tokenizer.decode(whole).replace(" ", "")
        else:
            assert read == whole
    else:
        assert len(read) > len(memory.kv.prefix_ids) + len(after[0]) + 2  # what looks special is text
    ids = torch.cat([torch.tensor([read]), answer], dim=1)
    with torch.no_grad():
        expected = token_losses(model.lm(input_ids=ids).logits[:, :-1], ids[:, 1:])[0, -answer.shape[1] :]
    torch.testing.assert_close(score_ids(model, memory, after, answer).losses, expected, atol=2e-4, rtol=1e-4)
    kept = [context[start:end] for start, end in memory.spans]
    assert "".join(kept) == context or (make == "words" and "".join(kept).strip() == context.strip())


def test_the_prefix_is_kept_whole_at_any_ratio(tmp_path: Path) -> None:
    model = plain(tmp_path, templates.byte_level(templates.CHATML))
    for method in ("knorm", "truncation"):
        memory = model.compress(CONTEXT, method=method, nuggets=1, chat=True)
        prefix = len(memory.kv.prefix_ids)
        assert prefix > 20 and {count for layer in memory.kv.head_counts for count in layer} == {prefix + 1}
        assert memory.method.config["chat"] is True
        # it is of the budget in bytes
        with pytest.raises(InputError, match="bytes cannot hold a memory"):
            model.compress(CONTEXT, method=method, nbytes=memory.nbytes - 1, chat=True)
        assert model.compress(CONTEXT, method=method, nbytes=memory.nbytes, chat=True).nbytes == memory.nbytes


def test_memories_of_a_chat_join_with_their_kind_alone(tmp_path: Path) -> None:
    model = plain(tmp_path, templates.byte_level(templates.CHATML))
    chat, text = (model.compress(CONTEXT, chat=chat) for chat in (True, False))
    joined = type(chat).join([chat, chat])
    assert joined.kv.prefix_ids == chat.kv.prefix_ids
    assert joined.num_nuggets == 2 * chat.num_nuggets
    with pytest.raises(InputError, match="different prefixes"):
        type(chat).join([chat, text])


def test_without_a_template_it_is_refused() -> None:
    model = tiny.make()
    with pytest.raises(InputError, match="'LlamaForCausalLM' has no chat template; leave out the option chat"):
        model.compress(CONTEXT, method="knorm", chat=True)


@pytest.mark.parametrize("name", ["twice", "looks"])
def test_a_template_that_cannot_be_split_is_refused(name: str, tmp_path: Path) -> None:
    template = {"twice": templates.TWICE, "looks": "{{ raise_exception('no users here') }}"}[name]
    model = plain(tmp_path, templates.byte_level(template))
    with pytest.raises(InputError, match=r"shows it 2 times|no users here"):
        model.compress(CONTEXT, method="knorm", chat=True)

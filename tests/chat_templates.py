"""Chat templates as real models have them, and some that do what templates can do to a message."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}\
{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

# the system message stands in the last user message; roles must alternate
_MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}\
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
  {%- endif %}
  {%- if message['role'] == 'user' %}
    {%- if loop.last and system_message is defined %}
      {{- '[INST]SPACE' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- else %}
      {{- '[INST]SPACE' + message['content'] + '[/INST]' }}
    {%- endif %}
  {%- else %}
    {{- 'SPACE' + message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}"""
MISTRAL_V2, MISTRAL_V3 = _MISTRAL.replace("SPACE", ""), _MISTRAL.replace("SPACE", " ")

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

QWEN3 = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SMOLLM3 = """\
{%- set reasoning = '/think' %}
{%- if messages[0].role == 'system' %}
    {%- if '/no_think' in messages[0].content %}{%- set reasoning = '/no_think' %}{%- endif %}
    {%- set instructions = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\nReasoning Mode: ' + reasoning + '\\n\\n' }}
{%- if instructions %}{{- instructions + '\\n\\n' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if reasoning == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}"""

TWICE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{{ m.content }}</s>{% endfor %}<s>assistant:"
DROPS_SYSTEM = """\
{% for m in messages if m.role != 'system' %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant:"""
REORDERS = "{% for m in messages | reverse %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant:"
# refuses, or answers otherwise, when it sees a special token
LOOKS_AT_SPECIAL = """\
{% for m in messages %}{% if '</s>' in m.content %}ALARM{% endif %}<s>{{ m.content }}</s>{% endfor %}"""

# what else templates can do to a message, or make depend on one
ODD = {
    name: "{% for m in messages %}<s>" + shown + "</s>{% endfor %}<s>assistant:"
    for name, shown in {
        "upper": "{{ m.content | upper }}",
        "json": "{{ m | tojson }}",
        "html": "{{ m.content | escape }}",
        "truncates": "{{ m.content[:5] }}",
        "counts": "({{ m.content | length }}) {{ m.content }}",
        "counts words": "({{ m.content.split() | length }}) {{ m.content }}",
        "replaces": "{{ m.content | replace('a', 'b') }}",
        "reverses": "{{ m.content | reverse }}",
        "strips": "{{ m.content.strip('</s> ') }}",
        "wraps": "{{ m.content | wordwrap(10) }}",
        "lists": "{{ [m.content] }}",
        "looks at the first": "{% if m.content.startswith('<') %}!{% endif %}{{ m.content }}",
        "looks at the length": "{% if m.content | length > 6 %}long {% endif %}{{ m.content }}",
        "looks later": "{{ m.content }}{% if loop.index == 3 %}{{ messages[0].content | length }}{% endif %}",
        "leaves out doubles": "{% if loop.first or m.content != messages[0].content %}{{ m.content }}{% endif %}",
        "raises": "{% if 'x' in m.content %}{{ raise_exception('no x') }}{% endif %}{{ m.content }}",
        "private use": "\ue000{{ m.content }}\ue001",
        "splits": "{% for line in m.content.split('\n') %}{{ line }}</s><s>{% endfor %}",
        "title": "{% if loop.first %}{{ m.content[:10] }}: {% endif %}{{ m.content }}",
        "date": "{{ strftime_now('%Y') }}: {{ m.content }}",
    }.items()
}

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral-v2": MISTRAL_V2,
    "mistral-v3": MISTRAL_V3,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "twice": TWICE,
    "drops-system": DROPS_SYSTEM,
    "reorders": REORDERS,
}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
]


@cache
def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as those of Llama 3, Qwen and SmolLM are."""
    return _tokenizer(Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str()), template)


@cache
def sentencepiece(template: str | None = None) -> PreTrainedTokenizerFast:
    """One as Llama 2, Mistral and Gemma have: words begin with U+2581, unknown characters are bytes.

    Every stretch between special tokens gets such a beginning, and the first space of what is decoded is dropped.
    """
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(tiny.TEXT.splitlines(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = trained.get_vocab(with_added_tokens=False)
    vocabulary |= {piece: 257 + place for place, piece in enumerate(sorted(state, key=state.__getitem__))}
    merges = [pair for pair in _merges(trained) if all(part in vocabulary for part in pair)]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _tokenizer(bpe, template)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _tokenizer(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = template
    return made

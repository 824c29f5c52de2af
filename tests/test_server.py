"""The HTTP interface, as the official client and others see it."""

import copy
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import chat_templates as templates
import tiny
from nugget2d import Nugget2D
from nugget2d.inference.prompting import Message, render
from nugget2d.server import batch
from nugget2d.server.fitting import fit_conversation, fit_text
from nugget2d.server.settings import Keys
from serving import Running, serving, soon

pytestmark = pytest.mark.e2e

PROMPT = "The keeper"
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0}


@pytest.fixture(scope="module")
def server(llama: Nugget2D, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(llama, tmp_path_factory.mktemp("store")) as running:
        yield running


def memory_of(server: Running, text: str, **fields: Any) -> str:
    """The id of a new memory."""
    response = server.http().post("/v1/memories", json={"text": text, **fields})
    assert response.status_code == 201, response.text
    return response.json()["id"]


def idle(server: Running) -> bool:
    """Whether every sequence slot becomes free soon."""
    return soon(lambda: server.service.engine.num_running == 0)


# ---- what is written ----


def test_a_completion_is_what_generate_gives(server: Running, llama: Nugget2D) -> None:
    answer = server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == llama.generate(PROMPT, max_new_tokens=12)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    tokens = llama.ids(PROMPT).shape[1] + 1  # the start token
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens + answer.usage.completion_tokens)


def test_a_memory_is_read_before_the_prompt(server: Running, llama: Nugget2D) -> None:
    first = memory_of(server, tiny.TEXT[:300], ratio=5)
    second = memory_of(server, tiny.TEXT[300:400], dtype="float32")

    def ask(*ids: str) -> Any:
        return server.client().completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"memory_ids": ids}
        )

    memory = llama.compress(tiny.TEXT[:300], ratio=5, dtype="int8")
    answer = ask(first)
    assert answer.choices[0].text == llama.generate(PROMPT, memory=memory, max_new_tokens=12)
    whole = llama.ids_after(PROMPT).shape[1]
    assert answer.usage.prompt_tokens == memory.num_tokens + whole
    assert answer.usage.compressed_prompt_tokens == memory.num_nuggets + whole
    details = answer.usage.prompt_tokens_details
    assert (details.cached_tokens, details.nuggets) == (memory.num_tokens, memory.num_nuggets)
    assert (details.whole_tokens, details.unread_tokens) == (whole, 0)
    both = ask(first, second)
    assert both.usage.prompt_tokens > answer.usage.prompt_tokens
    assert ask(second, first).usage.prompt_tokens == both.usage.prompt_tokens
    assert len({text.choices[0].text for text in (answer, both, ask(second, first))}) == 3


def test_a_stream_is_the_same_text_in_pieces(server: Running) -> None:
    client = server.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 1, "seed": 5}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in client.completions.create(**options, stream=True))


def test_stop_strings_and_their_reason(server: Running, llama: Nugget2D) -> None:
    text = llama.generate(PROMPT, max_new_tokens=12)
    answer = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stop=[text[4:7]]
    )
    assert answer.choices[0].text == text[: text.index(text[4:7])]
    assert answer.choices[0].finish_reason == "stop"


def test_a_chat_without_template_is_lines_of_roles(server: Running, llama: Nugget2D) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": " bends?"}]},
    ]
    client = server.client()
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    wanted = llama.generate("system: Be brief.\nuser: Who bends?\nassistant:", max_new_tokens=12)
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == wanted
    assert render(llama.tokenizer, [Message("user", "Hi")]).stop == ("\nuser:",)


@pytest.fixture(scope="module")
def chatting() -> Nugget2D:
    """A model whose tokenizer has a chat template."""
    tokenizer = templates.byte_level(templates.CHATML)
    return Nugget2D.from_base(tiny.lm("llama", vocab_size=len(tokenizer)), tokenizer, lora_rank=4, window=tiny.WINDOW)


def test_a_chat_is_read_as_its_template_has_it(chatting: Nugget2D, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Beans</s> <|im_end|>?"},
        {"role": "assistant", "content": " Both "},
    ]
    ids = render(chatting.tokenizer, [Message(turn["role"], turn["content"]) for turn in messages]).ids
    with serving(chatting, tmp_path) as server:
        read: list[list[int]] = []
        embed = server.service._model.embed
        server.service._model.embed = lambda given: (read.append(given.flatten().tolist()), embed(given))[1]
        answer = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)
    assert [token for given in read for token in given][: len(ids)] == ids
    assert answer.usage.prompt_tokens == answer.usage.prompt_tokens_details.whole_tokens == len(ids)


def test_a_chat_goes_around_a_memory_that_was_made_for_it(chatting: Nugget2D, tmp_path: Path) -> None:
    """At ratio 1 the answer is that of the whole conversation, read without a memory."""
    context, question = tiny.TEXT[:150], [{"role": "user", "content": "Who wrote?"}]
    whole = [{"role": "user", "content": f"{context}\n\nWho wrote?"}]
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    with serving(chatting, tmp_path) as server:
        memory = memory_of(server, context, method="knorm", ratio=1, dtype="float32", options={"chat": True})
        chat = server.client().chat.completions
        answer = chat.create(messages=question, extra_body={"memory_ids": [memory]}, **ask)
        assert answer.choices[0].message.content == chat.create(messages=whole, **ask).choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="begins otherwise"):
            messages = [{"role": "system", "content": "Be brief."}, *question]
            chat.create(messages=messages, extra_body={"memory_ids": [memory]}, **ask)


def test_a_form_takes_what_json_takes_and_refuses_what_it_does_not_know(chatting: Nugget2D, tmp_path: Path) -> None:
    file = {"file": ("a.txt", tiny.TEXT[:150].encode())}
    with serving(chatting, tmp_path) as server:
        asked = {"method": "knorm", "nuggets": 9}
        made = memory_of(server, tiny.TEXT[:150], **asked, options={"chat": True})
        post = server.http().post
        same = post("/v1/memories/file", files=file, data=asked | {"options": '{"chat": true}'})
        assert (same.status_code, same.json()["id"]) == (201, made)
        for wrong in ({"foo": "bar"}, {"options": "garbage"}, {"options": "[1]"}):
            refused = post("/v1/memories/file", files=file, data=wrong)
            assert refused.status_code == 422 and next(iter(wrong)) in refused.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore::nugget2d.errors.AccuracyWarning")
def test_the_ratio_of_the_server_is_for_those_who_give_no_budget(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, ratio=3) as server:

        def kept(**fields: Any) -> int:
            body = {"text": tiny.TEXT[:150], **fields}
            return int(server.http().post("/v1/memories", json=body).json()["num_nuggets"])

        assert kept() == kept(ratio=3) == kept(method="knorm")
        chosen = llama.compress(tiny.TEXT[:150], target_accuracy=0.5, dtype="int8")
        assert kept(options={"target_accuracy": 0.5}) == chosen.num_nuggets
        assert kept(nuggets=10**400) == kept(nbytes=10**400) == kept(ratio=1)


def test_messages_that_a_template_refuses_are_a_bad_request(chatting: Nugget2D, tmp_path: Path) -> None:
    model = copy.copy(chatting)
    model.tokenizer = templates.byte_level(templates.MISTRAL_V3)
    with serving(model, tmp_path) as server, pytest.raises(openai.BadRequestError, match="roles must alternate"):
        messages = [{"role": "user", "content": "Hi"}] * 2
        server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=6)


def test_a_long_chat_keeps_its_template_uncompressed(chatting: Nugget2D, tmp_path: Path) -> None:
    """What is compressed is text of messages and nothing else: no special token becomes letters."""
    texts = [tiny.TEXT[:300], "I see </s>.", tiny.TEXT[300:420] + "\n", "Yes.", tiny.TEXT[420:900] + " Why?"]
    messages = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    tokenizer = chatting.tokenizer
    conversation = render(tokenizer, messages)
    prompt = fit_conversation(tokenizer, messages, 360, tiny.WINDOW)
    prefix = prompt.prefix
    assert 180 - tiny.WINDOW < len(prompt.ids) < 180 + 10 < 360 < len(conversation.ids)
    assert prefix.startswith(f"{texts[0]}\nI see </s>.\n{texts[2].strip()}\nYes.\n") and "im_start" not in prefix
    specials = [token for token in conversation.ids if token in tokenizer.all_special_ids]
    assert [token for token in prompt.ids if token in tokenizer.all_special_ids] == specials
    kept = tokenizer.decode(prompt.ids)
    assert kept.endswith(" Why?<|im_end|>\n<|im_start|>assistant\n")
    rest = texts[4].removeprefix(prefix.rpartition("Yes.\n")[2])
    assert len(rest) < len(texts[4]) and kept.endswith(f"<|im_start|>user\n{rest}<|im_end|>\n<|im_start|>assistant\n")
    least = tokenizer.decode(fit_conversation(tokenizer, messages, 180, tiny.WINDOW).ids)
    assert len(least) < len(kept) and " Why?<|im_end|>" in least  # the end of the question, whatever the template takes
    with serving(chatting, tmp_path, max_context=360) as server:
        asked = [{"role": message.role, "content": message.text} for message in messages]
        usage = server.client().chat.completions.create(model="tiny", messages=asked, max_tokens=6).usage
    details = usage.prompt_tokens_details
    assert details.whole_tokens == len(prompt.ids) and details.nuggets > 0


def test_a_long_chat_that_cannot_be_split_is_refused(chatting: Nugget2D, tmp_path: Path) -> None:
    model = copy.copy(chatting)
    model.tokenizer = templates.byte_level(templates.TWICE)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": tiny.TEXT[:300]}], "max_tokens": 4}
    with serving(model, tmp_path, max_context=64) as server:
        with pytest.raises(openai.BadRequestError, match="too long for max_context"):
            server.client().chat.completions.create(**ask)
        ask["messages"][0]["content"] = "Hi"
        assert server.client().chat.completions.create(**ask).usage.prompt_tokens < 64


def test_what_is_too_long_is_compressed_but_for_its_end(llama: Nugget2D, tmp_path: Path) -> None:
    text = tiny.TEXT[:900]
    with serving(llama, tmp_path, max_context=64) as server:
        answer = server.client().completions.create(model="tiny", prompt=text, max_tokens=8, temperature=0)
    whole = answer.usage.prompt_tokens_details.whole_tokens
    assert 0 < whole <= 32
    prompt = fit_text(llama.tokenizer, text, 64, llama.config.window, after=False)
    prefix, tail = prompt.prefix, llama.text(prompt.ids)
    assert prefix + tail == text and len(prompt.ids) == whole
    memory = llama.compress(prefix, ratio=4)
    assert answer.choices[0].text == llama.generate(tail, memory=memory, max_new_tokens=8)
    assert answer.usage.prompt_tokens_details.nuggets == memory.num_nuggets
    assert answer.usage.prompt_tokens == memory.num_tokens + whole


def test_what_is_beyond_reach_is_said(llama: Nugget2D, tmp_path: Path) -> None:
    model = tiny.trained("gpt2", "lora", window=32, context=64, name="/secret/folder")
    with serving(model, tmp_path) as server:
        short = memory_of(server, tiny.TEXT[:60])
        ask = server.client().completions.create
        assert ask(model="tiny", prompt="a", max_tokens=4, extra_body={"memory_ids": [short]}).choices[0].text
        with pytest.raises(openai.BadRequestError, match="max_tokens leaves no room"):
            ask(model="tiny", prompt="a", max_tokens=1024)
        with pytest.raises(openai.BadRequestError, match="'tiny' has 1024"):
            ask(model="tiny", prompt=tiny.TEXT[:90], max_tokens=980, extra_body={"memory_ids": [short]})
    with serving(tiny.trained("llama", "copies", context=100), tmp_path / "other") as server:
        memory = memory_of(server, tiny.TEXT)
        usage = (
            server.client()
            .completions.create(model="tiny", prompt="a", max_tokens=4, extra_body={"memory_ids": [memory]})
            .usage
        )
    details = usage.prompt_tokens_details
    assert details.unread_tokens > details.cached_tokens - 100 > 0


# ---- memories ----


def test_memories_are_kept_listed_and_forgotten(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path) as server, server.http() as http:
        fields = {"text": tiny.TEXT, "name": "log 😀", "tags": ["sea", "1"], "ratio": 6}
        made = http.post("/v1/memories", json=fields)
        memory = llama.compress(tiny.TEXT, ratio=6)
        shown = made.json()
        assert made.status_code == 201 and shown["object"] == "memory"
        assert (shown["name"], shown["tags"], shown["num_chars"]) == ("log 😀", ["sea", "1"], len(tiny.TEXT))
        assert (shown["num_tokens"], shown["num_nuggets"]) == (memory.num_tokens, memory.num_nuggets)
        assert abs(shown["created_at"] - time.time()) < 60
        assert http.post("/v1/memories", json=fields).json() == shown
        files = {"file": ("page.txt", "Café 😀".encode())}
        other = http.post("/v1/memories/file", files=files, data={"tags": ["x", "y"], "ratio": "2"}).json()
        assert (other["name"], other["tags"], other["num_chars"]) == ("page.txt", ["x", "y"], 6)
        ends = {"first_id": shown["id"], "last_id": other["id"], "has_more": False}
        assert http.get("/v1/memories").json() == {"object": "list", "data": [shown, other], **ends}
        assert http.get("/v1/memories", params={"tag": "sea"}).json()["data"] == [shown]
        assert http.get(f"/v1/memories/{other['id']}").json() == other
        gone = {"id": other["id"], "object": "memory", "deleted": True}
        assert http.delete(f"/v1/memories/{other['id']}").json() == gone
        assert http.get(f"/v1/memories/{other['id']}").status_code == 404
        assert http.get("/v1/memories").json()["data"] == [shown]


def test_a_key_sees_its_own_memories_only(llama: Nugget2D, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys = ("first-secret", "second-secret")
    with serving(llama, tmp_path, keys) as server:
        mine = server.http("first-secret").post("/v1/memories", json={"text": "Beans and peas."}).json()["id"]
        other = server.http("second-secret")
        assert other.get("/v1/memories").json()["data"] == []
        body = {"model": "tiny", "prompt": "a", "memory_ids": [mine], "max_tokens": 4}
        for response in (
            other.get(f"/v1/memories/{mine}"),
            other.delete(f"/v1/memories/{mine}"),
            other.post("/v1/completions", json=body),
        ):
            assert response.status_code == 404 and response.json()["error"]["code"] == "memory_not_found"
        theirs = other.post("/v1/memories", json={"text": "Beans and peas."}).json()["id"]
        assert theirs != mine
        assert server.http("first-secret").post("/v1/completions", json=body).status_code == 200
        for header in ("none", "Bearer none", "Bearer first-secre", "Bearer first-secret2", "Basic first-secret"):
            response = httpx.get(f"{server.url}/v1/memories", headers={"Authorization": header})
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            server.client("third").models.list()
        assert httpx.get(f"{server.url}/health").status_code == 200
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()).decode("latin-1")
    assert "secret" not in kept + capfd.readouterr().err


def test_owners_are_told_apart_by_the_whole_key() -> None:
    keys = Keys(["one", "two"])
    owners = [keys.owner(f"Bearer {key}") for key in ("one", "two", "on", "one ", "ONE", "")]
    assert owners[0] and owners[1] and owners[0] != owners[1]
    assert owners[3] == owners[0] and not any((owners[2], owners[4], owners[5]))
    assert keys.owner("one") is None and keys.owner("Basic one") is None and keys.owner("bearer one") == owners[0]
    assert "one" not in owners[0]
    assert Keys([]).owner("") == ""


# ---- errors ----


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "saying"),
    [
        ("GET", "/v1/nothing", None, 404, "/v1/nothing"),
        ("DELETE", "/v1/completions", None, 405, "DELETE"),
        ("POST", "/v1/completions", {"prompt": "a"}, 422, "model: Field required"),
        ("POST", "/v1/completions", {"model": "gpt", "prompt": "a"}, 404, "no model 'gpt' here, only 'tiny'"),
        ("POST", "/v1/completions", {"model": "tiny"}, 400, "nothing to continue"),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "wrong": 1}, 422, "wrong"),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "n": 2}, 422, "n: "),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 9999}, 400, "allows 1024"),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "memory_ids": ["x"]}, 404, "no memory 'x'"),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "\ud800"}, 422, "no JSON in UTF-8"),
        ("POST", "/v1/completions", {"model": "tiny", "\ud800": 1}, 422, "no JSON in UTF-8"),
        ("POST", "/v1/completions", "not an object", 422, "valid dictionary"),
        ("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}, 422, "at least 1"),
        ("POST", "/v1/memories", {"text": ""}, 422, "text"),
        ("POST", "/v1/memories", {"text": "a", "ratio": 0.5}, 422, "ratio"),
        ("GET", "/v1/memories/%00", None, 404, "no memory"),
        ("GET", "/v1/models/other", None, 404, "no model"),
    ],
)
def test_errors_say_what_was_wrong(
    server: Running, method: str, path: str, body: object, status: int, saying: str
) -> None:
    content = None if body is None else json.dumps(body)
    response = server.http().request(method, path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status
    assert saying in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert len(response.headers["x-request-id"]) == 32


def test_bodies_that_are_no_json_or_no_text(server: Running) -> None:
    http, form = server.http(), {"Content-Type": "application/json"}
    for body in (b"{", b"\xff", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b"[" * 30_000, b"9" * 5000):
        response = http.post("/v1/completions", content=body, headers=form)
        assert response.status_code in (400, 422) and response.json()["error"]["message"]
    response = http.post("/v1/memories/file", files={"file": ("a", b"\xff")})
    assert response.status_code == 400 and "not UTF-8 (byte 0)" in response.json()["error"]["message"]


def test_requests_of_any_size_and_pace_are_bounded(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, max_bytes=2000, seconds=1) as server:
        http = server.http()
        assert http.post("/v1/memories", json={"text": "a" * 3000}).status_code == 413
        chunks = (b"a" * 500 for _ in range(10))  # nobody has said how many
        form = {"Content-Type": "application/json"}
        assert http.post("/v1/memories", content=chunks, headers=form).status_code == 413
        address = (httpx.URL(server.url).host, httpx.URL(server.url).port)
        with socket.create_connection(address) as slow:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(head + b"Content-Length: 10\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        response = http.post("/v1/completions", json=LONG | {"max_tokens": 1024, "prompt": "a" * 1900})
        assert response.status_code in (200, 504)


def test_a_failure_of_the_server_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("/secret/path is broken")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "read", fail)
        response = server.http().post("/v1/completions", json=LONG)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        with pytest.raises(openai.APIError, match="the server failed") as streamed:
            list(server.client().completions.create(**LONG, stream=True))
    assert "secret" not in response.text + str(streamed.value) and "Traceback" not in response.text
    assert "/secret/path" in capfd.readouterr().err  # the log has it
    assert server.http().post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200


# ---- many clients ----


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take so long that no answer ends by itself while a test looks."""
    read = batch.read

    def late(*arguments: Any) -> Any:
        time.sleep(0.2)
        return read(*arguments)

    monkeypatch.setattr(batch, "read", late)


@pytest.mark.usefixtures("slowly")
def test_a_full_queue_answers_429(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, max_num_seqs=1, queue=0) as server:
        with server.client().completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            response = server.http().post("/v1/completions", json=LONG)
            assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "queue_full"
        assert idle(server)  # the stream was closed in the middle
        assert server.http().post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200


@pytest.mark.usefixtures("slowly")
def test_a_client_who_leaves_frees_its_sequence_slot(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, max_num_seqs=1) as server:
        with server.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            next(response.iter_raw())
        assert idle(server)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
        assert idle(server)


def test_a_client_who_does_not_read_blocks_nobody(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path, max_num_seqs=2, max_tokens=4000) as server:
        body = json.dumps(LONG | {"max_tokens": 4000, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s"
        address = (httpx.URL(server.url).host, httpx.URL(server.url).port)
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            lazy.connect(address)
            lazy.sendall(head % f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = server.client().completions.create(**LONG | {"max_tokens": 12})
            assert answer.usage.completion_tokens <= 12
            assert lazy.recv(10) == b"HTTP/1.1 2"


def test_answers_to_many_at_once(server: Running, llama: Nugget2D) -> None:
    memory = memory_of(server, tiny.TEXT[:200])
    prompts = [f"{word} " for word in tiny.TEXT.split()[:12]]
    answers: dict[str, str] = {}

    def ask(prompt: str) -> None:
        body = {"memory_ids": [memory]}
        answer = server.client().completions.create(
            model="tiny", prompt=prompt, max_tokens=10, temperature=0, extra_body=body
        )
        answers[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = llama.compress(tiny.TEXT[:200], ratio=4)
    assert answers == {prompt: llama.generate(prompt, memory=kept, max_new_tokens=10) for prompt in prompts}


# ---- for whoever runs it ----


def test_metrics_count(llama: Nugget2D, tmp_path: Path) -> None:
    with serving(llama, tmp_path) as server:
        http = server.http()
        used = http.post("/v1/completions", json=LONG | {"max_tokens": 5}).json()["usage"]
        http.get("/v1/memories/none")
        counted = 'nugget2d_requests_total{route="/v1/memories/{id}",status="404"} 1.0'
        assert soon(lambda: counted in http.get("/metrics").text)
        text = http.get("/metrics").text
    assert 'nugget2d_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert f'nugget2d_tokens_total{{kind="answer"}} {float(used["completion_tokens"])}' in text
    assert "nugget2d_first_token_seconds_count 1.0" in text
    assert "nugget2d_batch_size_count 4.0" in text  # the first token comes with the prompt
    assert "nugget2d_queue_depth 0.0" in text and "nugget2d_running 0.0" in text


def test_a_line_of_json_for_every_request(server: Running, capfd: pytest.CaptureFixture[str]) -> None:
    answers = [server.http().post("/v1/completions", json=LONG | {"max_tokens": 5})]
    answers.append(server.http().get("/v1/secret-address"))
    ids = [answer.headers["x-request-id"] for answer in answers]
    logged: dict[str, dict[str, Any]] = {}

    def written() -> bool:
        logged.update({line["id"]: line for line in map(json.loads, capfd.readouterr().err.splitlines())})
        return logged.keys() >= set(ids)

    assert soon(written)
    first, second = (logged[name] for name in ids)
    assert (first["route"], first["status"], first["answer_tokens"]) == ("/v1/completions", 200, 5)
    assert first["first_token_seconds"] <= first["seconds"]
    assert (second["status"], second["route"]) == (404, "none")
    assert PROMPT not in json.dumps(first) and "secret" not in json.dumps(second)


def test_models(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").owned_by == "nugget2d"

"""The reward of a vision-language model: BERTScore, and a chat server that is slow, busy, wrong or not trusted."""
import base64
import io
import json
import math
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import ROOT
from ddpo_min import chat, vlm
from ddpo_min.files import InputError
from ddpo_min.prompts import find_prompts
from ddpo_min.text import tokenize
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, metrics

KEY = "sk-Secret/42+\"quoted\"=="         # with characters that JSON and URLs write in another way
BLACK = np.zeros((8, 8, 3), np.uint8)
SETTINGS = dict(url="http://127.0.0.1:8000/v1", model="m", reference="The image contains {prompt}", encoder="")


@pytest.fixture(autouse=True)
def no_key_and_no_proxy_of_the_user(monkeypatch):
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


# BERTScore

def test_bertscore_recall_by_hand():
    reference, candidate = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    assert vlm.bertscore_recall(reference, candidate) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert vlm.bertscore_recall(candidate, reference[:1]) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert vlm.bertscore_recall(reference[:1], candidate) == pytest.approx(1)
    weights = torch.tensor([3.0, 1.0])
    assert vlm.bertscore_recall(reference, candidate, weights) == pytest.approx((3 + math.sqrt(0.5)) / 4)
    assert vlm.bertscore_recall(reference, candidate[:0]) == 0
    assert vlm.bertscore_recall(reference, candidate, torch.zeros(2)) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_bertscore_recall_is_the_packages_own():
    greedy_cos_idf = pytest.importorskip("bert_score.utils").greedy_cos_idf
    torch.manual_seed(0)
    for m, n in ((3, 5), (7, 4), (1, 3)):
        r, c, w = torch.randn(m, 8), torch.randn(n, 8), torch.rand(m)
        theirs = greedy_cos_idf(r.clone()[None], torch.ones(1, m), w.clone()[None], c.clone()[None], torch.ones(1, n),
                                torch.ones(1, n))[1].item()
        assert vlm.bertscore_recall(r, c, w) == pytest.approx(theirs, abs=1e-6)


def test_idf_is_bertscores():
    got = vlm.idf_weights([[1, 2], [1, 1, 3], [1]])
    assert got == pytest.approx({1: 0.0, 2: math.log(2), 3: math.log(2)})


def test_texts_are_embedded_token_by_token_without_marks(tiny_file):
    model = load_stable_diffusion(tiny_file)
    (tokens, rows), (other, _), (none, empty) = vlm.TextEmbedder(model.text_encoder)(["a fox", "a fox runs", ""])
    assert len(tokens) == len(rows) == 2 and other[:2] == tokens and len(other) == 3
    start, *expected = tokenize(["a fox"])[0, :3].tolist()
    assert tokens == expected and none == [] and empty.shape == (0, 16) and not rows.requires_grad
    assert torch.equal(rows, model.text_encoder.text_model.embeddings.token_embedding.weight[expected])


def test_the_pages_table_is_what_the_shipped_model_says():
    text = load_stable_diffusion().text_encoder
    lines = (ROOT / "docs" / "rewards.md").read_text().partition("| answer |")[2].partition("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]

    def behind_the_layers(texts):
        ids = tokenize(texts)
        return [(row[1:row.argmax()].tolist(), out[1:row.argmax()]) for row, out in zip(ids, text(ids).detach())]

    def says(encoder, idf, weighted):
        reward = vlm.Alignment(None, encoder, "The image contains {prompt}", find_prompts("activities"), idf)
        (tokens, reference), = reward.references(["a pig riding a bike"])
        return [f"{vlm.bertscore_recall(reference, answer, reward.weights(tokens) if weighted else None):.3f}"
                for _, answer in reward.embed([row[0] for row in rows])]

    table = vlm.TextEmbedder(text)
    assert len(rows) == 6 and [row[1:] for row in rows] == [list(row) for row in zip(
        says(behind_the_layers, False, False), says(table, False, True), says(table, True, True))]


# A small server, and what is asked of it

def said(content):
    """The JSON of a chat completion."""
    return json.dumps(dict(choices=[dict(message=dict(content=content))]))


class Server:
    """A small chat server: answers(k, body) is what the k-th request gets.

    A str is a description, an int an HTTP status, a tuple (status, headers, text of the body); a function is called
    with the handler and does it all itself.
    """

    def __init__(self, answers):
        self.requests, self.headers, self.answers = [], [], answers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body))
                server.headers.append(self.headers)
                answer = server.answers(len(server.requests) - 1, body)
                if callable(answer):
                    return answer(self)
                if not isinstance(answer, tuple):
                    answer = (answer, {}, "") if isinstance(answer, int) else (200, {}, said(answer))
                status, headers, text = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self):       # a redirect that was followed as urllib follows it
                server.requests.append((self.path, None))
                server.headers.append(self.headers)
                self.send_response(404)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None        # a client that has gone is part of these tests
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def chat_with(url, **more):
    return chat.ChatModel(url, "m", "?", **{**dict(timeout=5, retries=0, parallel=1, pause=0.01), **more})


def refused(call, *args, **more):
    """The message of the InputError that a call raises: one line, and no key anywhere in the chain of exceptions."""
    with pytest.raises(InputError) as caught:
        call(*args, **more)
    chain, error = [], caught.value
    while error is not None:
        chain += [str(error), repr(error), *map(repr, error.args)]
        error = error.__cause__ or error.__context__
    assert KEY not in "".join(chain) and "Secret" not in "".join(chain)
    assert str(caught.value).isprintable()
    return str(caught.value)


def answer_to(reply, **more):
    """The error of a server that always gives this reply, and how many requests it got."""
    with Server(lambda k, body: reply) as server:
        return refused(chat_with(server.url, **more).describe, BLACK), len(server.requests)


def picture_in(body):
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_the_server_sees_the_picture_and_the_question_and_answers_keep_their_order():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[:, ..., 1] = np.arange(6)[:, None, None] * 10
    with Server(lambda k, body: str(picture_in(body)[0, 0, 1] // 10)) as server:
        model = chat.ChatModel(server.url + "/", "a-model", "What?", timeout=5, retries=0, parallel=4)
        assert model.describe_all(images) == ["0", "1", "2", "3", "4", "5"]
        path, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "a-model" and body["temperature"] == 0
    assert body["messages"][0]["content"][0] == dict(type="text", text="What?")
    assert "Authorization" not in server.headers[0]


def test_content_comes_as_text_as_parts_or_not_at_all():
    parts = [dict(type="text", text="a cat"), dict(type="thinking", thinking="?"), dict(type="text", text=" sits")]
    replies = ["a cat", parts, None, "", []]
    with Server(lambda k, body: replies[k]) as server:
        model = chat_with(server.url)
        assert [model.describe(BLACK) for _ in replies] == ["a cat", "a cat sits", "", "", ""]


# Errors and tries

def test_a_busy_server_is_asked_again_and_a_wrong_request_is_not():
    with Server(lambda k, body: 503 if k < 2 else "a cat") as server:
        assert chat_with(server.url, retries=3).describe(BLACK) == "a cat"
        assert len(server.requests) == 3
    message, requests = answer_to(404, retries=3)
    assert "404" in message and requests == 1
    message = refused(chat_with("http://127.0.0.1:9/v1", retries=2).describe, BLACK)
    assert "no answer in 3 tries (ConnectionRefusedError: [" in message


def waits_of(monkeypatch, *replies):
    """The seconds that are waited before each try, none of them really."""
    waits = []
    monkeypatch.setattr(chat.GivenUp, "wait", lambda self, seconds: waits.append(seconds))
    with Server(lambda k, body: replies[k]) as server:
        assert chat_with(server.url, retries=len(replies), pause=1.0).describe(BLACK) == replies[-1]
    return waits


def test_tries_wait_1_2_4_seconds_or_as_long_as_the_server_says(monkeypatch):
    assert waits_of(monkeypatch, 500, 503, 429, 408, "a cat") == [0, 1, 2, 4, 8]
    asked = [(429, {"Retry-After": "7"}, ""), (503, {"Retry-After": "0"}, ""), (503, {"Retry-After": "86400"}, ""),
             (429, {"Retry-After": "soon"}, ""), (500, {"Retry-After": "7"}, ""), "a cat"]
    assert waits_of(monkeypatch, *asked) == [0, 7, 0, 60, 8, 16]
    later, past = formatdate(time.time() + 30, usegmt=True), formatdate(time.time() - 30, usegmt=True)
    dates = [(429, {"Retry-After": later}, ""), (503, {"Retry-After": past}, "")]
    _, first, second = waits_of(monkeypatch, *dates, "a cat")
    assert 20 < first <= 30 and second == 0
    assert [chat.retry_after(value) for value in (None, "", "soon", "-1", "0.5", "\u00b2", "9" * 9999)] == [None] * 7


@pytest.mark.parametrize("reply,named", [
    ((404, {}, '{"error": {"message": "no model m\\nmore"}}'), "HTTP 404: no model m)"),
    ((400, {}, '{"error": "too\\u0007 large"}'), "HTTP 400: too large)"),
    ((422, {}, '{"detail": "no field x"}'), "HTTP 422: no field x)"), ((400, {}, "\nplain\nmore"), "HTTP 400: plain)"),
    ((400, {}, '{\n"code": 3}'), 'HTTP 400: {"code": 3})'), ((405, {}, ""), "HTTP 405: Method Not Allowed)"),
    ((418, {}, "\x1b[31mred\u202e" + "x" * 500), "HTTP 418: [31mred" + "x" * 193 + ")"),
    ((400, {}, "[" * 100_000), "HTTP 400: [[[")])
def test_the_servers_own_words_are_in_the_message_but_one_short_line_of_them(reply, named):
    message, requests = answer_to(reply, retries=1)
    assert named in message and "--vlm-url and --vlm-model" in message and requests == 1 and len(message) < 400


@pytest.mark.parametrize("text,named", [
    ("<!DOCTYPE html>\n<p>Hello", "not JSON: <!DOCTYPE html>"), ("", "not JSON"), ("[" * 100_000, "not JSON"),
    ('{"object": "list"}', 'no choices[0].message.content with a text: {"object": "list"}'), ('["x"]', "no choices"),
    ('{"choices": []}', "no choices"), (said(7), "no choices"), (said([dict(type="text", text=7)]), "no choices"),
    (said(["x"]), "no choices"), ('{"choices": [{"message": "x"}]}', "no choices"),
    ('{"error": {"message": "out of memory"}}', "with a text: out of memory")])
def test_a_success_without_a_description_is_one_line_after_the_retries(text, named):
    message, requests = answer_to((200, {}, text), retries=1)
    assert named in message and "2 tries" in message and "--vlm-url" in message and requests == 2


def test_an_answer_of_two_megabytes_is_not_read_to_its_end():
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(b" " * 50_000)
            sent.append(50_000)

    assert "a cat" == chat_of((200, {}, said("a cat") + " " * 900_000))
    message, requests = answer_to((200, {}, said("a cat") + " " * 2_000_000), retries=2)
    assert "longer than 1 MB" in message and "--vlm-url" in message and requests == 1
    assert "longer than 1 MB" in answer_to(flood)[0]
    assert sum(sent) < 15_000_000           # what the sockets hold may be sent, too


def chat_of(reply):
    with Server(lambda k, body: reply) as server:
        return chat_with(server.url).describe(BLACK)


def drip(where):
    """A server that sends a byte every 20 ms for 4 s: each comes in time, the whole answer does not."""
    def answer(handler):
        start = {"headers": "HTTP/1.1 200 OK\r\nX: ", "body": "HTTP/1.1 200 OK\r\n\r\n",
                 "error": "HTTP/1.1 400 no\r\n\r\n",
                 "chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"}[where]
        handler.wfile.write(start.encode())
        for _ in range(200):
            handler.wfile.write(b"1\r\n \r\n" if where == "chunks" else b" ")
            time.sleep(0.02)
    return answer


@pytest.mark.parametrize("where", ["headers", "body", "chunks", "error"])
def test_the_timeout_is_for_the_whole_answer(where):
    begin = time.monotonic()
    message, _ = answer_to(drip(where), timeout=0.2)
    assert time.monotonic() - begin < 2
    assert "HTTP 400: no" in message if where == "error" else "within 0.2 s, see --vlm-timeout" in message


def test_once_a_request_has_failed_for_good_the_others_of_its_batch_end_too():
    """A server that hangs costs one request's patience, not everybody's."""
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[1] = 255
    busy = threading.Event()

    def answers(k, body):
        if picture_in(body).max() == 0:
            busy.set()
            return 503
        busy.wait(5)
        return 404

    with Server(answers) as server:
        model = chat_with(server.url, retries=1, parallel=2, pause=5)
        begin = time.monotonic()
        assert "404" in refused(model.describe_all, images)          # why the first one failed, not that another did
        model.pool.shutdown()
        assert len(server.requests) == 2 and time.monotonic() - begin < 4


def test_a_server_that_is_back_is_asked_again_but_not_while_a_failed_batch_is_in_flight():
    release, waiting = threading.Event(), threading.Event()

    def answers(k, body):
        if k == 0:
            waiting.set()
            release.wait(5)
            return "slow"
        return 404 if k == 1 else "a cat"

    with Server(answers) as server:
        model, slow = chat_with(server.url, parallel=2), []
        other = threading.Thread(target=lambda: slow.extend(model.describe_all(BLACK[None])))
        other.start()
        assert waiting.wait(5)
        for _ in range(2):
            assert "404" in refused(model.describe_all, BLACK[None])
        assert len(server.requests) == 2
        release.set()
        other.join(5)
        assert slow == ["slow"]
        assert model.describe_all(BLACK[None]) == ["a cat"]


# The API key

def test_the_key_arrives_as_a_bearer_token_and_only_where_it_should(tiny_file, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    encoder = load_stable_diffusion(tiny_file).text_encoder
    with Server(lambda k, body: "a cat") as server:
        reward = vlm.alignment(encoder, [], **{**SETTINGS, "url": server.url}, question="?", idf=False, parallel=1,
                               timeout=5, retries=0, api_key_env="OTHER_KEY")
        reward.chat.describe(BLACK)
        monkeypatch.setenv("OPENAI_API_KEY", "ours")
        for name in ("OPENAI_API_KEY", ""):
            chat_with(server.url, api_key=vlm.read_key(name)).describe(BLACK)
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}", "Bearer ours", None]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_or_missing_key_names_its_variable_and_is_not_tried_again(status):
    reply = (status, {}, json.dumps(dict(error=dict(message=f"Incorrect API key provided: {KEY[:8]}***"))))
    message, requests = answer_to(reply, retries=3, api_key=KEY, api_key_env="MY_KEY")
    assert f"HTTP {status}: the API key in the environment variable MY_KEY is wrong" in message and requests == 1
    message, requests = answer_to(reply, retries=3)
    assert f"HTTP {status}: the API key is missing" in message and "environment variable OPENAI_API_KEY" in message
    assert requests == 1


def test_a_key_that_the_server_says_back_is_masked():
    quoted = KEY.replace("/", "%2F").replace("+", "%2B").replace('"', "%22").replace("=", "%3D")
    garbage = f"HTTP/1.1 {KEY}\r\n\r\n"
    for reply, named in [((400, {}, json.dumps(dict(error=dict(message=f"key {KEY} is odd")))), "key *** is odd"),
                         ((400, {}, f"key {KEY} is odd"), "key *** is odd"),
                         ((400, {}, json.dumps(dict(key=KEY))), '{"key": "***"}'),
                         ((400, {}, "x" * 190 + KEY), "x" * 190 + "***)"), ((400, {}, quoted), "***"),
                         ((200, {}, f"<p>{KEY}"), "<p>***"), ((200, {}, json.dumps(dict(echo=KEY))), '"***"'),
                         ((302, {"Location": f"http://127.0.0.1:9/{KEY}"}, ""), "127.0.0.1:9/***"),
                         (lambda handler: handler.wfile.write(garbage.encode()), "***"),
                         (lambda handler: handler.send_response(400, KEY) or handler.end_headers(), "HTTP 400: ***")]:
        assert named in answer_to(reply, api_key=KEY)[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    with Server(lambda k, body: "a cat") as other:
        reply = (status, {"Location": f"{other.url}/chat?token=abc#d"}, "")
        message, requests = answer_to(reply, api_key=KEY, retries=2)
        assert f"HTTP {status}: it redirects to {other.url}/chat, which is not followed" in message and requests == 1
        assert "--vlm-url" in message and not other.requests


@pytest.mark.parametrize("bad", [KEY + "\n", KEY + "\r\nX: y", KEY + "\x00", KEY + " x", "\x7f" + KEY, KEY + "\u00e9"])
def test_a_key_that_cannot_be_sent_is_refused(bad, monkeypatch):
    monkeypatch.setattr(chat.os, "environ", {"OPENAI_API_KEY": bad})
    assert "OPENAI_API_KEY" in refused(vlm.check, **SETTINGS)
    assert "MY_KEY" in refused(chat_with, "https://example.com/v1", api_key=bad, api_key_env="MY_KEY")


def test_a_variable_that_is_not_set_is_refused_unless_it_is_the_default_one(monkeypatch):
    vlm.check(**SETTINGS)
    vlm.check(**SETTINGS, api_key_env="")
    assert "--vlm-api-key-env NO_SUCH_KEY:" in refused(vlm.check, **SETTINGS, api_key_env="NO_SUCH_KEY")
    assert "--vlm-api-key-env:" in refused(vlm.check, **SETTINGS, api_key_env=KEY)       # the key itself: not shown
    monkeypatch.setenv("EMPTY_KEY", "")
    assert "EMPTY_KEY" in refused(vlm.check, **SETTINGS, api_key_env="EMPTY_KEY")


OURS = ["localhost", "LocalHost", "127.0.0.1", "127.8.9.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
PRIVATE = ["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.7", "169.254.1.1", "[fe80::1]", "[fd00::1]",
           "gpu-box", "nas.local", "[::ffff:10.0.0.1]"]
PUBLIC = ["example.com", "8.8.8.8", "172.32.0.1", "192.169.0.1", "11.0.0.1", "[2001:db8::1]", "[::ffff:8.8.8.8]",
          "134744072", "0x8080808", "localhost.example.com", "box.localx", "box.nonlocal", "ai.", "010.0.0.1"]


def test_a_key_goes_unencrypted_only_to_private_networks(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for host in OURS + PRIVATE:
        vlm.check(**{**SETTINGS, "url": f"http://{host}:8000/v1"})
        assert chat.on_this_computer(host) == (host in OURS), host
    for host in PUBLIC:
        url = f"http://{host}:8000/v1"
        message = refused(vlm.check, **{**SETTINGS, "url": url})
        assert f"--vlm-url {url}:" in message and "OPENAI_API_KEY" in message and "https://" in message
        vlm.check(**{**SETTINGS, "url": f"https://{host}/v1"})
        vlm.check(**{**SETTINGS, "url": url}, api_key_env="")
    assert "OPENAI_API_KEY" in refused(chat_with, "http://example.com/v1", api_key=KEY)


@pytest.mark.parametrize("url", [
    "http://user:Secret@127.0.0.1/v1", "https://Secret@example.com", "http:/user:Secret@host", "http://u:S/Secret@host",
    "https://example.com/v1?key=Secret", "https://example.com/#Secret", "ftp://host/", "host:8000/v1", "", "http://",
    "http://host:port/v1", "http://host:99999/v1", "http://ho st/v1", "http://host/v1\n", "http://h\u00f6st/v1",
    "http://host/\u00f6", "http://evil%2ecom/v1", "http://[::1/v1", "http://host/\x00"])
def test_a_url_that_cannot_work_or_holds_a_password_is_refused_without_being_shown(url):
    message = refused(vlm.check, **{**SETTINGS, "url": url})
    assert message.startswith("--vlm-url:") and (("environment variable OPENAI_API_KEY" in message) == ("@" in url))


def test_the_other_settings_that_cannot_work_are_refused():
    assert "--vlm-model" in refused(vlm.check, **{**SETTINGS, "model": ""})
    assert "--vlm-reference" in refused(vlm.check, **{**SETTINGS, "reference": "x"})
    assert "--vlm-encoder" in refused(vlm.check, **{**SETTINGS, "encoder": "none.py:f"})


# Proxies

def test_no_proxy_stands_between_us_and_this_computer(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server(lambda k, body: "a cat") as server:
        for host in ("127.0.0.1", "localhost"):
            assert chat_with(f"http://{host}:{server.port}/v1").describe(BLACK) == "a cat"


def test_a_proxy_is_used_for_other_hosts_but_never_sees_a_key(monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: resolve("127.0.0.1", *more, **named))
    with Server(lambda k, body: "by the proxy") as proxy, Server(lambda k, body: "a cat") as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        url = f"http://gpu-box:{server.port}/v1"
        assert chat_with(url).describe(BLACK) == "by the proxy"
        assert chat_with(url, api_key=KEY).describe(BLACK) == "a cat"
        assert [path for path, _ in proxy.requests] == [f"{url}/chat/completions"]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


# The reward

@pytest.mark.parametrize("idf", [False, True])
def test_the_alignment_reward_prefers_the_description_that_says_the_prompt(tiny_file, idf, capsys):
    images = np.stack([BLACK, BLACK + 255])
    with Server(lambda k, body: "The image contains a fox" if picture_in(body).max() else "seven houses") as server:
        reward = vlm.alignment(load_stable_diffusion(tiny_file).text_encoder, ["a cat", "a fox"], idf=idf,
                               **{**SETTINGS, "url": server.url}, question="?", parallel=2, timeout=5, retries=0)
        got = reward(images, ["a fox", "a fox"])
    assert got[1] == pytest.approx(1, abs=1e-5) and got[0] < 0.99 and all(isinstance(value, float) for value in got)
    assert f"m at {server.url}/chat/completions, BERTScore" in capsys.readouterr().out


def test_idf_weighs_the_rare_words_and_an_encoder_of_ones_own_is_used(tmp_path):
    """Words at right angles: a reference's word is found or not, so the reward is the share of the weight found.

    "the" is in every reference and counts nothing.
    """
    (tmp_path / "words.py").write_text(
        "import torch\nWORDS = 'the a cat fox'.split()\n\n\ndef embed(texts):\n"
        "    return [(text.split(), torch.eye(4)[[WORDS.index(word) for word in text.split()]]) for text in texts]\n")
    more = dict(question="?", parallel=1, timeout=5, retries=0, encoder=f"{tmp_path / 'words.py'}:embed",
                reference="the {prompt}")
    with Server(lambda k, body: "the fox") as server:
        for idf, expected in ((False, 1 / 2), (True, math.log(3) / (math.log(3) + math.log(1.5)))):
            reward = vlm.alignment(None, ["a cat", "cat"], **{**SETTINGS, "url": server.url, **more}, idf=idf)
            assert reward(BLACK[None], ["a fox"]) == pytest.approx([expected])


def test_a_server_that_goes_away_ends_the_run_with_the_run_saved_and_the_key_nowhere(tiny_file, tmp_path, monkeypatch,
                                                                                     capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(lambda k, body: "a cat" if k < 5 + 8 + 3 else 400) as server:
        message = refused(train.main, arguments(tiny_file, tmp_path / "run", "--reward", "vlm", "--vlm-url", server.url,
                                                "--vlm-model", "m", "--vlm-parallel", "1"))
    assert "--vlm-url" in message and server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "state.pt").exists()
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"Secret" not in written and "Secret" not in "".join(capsys.readouterr())

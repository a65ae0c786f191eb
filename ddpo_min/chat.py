"""A vision-language model behind a server with OpenAI's chat API: its address, its key, its answers and its errors.

The key is sent to that server alone, and is in no message. A server that is busy is asked again; one that drips, never
ends or redirects is an error of one line.
"""
import base64
import http.client
import io
import ipaddress
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial

from PIL import Image

from .files import InputError, first_line

API_KEY_ENV = "OPENAI_API_KEY"
LARGEST_ANSWER = 1_000_000      # bytes
LONGEST_WAIT = 60               # seconds, however long a server's Retry-After is
LONGEST_QUOTE = 200             # characters of a server's message in ours
HTTP_URL = re.compile(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?(?:/[^?#\s]*)?")
PRIVATE_NETWORKS = [ipaddress.ip_network(network) for network in (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fe80::/10", "fc00::/7")]


def read_key(name):
    """The API key in the environment variable of this name, "" if there is none.

    Raises InputError if the variable is not set, unless it is the default one.
    """
    key = os.environ.get(name, "") if name else ""
    if name and not key and name != API_KEY_ENV:
        shown = f" {name}" if re.fullmatch("[A-Z][A-Z0-9_]*", name) else ""     # else it may be the key itself
        raise InputError(f"--vlm-api-key-env{shown}: no environment variable of this name is set; put the key into one "
                         "and give the variable's name here, never the key")
    return key


def check_server(url, api_key, api_key_env=API_KEY_ENV):
    """Refuse a URL that cannot work, and a key that cannot be sent or would be sent unprotected. Raises InputError."""
    if "@" in url:      # not shown: what is before the @ may be a password
        raise InputError("--vlm-url: there is an @ in it, but a user name or password has no place there; put the key "
                         f"into the environment variable {api_key_env or API_KEY_ENV}, write an @ of the path as %40")
    parts = HTTP_URL.fullmatch(url) if url.isascii() and url.isprintable() else None
    if not parts or int(parts[3] or 0) > 65535:     # not shown: a key may be behind the ?
        raise InputError("--vlm-url: not understood; expected http://HOST:PORT/v1 or https://HOST/v1, without ? or # "
                         "behind it")
    if not re.fullmatch("[!-~]*", api_key):
        raise InputError(f"the API key in the environment variable {api_key_env}: there is a space, a line break or "
                         "another character in it that cannot be sent; set the variable again, without it")
    scheme, host = parts[1], parts[2]
    if api_key and scheme == "http" and not (on_this_computer(host) or in_private_network(host)):
        raise InputError(f"--vlm-url {url}: with http:// the API key in {api_key_env} can be read on its way; use "
                         "https://, or --vlm-api-key-env \"\" if the server needs no key")


def ip_address(host):
    """The IP address that a host is written as, or None if it is a name."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))      # 127.1, 2130706433: as the system reads them
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address             # ::ffff:10.0.0.1 is 10.0.0.1


def on_this_computer(host):
    """Whether a host is this computer: localhost, 127.0.0.0/8, ::1, and 0.0.0.0, which servers print."""
    address = ip_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback or address.is_unspecified


def in_private_network(host):
    """Whether a host is in a private network: such an address, *.local, or a name without a dot."""
    address = ip_address(host)
    if address is None:
        return "." not in host or host.lower().endswith(".local")
    return any(address in network for network in PRIVATE_NETWORKS)


# One HTTP request. urllib's timeout is for one read; here it is for the whole answer.

class TimedStream(io.RawIOBase):
    """What a socket receives; a read waits only until the deadline, on the clock of time.monotonic()."""

    def __init__(self, raw, sock, deadline):
        self.raw, self.sock, self.deadline = raw, sock, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response whose headers and body must be complete at the deadline."""

    def __init__(self, sock, *args, deadline, **more):
        super().__init__(sock, *args, **more)
        self.fp = io.BufferedReader(TimedStream(self.fp.detach(), sock, deadline))


class TimedHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https with timed responses."""

    def http_open(self, request):
        return self.do_open(partial(self.connect, http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(partial(self.connect, http.client.HTTPSConnection), request)

    def connect(self, kind, host, timeout):
        """A new connection; the time of its answer begins now."""
        connection = kind(host, timeout=timeout)
        connection.response_class = partial(TimedResponse, deadline=time.monotonic() + timeout)
        return connection

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def make_opener(proxies):
    """An opener that follows no redirect, so that key and pictures go to no other server; an error is an answer, too.

    proxies: {scheme: URL}, or None for those of the environment.
    """
    opener = urllib.request.OpenerDirector()        # without urllib's usual handlers of redirects and errors
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    opener.add_handler(TimedHandler())
    return opener


class Trouble(Exception):
    """Why a request got no description. again: whether to try again; after: seconds until then, or None."""

    def __init__(self, text, again=True, after=None):
        super().__init__(text)
        self.again, self.after = again, after


def retry_after(value):
    """Seconds to wait by a Retry-After header (seconds or a date), at most LONGEST_WAIT; None if it says nothing."""
    if value is None:
        return None
    try:
        seconds = int(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0), LONGEST_WAIT)


def server_message(body):
    """What a server says went wrong: the message in its JSON, or the text itself. body: bytes; returns a str."""
    text = body.decode("utf-8", "replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = answer.get("error") or answer if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error if isinstance(error, str) else json.dumps(answer)


def content_of(answer):
    """The text in the JSON of a chat completion, "" if there is none. Raises Trouble if it is something else."""
    try:
        content = answer["choices"][0]["message"].get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (LookupError, TypeError, AttributeError):
        content = None
    if not isinstance(content, str):
        raise Trouble("its JSON has no choices[0].message.content with a text")
    return content


# The model

class GivenUp(threading.Event):
    """Set when a request has failed for good: the others in flight need not try on. message: why."""
    message = ""


class ChatModel:
    """A vision-language model behind the chat API that vLLM, SGLang, Ollama, llama.cpp and LM Studio serve."""

    def __init__(self, url, model, question, *, timeout, retries, parallel, api_key="", api_key_env=API_KEY_ENV,
                 pause=1.0):
        """timeout: seconds for one answer; retries: tries more; parallel: requests in flight; api_key_env: where the
        key is from, for messages; pause: seconds before the second try, doubled for each one more. Raises InputError.
        """
        check_server(url, api_key, api_key_env)
        self.url, self.model, self.question = url.rstrip("/") + "/chat/completions", model, question
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.api_key, self.api_key_env = api_key, api_key_env
        scheme, host = HTTP_URL.fullmatch(url).group(1, 2)
        # Without a proxy: this computer, and a key that is not encrypted, which a proxy could read
        self.opener = make_opener({} if on_this_computer(host) or (api_key and scheme == "http") else None)
        self.pool = ThreadPoolExecutor(parallel)
        self.lock, self.batches, self.given_up = threading.Lock(), 0, GivenUp()

    def describe_all(self, images):
        """Several requests in flight; the answers in the order of the pictures. Raises InputError if one fails."""
        with self.lock:
            if self.batches == 0:
                self.given_up = GivenUp()       # the server may be back
            self.batches, given_up = self.batches + 1, self.given_up
        try:
            return list(self.pool.map(partial(self.describe, given_up=given_up), images))
        finally:
            with self.lock:
                self.batches -= 1

    def describe(self, image, given_up=None):
        """What the model says of one picture, uint8 (H, W, 3). Raises InputError if the server stays away or errs.

        given_up: the GivenUp shared with other requests, which ends them all early.
        """
        given_up, pause = given_up or GivenUp(), 0
        for attempt in range(self.retries + 1):
            given_up.wait(pause)
            if given_up.is_set():
                raise InputError(given_up.message)
            try:
                return self.ask(image)
            except Trouble as caught:
                trouble = caught
            if not trouble.again:
                break
            pause = self.pause * 2 ** attempt if trouble.after is None else trouble.after
        # Raised out here, not in the except: this exception has no other behind it that could quote the server
        given_up.message = (f"the vision-language model at {self.url} gave no answer in {attempt + 1} "
                            f"tr{'ies' if attempt else 'y'} ({trouble}); see --vlm-url and --vlm-model")
        given_up.set()
        raise InputError(given_up.message)

    def question_about(self, image):
        """The body of a request: the question and the picture, as JSON in bytes."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [dict(type="text", text=self.question), dict(type="image_url", image_url=dict(url=picture))]
        return json.dumps(dict(model=self.model, temperature=0, max_tokens=100,
                               messages=[dict(role="user", content=content)])).encode()

    def ask(self, image):
        """Send one request; returns what the model says. Raises Trouble."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, self.question_about(image), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                if not 200 <= response.status < 300:
                    raise self.refusal(response)
                answer = response.read(LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise Trouble(f"no complete answer within {self.timeout:g} s, see --vlm-timeout")
            raise Trouble(f"{type(cause).__name__}: {self.quote(cause)}")
        if len(answer) > LARGEST_ANSWER:
            raise Trouble(f"its answer is longer than {LARGEST_ANSWER / 1e6:g} MB", again=False)
        try:
            return content_of(json.loads(answer))
        except (ValueError, RecursionError):
            raise Trouble(f"its answer is not JSON: {self.quote(server_message(answer))}")
        except Trouble as trouble:
            raise Trouble(f"{trouble}: {self.quote(server_message(answer))}")

    def refusal(self, response):
        """A response with an error status or a redirect, as a Trouble."""
        status = response.status
        if 300 <= status < 400:
            place = urllib.parse.urljoin(self.url, response.headers.get("Location", ""))
            place = place.partition("?")[0].partition("#")[0]
            return Trouble(f"HTTP {status}: it redirects to {self.quote(place)}, which is not followed; give the "
                           "address of the server itself", again=False)
        if status in (401, 403):        # not quoted: such messages often show a part of the key
            if self.api_key:
                return Trouble(f"HTTP {status}: the API key in the environment variable {self.api_key_env} is wrong or "
                               "may not use this model; another variable: --vlm-api-key-env", again=False)
            return Trouble(f"HTTP {status}: the API key is missing; put it into the environment variable "
                           f"{self.api_key_env or API_KEY_ENV}, or name another with --vlm-api-key-env", again=False)
        body = b""
        with suppress(OSError, http.client.HTTPException):      # the status says enough
            body = response.read(LARGEST_ANSWER)
        message = self.quote(server_message(body)) if body.strip() else self.quote(response.reason)
        return Trouble(f"HTTP {status}: {message}", again=status >= 500 or status in (408, 429),
                       after=retry_after(response.headers.get("Retry-After")) if status in (429, 503) else None)

    def quote(self, text):
        """Text from outside for a message: its first line, printable, without the key, at most LONGEST_QUOTE long."""
        line = first_line(text)
        if self.api_key:
            for key in (self.api_key, json.dumps(self.api_key)[1:-1], urllib.parse.quote(self.api_key, safe="")):
                line = line.replace(key, "***")
        return line[:LONGEST_QUOTE]

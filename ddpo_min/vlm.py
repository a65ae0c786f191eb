"""The paper's alignment reward: a vision-language model says what it sees, BERTScore compares that with the prompt."""
import base64
import http.client
import io
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .files import InputError
from .prompts import find_prompts
from .rewards import find_own
from .text import END_OF_TEXT, tokenize


def check(settings):
    """Refuse settings that the reward "vlm" could not work with. Raises InputError."""
    if not settings.vlm_model:
        raise InputError("--reward vlm: needs --vlm-model, the name under which the server at --vlm-url knows it")
    if not settings.vlm_url.startswith(("http://", "https://")):
        raise InputError(f"--vlm-url {settings.vlm_url}: expected http:// or https://")
    if "{prompt}" not in settings.vlm_reference:
        raise InputError(f"--vlm-reference {settings.vlm_reference!r}: expected {{prompt}} in it")
    if settings.vlm_encoder:
        find_own(settings.vlm_encoder, "--vlm-encoder")


def bertscore_recall(reference, candidate, weights=None):
    """How much of the reference is found in the candidate: every reference token's best match, averaged.

    R = sum_i w_i max_j cos(reference_i, candidate_j) / sum_i w_i    [BERTScore Eq. 1 and Sec. 3; w = 1 without idf]
    reference: (m, d); candidate: (n, d); weights: (m,), idf of the reference's tokens, or None. Returns a float, 0 if
    either is empty.
    """
    if len(reference) == 0 or len(candidate) == 0:
        return 0.0
    similarity = F.normalize(reference, dim=-1) @ F.normalize(candidate, dim=-1).T
    best = similarity.max(dim=1).values
    if weights is None or weights.sum() == 0:       # without idf, or where every token is in every reference
        weights = torch.ones_like(best)
    return ((weights * best).sum() / weights.sum()).item()


def idf_weights(token_lists):
    """Inverse document frequency of every token: {token: log((M + 1) / (count + 1))}    [BERTScore Sec. 3].

    token_lists: M lists of tokens, the references; count: in how many of them a token occurs.
    """
    documents = [set(tokens) for tokens in token_lists]
    return {token: float(np.log((len(documents) + 1) / (sum(token in d for d in documents) + 1)))
            for token in set().union(*documents)}


class TextEmbedder:
    """Every token of a text, embedded by Stable Diffusion's own text encoder, the marks and the padding left out.

    The paper's encoder is DeBERTa, which reads in both directions; CLIP's reads from left to right, so a token's
    embedding knows only what stands before it.
    """

    def __init__(self, text_encoder):
        self.encoder = text_encoder

    @torch.no_grad()
    def __call__(self, texts):
        """List of B str -> list of B (tokens: list of n int, embeddings (n, width))."""
        ids = tokenize(texts, self.encoder.config.positions, self.encoder.config.padding)
        device = self.encoder.text_model.final_layer_norm.weight.device
        hidden = self.encoder(ids.to(device)).float().cpu()
        out = []
        for row, states in zip(ids, hidden):
            length = int((row == END_OF_TEXT).nonzero()[0])         # the first end mark; the start mark is at 0
            out.append((row[1:length].tolist(), states[1:length]))
        return out


class ChatModel:
    """A vision-language model behind the chat API that vLLM, SGLang, Ollama, llama.cpp and LM Studio serve."""

    def __init__(self, url, model, question, timeout, retries, parallel, pause=1.0):
        self.url, self.model, self.question = url.rstrip("/") + "/chat/completions", model, question
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.pool = ThreadPoolExecutor(parallel)
        self.failed = threading.Event()     # once one request has failed for good, the others need not try on

    def describe(self, image):
        """What the model says of one picture, uint8 (H, W, 3). Raises InputError if the server stays away or errs."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [dict(type="text", text=self.question), dict(type="image_url", image_url=dict(url=picture))]
        body = json.dumps(dict(model=self.model, temperature=0, max_tokens=100,
                               messages=[dict(role="user", content=content)])).encode()
        trouble = None
        for attempt in range(self.retries + 1):
            if attempt:
                self.failed.wait(self.pause * 2 ** (attempt - 1))
            if self.failed.is_set():
                trouble = trouble or "another request failed"
                break
            try:
                request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):     # the request itself is wrong
                    break
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                trouble = f"{type(error).__name__}: {error}"
        self.failed.set()
        raise InputError(f"the vision-language model at {self.url} gave no answer in {attempt + 1} "
                         f"tr{'ies' if attempt else 'y'} ({trouble}); see --vlm-url and --vlm-model")

    def describe_all(self, images):
        """Several requests in flight; the answers in the order of the pictures."""
        return list(self.pool.map(self.describe, images))


def alignment(settings, model, device):
    """The reward "vlm": BERTScore recall of the description against the prompt, about 0 to 1."""
    chat = ChatModel(settings.vlm_url, settings.vlm_model, settings.vlm_question, settings.vlm_timeout,
                     settings.vlm_retries, settings.vlm_parallel)
    own = settings.vlm_encoder
    encoder = find_own(own, "--vlm-encoder") if own else TextEmbedder(model.text_encoder)
    one_at_a_time = threading.Lock()    # several groups wait for the server at once; an encoder may not bear company
    print(f"  reward vlm: {settings.vlm_model} at {chat.url}, BERTScore recall by "
          f"{own or 'the text encoder of the model in use'}")

    def embed(texts):
        with one_at_a_time:
            return encoder(texts)

    def references(prompts):
        return embed([settings.vlm_reference.replace("{prompt}", prompt) for prompt in prompts])

    known = find_prompts(settings.prompts)
    idf = idf_weights([tokens for tokens, _ in references(known)]) if settings.vlm_idf == "on" else {}
    rarest = float(np.log(len(known) + 1))      # the idf of a token that no training prompt has

    def reward(images, prompts):
        candidates = embed(chat.describe_all(images))
        return [bertscore_recall(r, c, torch.tensor([idf.get(token, rarest) for token in tokens]) if idf else None)
                for (tokens, r), (_, c) in zip(references(prompts), candidates)]
    return reward

"""The paper's alignment reward: a vision-language model says what it sees, BERTScore compares that with the prompt."""
import threading

import numpy as np
import torch
import torch.nn.functional as F

from .chat import API_KEY_ENV, ChatModel, check_server, read_key
from .files import InputError, first_line
from .rewards import find_own, put_back
from .text import END_OF_TEXT, tokenize


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
    """Every token of a text by the table of embeddings of Stable Diffusion's own text encoder, without its layers.

    The paper's encoder is DeBERTa, which reads in both directions. CLIP reads from left to right: behind its layers a
    token knows only what stands before it, and answers would be judged by how they begin.
    """

    def __init__(self, text_encoder):
        self.config, self.table = text_encoder.config, text_encoder.text_model.embeddings.token_embedding.weight

    def __call__(self, texts):
        """List of B str -> list of B (tokens: list of n int, embeddings (n, width)), without start, end and padding."""
        out = []
        for row in tokenize(texts, self.config.positions, self.config.padding):
            tokens = row[1:int((row == END_OF_TEXT).nonzero()[0])]         # up to the first end mark
            out.append((tokens.tolist(), self.table[tokens.to(self.table.device)].detach().float().cpu()))
        return out


def check(*, url, model, reference, encoder, api_key_env=API_KEY_ENV):
    """Refuse settings that the reward "vlm" could not work with, or that would give the API key away.

    reference: the text that a description is compared with; encoder: "FILE.py:FUNCTION", or "" for the model's own;
    api_key_env: the environment variable with the key, "" for none. Raises InputError.
    """
    if not model:
        raise InputError("--reward vlm: needs --vlm-model, the name under which the server at --vlm-url knows it")
    check_server(url, read_key(api_key_env), api_key_env)
    if "{prompt}" not in reference:
        raise InputError(f"--vlm-reference {reference!r}: expected {{prompt}} in it")
    if encoder:
        find_own(encoder, "--vlm-encoder")


class Alignment:
    """The reward "vlm": BERTScore recall of a picture's description against its prompt, about 0 to 1."""

    def __init__(self, chat, encoder, reference, prompts, idf):
        """chat: a ChatModel; encoder: like TextEmbedder; reference: a text with {prompt}; prompts: those trained on;
        idf: whether to weight tokens by their rarity among them."""
        self.chat, self.encoder, self.reference = chat, encoder, reference
        self.one_at_a_time = threading.Lock()   # the reward is called in several threads; an encoder may not allow that
        self.by_rarity = idf
        self.rarest = float(np.log(len(prompts) + 1))       # the idf of a token that no training prompt has
        self.idf = idf_weights([tokens for tokens, _ in self.references(prompts)])

    def __call__(self, images, prompts):
        """uint8 (B, H, W, 3), list of B str -> list of B float. Raises InputError if the server gives no answer."""
        candidates = self.embed(self.chat.describe_all(images))
        return [bertscore_recall(reference, candidate, self.weights(tokens))
                for (tokens, reference), (_, candidate) in zip(self.references(prompts), candidates)]

    def references(self, prompts):
        return self.embed([self.reference.replace("{prompt}", prompt) for prompt in prompts])

    def embed(self, texts):
        """What the encoder says of each text: (tokens, embeddings float32 (n, d)). Raises InputError if it fails."""
        try:
            with self.one_at_a_time, put_back():
                found = [(tokens.tolist() if hasattr(tokens, "tolist") else list(tokens),
                          torch.as_tensor(rows).detach().float().cpu())
                         for tokens, rows in self.encoder(texts)]
        except (Exception, SystemExit) as error:
            raise InputError(f"--vlm-encoder: failed on {len(texts)} texts, the first {texts[0]!r} "
                             f"({type(error).__name__}: {first_line(error)}); mend it there")
        if len(found) != len(texts) or any(rows.ndim != 2 or len(rows) != len(tokens) for tokens, rows in found):
            shapes = ", ".join(f"{len(tokens)} and {tuple(rows.shape)}" for tokens, rows in found[:3])
            raise InputError(f"--vlm-encoder: returned tokens and embeddings of the shapes {shapes} for {len(texts)} "
                             "texts; expected n tokens and (n, d) for each text")
        return found

    def weights(self, tokens):
        """How much each token of a reference counts: its idf, or 1; but 0 if every reference has it."""
        idf = torch.tensor([self.idf.get(token, self.rarest) for token in tokens])
        return idf if self.by_rarity else (idf > 0).float()


def alignment(text_encoder, prompts, *, url, model, question, reference, encoder, idf, parallel, timeout, retries,
              api_key_env=API_KEY_ENV):
    """The reward function of these settings: (images, prompts) -> list of floats. Raises InputError.

    text_encoder: a TextEncoder, which embeds where encoder is ""; prompts: those trained on, for idf.
    """
    api_key = read_key(api_key_env)
    chat = ChatModel(url, model, question, timeout=timeout, retries=retries, parallel=parallel, api_key=api_key,
                     api_key_env=api_key_env)
    embedder = find_own(encoder, "--vlm-encoder") if encoder else TextEmbedder(text_encoder)
    print(f"  reward vlm: {model} at {chat.url}{', with the API key in ' + api_key_env if api_key else ''}, BERTScore "
          f"recall by {encoder or 'the text encoder of the model in use'}")
    return Alignment(chat, embedder, reference, prompts, idf)

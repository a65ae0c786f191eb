"""What the vision-language reward says of answers, and what a run does when its server fails in the field's ways."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from ddpo_min import vlm
from ddpo_min.prompts import find_prompts
from ddpo_min.weights import SHIPPED, load_stable_diffusion
from test_train import arguments, metrics
from test_vlm import Server, chat_with, no_key_and_no_proxy_of_the_user, refused, said  # noqa: F401

pytestmark = pytest.mark.usefixtures("plain_curve")

PIG = "a pig riding a bike"
ANSWERS = {      # about PIG: those that say it, those that say a half of it, and those that say nothing of it
    2: ["The image contains a pig riding a bike.", "a pig riding a bike", "A pig is riding a bicycle.",
        "A pig on a bike.", "The picture shows a pink pig that rides a bike.",
        "There is a pig on a bicycle in this image."],
    1: ["The image contains a pig.", "A pig.", "A pig playing chess", "A pig standing in a field",
        "The image contains a dog riding a bike.", "a cat riding a bike",
        "A person is riding a bike down the street."],
    0: ["The image contains a dog.", "a dog", "A cat washing dishes",
        "The image contains a colorful, abstract, and blurry background",
        "The image contains a blurry image of a forest.", "The image contains the text",
        "A colorful abstract painting"]}


@pytest.fixture(scope="module")
def embedder():
    return vlm.TextEmbedder(load_stable_diffusion(SHIPPED).text_encoder)


class Said:
    """A chat model whose answers are written down."""

    def __init__(self, answers):
        self.answers = answers

    def describe_all(self, images):
        return self.answers


def scores(embedder, answers, prompts, *, reference="{prompt}", idf=False, prompt=PIG):
    reward = vlm.Alignment(Said(answers), embedder, reference, prompts, idf)
    return reward(None, [prompt] * len(answers))


@pytest.mark.parametrize("reference", ["{prompt}", "The image contains {prompt}"])
@pytest.mark.parametrize("idf, share", [(False, 0.9), (True, 0.98)])
def test_answers_that_say_the_prompt_score_above_those_that_do_not(embedder, idf, share, reference):
    """Behind the encoder's layers it was 0.60 of the pairs, 0.62 with idf: answers were judged by how they begin."""
    got = {grade: scores(embedder, answers, find_prompts("activities"), idf=idf, reference=reference)
           for grade, answers in ANSWERS.items()}
    pairs = [high > low for more in got for less in got if more > less for high in got[more] for low in got[less]]
    assert sum(pairs) / len(pairs) >= share
    assert min(got[2]) > max(got[0])


@pytest.mark.parametrize("idf", [False, True])
def test_no_beginning_of_an_answer_lowers_its_score_and_a_template_raises_none(embedder, idf):
    prompts, template = find_prompts("activities"), "The image contains "
    for reference in ("{prompt}", template + "{prompt}"):
        for answer in ("a dog", "blue background", PIG):
            short, long = scores(embedder, [answer, template + answer], prompts, idf=idf, reference=reference)
            assert short - 1e-6 <= long < short + 0.15


def test_tokens_that_every_reference_has_count_nothing_and_without_others_all_count():
    def words(texts):
        vocabulary = "a photo of cat dog".split()
        return [(text.split(), torch.eye(5)[[vocabulary.index(word) for word in text.split()]]) for text in texts]

    answers, more = ["a photo of", "a photo of cat", "dog"], dict(reference="a photo of {prompt}", prompt="cat")
    for idf in (False, True):
        assert scores(words, answers, ["cat", "dog"], idf=idf, **more) == [0, 1, 0]
        assert scores(words, answers, ["cat"], idf=idf, **more) == [0.75, 1, 0]


@pytest.mark.parametrize("encoder, named", [
    (lambda texts: 1 / 0, "failed on 2 texts, the first 'cat' (ZeroDivisionError: division by zero)"),
    (lambda texts: sys.exit(), "SystemExit"), (lambda texts: [("ab", torch.ones(2, 3))], "2 and (2, 3) for 2 texts"),
    (lambda texts: [("ab", torch.ones(3, 3))] * 2, "2 and (3, 3), 2 and (3, 3) for 2"),
    (lambda texts: [("ab", torch.ones(2))] * 2, "2 and (2,)"), (lambda texts: torch.ones(2, 5, 3), "ValueError")])
def test_an_encoder_of_ones_own_that_fails_is_one_line(encoder, named):
    message = refused(scores, encoder, ["a cat"], ["cat", "dog"])
    assert message.startswith("--vlm-encoder: ") and named in message


# Empty answers

def vlm_arguments(tiny_file, out, server, *more, epochs=1):
    return arguments(tiny_file, out, "--vlm-url", server.url, "--vlm-model", "m", "--vlm-parallel", "1",
                     "--vlm-retries", "0", *more, epochs=epochs)


def test_empty_answers_are_counted(tiny_file, tmp_path):
    """5 before, 8 in the epoch (the first two empty), 5 after."""
    with Server(lambda k, body: [None, ""][k - 5] if k in (5, 6) else f"a cat {k}") as server:
        train.main(vlm_arguments(tiny_file, tmp_path / "run", server, "--reward", "vlm"))
    assert metrics(tmp_path / "run")[0]["score_empty_answers"] == 0.25
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["empty_answers"] == [0, 0]


@pytest.mark.parametrize("good, epochs", [(0, None), (5 + 8, 1)])
def test_a_run_whose_answers_are_all_empty_ends(tiny_file, tmp_path, good, epochs):
    """At once, before there is a folder, or with the finished epochs saved."""
    with Server(lambda k, body: "a cat" if k < good else " ") as server:
        message = refused(train.main, vlm_arguments(tiny_file, tmp_path / "run", server, "--reward", "vlm", epochs=3))
    assert f"all {8 if good else 5} answers of the vision-language model are empty" in message
    assert "--vlm-model" in message and (len(metrics(tmp_path / "run")) if good else None) == epochs
    assert (tmp_path / "run").exists() == bool(good)


# Faults of a server, in a run: the first answer of the second epoch goes wrong

def cut_off(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + said("a cat").encode()[:20])


def nothing(handler):
    handler.connection.close()


def garbage(handler):
    handler.wfile.write(b"\x00\x1b[31mSSH-2.0-OpenSSH\r\n\r\n")


FAULTS = {"refuses": 503, "resets": nothing, "cuts off": cut_off, "garbage": garbage, "HTML": (200, {}, "<html>"),
          "error": (200, {}, '{"error": {"message": "no model"}}'), "no choices": (200, {}, '{"choices": []}'),
          "busy": (429, {"Retry-After": "0"}, ""), "not JSON": (200, {}, '{"choices": [')}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(fault):
    with Server(lambda k, body: FAULTS[fault] if k < 2 else "a cat") as server:
        assert chat_with(server.url, retries=2).describe_all([torch.zeros(8, 8, 3).byte().numpy()]) == ["a cat"]
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["resets", "garbage", "HTML", 401])
def test_a_fault_that_stays_ends_the_run_in_one_line_and_resume_goes_on(tiny_file, tmp_path, fault):
    out, broken = tmp_path / "run", [True]
    reply = FAULTS.get(fault, fault)
    with Server(lambda k, body: reply if k >= 5 + 8 and broken else f"a cat {k % 8}") as server:
        message = refused(train.main, vlm_arguments(tiny_file, out, server, "--reward", "vlm", epochs=2))
        again = ["--resume", str(out), "--vlm-url", server.url]
        assert message.endswith(f"; 1 finished epochs are saved, go on with {' '.join(again)}")
        assert len(metrics(out)) == 1
        assert message.startswith("reward vlm failed on images 0 to 3, the first for the prompt 'a ")
        assert f"the vision-language model at {server.url}" in message and len(message) < 500 + len(str(out))
        broken.clear()
        train.main(again)
    assert len(metrics(out)) == 2 and (out / "before_after.png").exists()


def test_a_watched_server_that_goes_away_ends_nothing(tiny_file, tmp_path):
    with Server(lambda k, body: "a cat" if k < 5 else 404) as server:
        train.main(vlm_arguments(tiny_file, tmp_path / "run", server, "--reward", "jpeg", "--watch", "vlm", epochs=2))
    assert not any("score_vlm" in line or "score_empty_answers" in line for line in metrics(tmp_path / "run"))


def test_tokens_may_be_a_tensor():
    """As a tokenizer gives them; a tensor's elements are no keys of a dict."""
    words = ["a", "cat", "dog", "on", "bike"]

    def encoder(kind):
        def encode(texts):
            return [(kind([words.index(word) for word in text.split()]),
                     torch.eye(len(words))[[words.index(word) for word in text.split()]]) for text in texts]
        return encode

    chat = SimpleNamespace(describe_all=lambda images: ["a cat", "a dog", "a bike"])
    prompts = ["a cat", "a dog on bike", "a bike"]
    scores = [vlm.Alignment(chat, encoder(kind), "{prompt}", prompts, True)(None, prompts)
              for kind in (list, torch.tensor)]
    assert torch.allclose(*(torch.tensor(own) for own in scores)) and scores[0][1] < 0.9

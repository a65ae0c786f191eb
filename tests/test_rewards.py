"""Rewards by name, their sums, the CLIP judges, the vision-language model and BERTScore."""
import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from conftest import ROOT
from ddpo_min import judges, vlm
from ddpo_min.files import InputError
from ddpo_min.prompts import PROMPT_SETS, evaluation_prompts, find_prompts
from ddpo_min.rewards import Scorer, find_reward, parse_rewards
from ddpo_min.settings import Settings
from ddpo_min.weights import load_stable_diffusion
from test_train import arguments, metrics

sys.path.insert(0, str(ROOT / "weights"))
import rater                                                    # noqa: E402
import world                                                    # noqa: E402

OWN = "import numpy as np\n\n\ndef red(images, prompts):\n    return images[..., 0].mean((1, 2))\nnot_a_function = 3\n"


# Names and sums

def test_a_sum_is_parsed_and_each_part_can_be_named_or_be_a_users_own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path / 'mine.py'}:red"
    assert parse_rewards("jpeg") == {"jpeg": 1}
    assert parse_rewards(f"aesthetic=1, jpeg=0.05,{own}=-2") == {"aesthetic": 1, "jpeg": 0.05, own: -2}
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 200
    assert find_reward(own)(images, ["", ""]).tolist() == [0, 200]
    assert find_reward("statistics:mean") is sys.modules["statistics"].mean


@pytest.mark.parametrize("spec,named", [
    ("beauty", "beauty"), ("jpeg=much", "much"), ("jpeg=nan", "nan"), ("jpeg=0", "0"), ("none.py:red", "none.py"),
    ("no_such_module:f", "no_such_module"), ("statistics:nothing", "nothing"), ("{mine}:not_a_function", "not_a_function"),
    ("{mine}:blue", "blue"), ("{broken}:red", "SyntaxError"), ("", "unknown"), ("jpeg=1,jpeg=2", "twice")])
def test_a_reward_that_is_not_there_is_one_line(spec, named, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def red(:")
    with pytest.raises(InputError, match=named) as caught:
        parse_rewards(spec.format(mine=tmp_path / "mine.py", broken=tmp_path / "broken.py"))
    assert "\n" not in str(caught.value)


def test_the_scorer_keeps_the_order_and_weighs_the_sum():
    def slow_at_first(images, prompts):
        time.sleep(0.2 if images[0, 0, 0, 0] == 0 else 0)
        return images[:, 0, 0, 0]

    scorer = Scorer({"jpeg": 2.0, "vlm": -1.0}, {"jpeg": slow_at_first, "vlm": lambda images, prompts: [len(p) for p in prompts],
                                                 "incompressible": lambda images, prompts: np.ones(len(images))})
    assert scorer.pool._max_workers > 1
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(3, 3)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        scorer.add(images[part], ["x" * int(n) for n in images[part, 0, 0, 0]])
    total, scores = scorer.take()
    assert total.tolist() == [0, 1, 2, 3, 4, 5] == scores["vlm"].tolist() and scores["incompressible"].sum() == 6
    scorer.add(images[:1], [""])
    assert len(scorer.take()[0]) == 1


def test_a_reward_that_writes_into_its_pictures_changes_nobodys():
    def vandal(images, prompts):
        images[:] = 0
        return np.zeros(len(images))

    scorer = Scorer({"jpeg": 1.0}, {"jpeg": vandal, "watched": lambda images, prompts: images.max((1, 2, 3))})
    images = np.full((2, 4, 4, 3), 9, np.uint8)
    scorer.add(images, ["", ""])
    assert scorer.take()[1]["watched"].tolist() == [9, 9] and images.min() == 9


def test_a_reward_that_is_no_number_names_its_images():
    scorer = Scorer({"mine": 1.0}, {"mine": lambda images, prompts: [1, np.nan if "a fox" in prompts else 1]})
    for prompts in (["a cat", "a dog"], ["a cat", "a fox"]):
        scorer.add(np.zeros((2, 4, 4, 3), np.uint8), prompts)
    with pytest.raises(InputError, match=r"mine is nan for 1 of 2 images.*round: 3 \('a fox'\)"):
        scorer.take()


def test_scoring_beside_sampling_changes_nothing(tiny_file, tmp_path):
    """A sum of rewards logs each part; the parts are those of the pictures in order."""
    train.main(arguments(tiny_file, tmp_path / "sum", "--reward", "jpeg=2,incompressible=1", epochs=2))
    train.main(arguments(tiny_file, tmp_path / "one", epochs=2))
    for line, single in zip(metrics(tmp_path / "sum"), metrics(tmp_path / "one")):
        assert line["reward_mean"] == pytest.approx(2 * line["score_jpeg"] + line["score_incompressible"])
        assert line["reward_mean"] == pytest.approx(single["reward_mean"])


def test_a_reward_that_raises_ends_the_run_in_one_line_with_the_run_saved(tiny_file, tmp_path):
    (tmp_path / "mine.py").write_text("calls = []\ndef bad(images, prompts):\n    calls.append(1)\n"
                                      "    if len(calls) > 4: raise KeyError('lost\\nmore')\n    return [1.0] * len(images)\n")
    with pytest.raises(InputError, match="mine.py:bad failed on images 0 to 3 of the round.*KeyError") as caught:
        train.main(arguments(tiny_file, tmp_path / "run", "--reward", f"{tmp_path / 'mine.py'}:bad"))
    assert "\n" not in str(caught.value)
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "state.pt").exists()


# Prompt sets

def test_the_prompt_sets_are_the_papers():
    sizes = {name: len(make()) for name, make in PROMPT_SETS.items()}
    assert sizes == dict(animals=45, imagenet_animals=398, activities=135, counting=154, dpok=4)
    assert all(len(set(make())) == len(make()) for make in PROMPT_SETS.values())
    activities = find_prompts("activities")
    assert "an ant riding a bike" in activities and "a cat washing dishes" in activities
    assert find_prompts("imagenet_animals")[0] == "a tench" and "an axolotl" in find_prompts("imagenet_animals")
    assert find_prompts("counting")[0] == "two cats" and "eight wolves" in find_prompts("counting")


def test_evaluation_prompts_are_never_trained_on():
    trained = find_prompts("animals")[:40]
    assert evaluation_prompts("", trained) == trained
    assert evaluation_prompts("animals", trained) == find_prompts("animals")[40:]
    with pytest.raises(InputError, match="trained on"):
        evaluation_prompts("animals", find_prompts("animals"))


# The CLIP judges

def test_the_head_is_linear_layers_without_activation(tmp_path):
    torch.manual_seed(0)
    weights = [(torch.randn(3, 4), torch.randn(3)), (torch.randn(1, 3), torch.randn(1))]
    head = judges.AestheticHead(weights)
    z = torch.randn(5, 4)
    (w1, b1), (w2, b2) = weights
    assert torch.allclose(head(z), (z @ w1.T @ w2.T + (w2 @ b1 + b2))[:, 0], atol=1e-5)
    torch.save({"layers.0.weight": w1, "layers.0.bias": b1, "layers.2.weight": w2, "layers.2.bias": b2}, tmp_path / "h.pth")
    assert torch.equal(judges.load_head(tmp_path / "h.pth")(z), head(z))


def test_a_head_of_laions_shapes_is_read(tmp_path):
    """Names and shapes of sac+logos+ava1-l14-linearMSE.pth: the dropouts between take numbers, too."""
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    torch.manual_seed(0)
    for n, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        state.update({f"layers.{n}.weight": torch.randn(b, a) / a ** 0.5, f"layers.{n}.bias": torch.randn(b)})
    torch.save(state, tmp_path / judges.LAION_HEAD)
    x = z = torch.nn.functional.normalize(torch.randn(3, 768), dim=1)
    for n in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{n}.weight"].T + state[f"layers.{n}.bias"]
    assert torch.allclose(judges.load_head(tmp_path / judges.LAION_HEAD)(z), x[:, 0], atol=1e-5)


@pytest.mark.parametrize("shapes", [[(3, 4), (1, 2)], [(3, 4), (2, 3)], []])
def test_a_head_whose_layers_do_not_fit_is_refused(shapes, tmp_path):
    state = {}
    for n, shape in enumerate(shapes):
        state.update({f"layers.{n}.weight": torch.zeros(shape), f"layers.{n}.bias": torch.zeros(shape[0])})
    save_file(state or {"other": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(InputError, match="--aesthetic-head"):
        judges.load_head(tmp_path / "h.safetensors")


def test_a_head_for_another_clip_and_unknown_models_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "h.safetensors")
    for wrong, named in ((["--reward", "aesthetic", "--aesthetic-head", "h.safetensors"], "768"),
                         (["--reward", "clip", "--clip-model", "ViT-X"], "ViT-X"), (["--reward", "vlm"], "--vlm-model"),
                         (["--reward", "vlm", "--vlm-model", "m", "--vlm-reference", "x"], "--vlm-reference")):
        with pytest.raises(InputError, match=named):
            train.main(wrong)
    assert not (tmp_path / "runs").exists()


def test_the_laion_head_is_kept_only_with_its_checksum(tmp_path, monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return b"something else"

    monkeypatch.setattr(judges.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(judges.urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(InputError, match="sha256"):
        judges.laion_head_path()
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(judges, "LAION_SHA256", judges.hashlib.sha256(b"something else").hexdigest())
    assert judges.laion_head_path().read_bytes() == b"something else"


def test_the_small_clip_prefers_the_right_prompt():
    reward = find_reward("clip", Settings(), None, "cpu")
    images, captions, _, _ = world.render_many(123, 60, activities=False)
    right = reward(images, captions)
    assert right.shape == (60,) and np.abs(right).max() <= 1
    assert (right > reward(images, captions[7:] + captions[:7])).mean() > 0.9


def test_the_learned_aesthetic_follows_the_rule_behind_it():
    images = world.render_many(rater.RATER_SEED + 1, 300)[0]
    learned, rule = find_reward("aesthetic", Settings(), None, "cpu")(images, [""] * 300), rater.rule(images)
    assert np.corrcoef(learned, rule)[0, 1] > 0.5 and np.abs(learned - rule).mean() < 1.5


def test_two_rewards_look_with_one_clip(monkeypatch):
    made = []
    monkeypatch.setattr(judges, "ClipEye", lambda *given: (made.append(given), SimpleNamespace(name="a CLIP"))[1])
    judges.clip_eye.cache_clear()
    for name in ("clip", "aesthetic"):
        find_reward(name, Settings(), None, torch.device("cpu"))
    judges.clip_eye.cache_clear()
    assert len(made) == 1


def test_the_rule_of_the_rater_by_hand():
    flat = np.zeros((1, 32, 32, 3), np.uint8)
    assert rater.rule(flat).item() == pytest.approx(4.5)
    flat[..., 0], flat[..., 2] = 102, 51            # 0.4 red, 0.2 blue: warmth 0.2, saturation 0.4
    assert rater.rule(flat).item() == pytest.approx(4.5 + 1.2 + 1.6)
    middle = flat.copy()
    middle[:, 12:20, 12:20] = 255
    assert rater.rule(middle).item() < rater.rule(flat).item()     # less colour; the border stays quiet
    noisy = flat.copy()
    noisy[:, ::2] //= 2
    assert rater.rule(noisy).item() < rater.rule(flat).item() - 0.5


# BERTScore and the vision-language model

def test_bertscore_recall_by_hand():
    reference, candidate = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    assert vlm.bertscore_recall(reference, candidate) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert vlm.bertscore_recall(candidate, reference[:1]) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert vlm.bertscore_recall(reference[:1], candidate) == pytest.approx(1)
    assert vlm.bertscore_recall(reference, candidate, torch.tensor([3.0, 1.0])) == pytest.approx((3 + math.sqrt(0.5)) / 4)
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
    (tokens, states), (other, _) = vlm.TextEmbedder(model.text_encoder)(["a fox", "a fox runs"])
    assert len(tokens) == len(states) == 2 and other[:2] == tokens and len(other) == 3
    context = model.encode_prompts(["a fox"])[0]
    assert torch.allclose(states, context[1:3], atol=1e-6)


class Server:
    """A little chat server: answers[k] is what the k-th request gets, an int being an HTTP status."""

    def __init__(self, answers):
        self.requests, self.answers = [], answers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body))
                answer = server.answers(len(server.requests) - 1, body)
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                if not isinstance(answer, int):
                    self.wfile.write(json.dumps(dict(choices=[dict(message=dict(content=answer))])).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def picture_in(body):
    import base64
    import io
    from PIL import Image
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_the_server_sees_the_picture_and_the_question_and_answers_keep_their_order():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[:, ..., 1] = np.arange(6)[:, None, None] * 10
    with Server(lambda k, body: str(picture_in(body)[0, 0, 1] // 10)) as server:
        chat = vlm.ChatModel(server.url + "/", "eye", "What?", 5, 0, 4)
        assert chat.describe_all(images) == ["0", "1", "2", "3", "4", "5"]
        path, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "eye"
    assert body["messages"][0]["content"][0] == dict(type="text", text="What?")


def test_a_busy_server_is_asked_again_and_a_wrong_request_is_not():
    image = np.zeros((8, 8, 3), np.uint8)
    with Server(lambda k, body: 503 if k < 2 else "a cat") as server:
        assert vlm.ChatModel(server.url, "m", "?", 5, 3, 1, pause=0.01).describe(image) == "a cat"
        assert len(server.requests) == 3
    with Server(lambda k, body: 404) as server:
        with pytest.raises(InputError, match="404"):
            vlm.ChatModel(server.url, "m", "?", 5, 3, 1, pause=0.01).describe(image)
        assert len(server.requests) == 1
    with pytest.raises(InputError, match="no answer in 3 tries"):
        vlm.ChatModel("http://127.0.0.1:9/v1", "m", "?", 5, 2, 1, pause=0.01).describe(image)


def test_once_a_request_has_failed_for_good_the_others_end_too():
    """A server that hangs costs one request's patience, not everybody's."""
    answers = []
    with Server(lambda k, body: 404 if k == 0 else answers.append(k) or 503) as server:
        chat = vlm.ChatModel(server.url, "m", "?", 5, 10, 1, pause=5)
        begin = time.time()
        for _ in range(3):
            with pytest.raises(InputError, match="no answer"):
                chat.describe(np.zeros((8, 8, 3), np.uint8))
        assert len(server.requests) == 1 and time.time() - begin < 5


@pytest.mark.parametrize("idf", ["off", "on"])
def test_the_alignment_reward_prefers_the_description_that_says_the_prompt(tiny_file, idf):
    model = load_stable_diffusion(tiny_file)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] = 255
    with Server(lambda k, body: "The image contains a fox" if picture_in(body).max() else "seven houses") as server:
        settings = Settings(vlm_url=server.url, vlm_model="m", vlm_idf=idf)
        got = vlm.alignment(settings, model, "cpu")(images, ["a fox", "a fox"])
    assert got[1] == pytest.approx(1, abs=1e-5) and got[0] < 0.99


def test_a_server_that_goes_away_ends_the_run_with_the_run_saved(tiny_file, tmp_path):
    with Server(lambda k, body: "a cat" if k < 5 + 8 + 3 else 400) as server:
        with pytest.raises(InputError, match="--vlm-url"):
            train.main(arguments(tiny_file, tmp_path / "run", "--reward", "vlm", "--vlm-url", server.url, "--vlm-model", "m",
                                 "--vlm-parallel", "1"))
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "state.pt").exists()

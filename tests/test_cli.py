"""The command line and the checks: help, presets, refusals, resuming, and settings written as a command."""
import json
import random
import re
import shlex
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from safetensors.torch import save_file

from ddpo_min import __version__, cli
from ddpo_min.cli import ON_RESUME, check_settings, command, describe, make_parser, make_settings, read_settings
from ddpo_min.files import InputError, run_script
from ddpo_min.folder import sha256
from ddpo_min.settings import PRESETS, Settings
from ddpo_min.weights import SHIPPED

NAMES = [field.name for field in fields(Settings)]
LARGE = "v1-5.safetensors"      # is not there: counts as large, and no setting's check reads it


@pytest.fixture
def head(tmp_path):
    """An aesthetic head as wide as OpenAI's CLIP ViT-L/14, so that none need be fetched."""
    save_file({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    return str(tmp_path / "head.safetensors")


def one_line(capsys, arguments):
    """What is said of a command line that cannot be parsed, or whose settings cannot work."""
    try:
        check_settings(read_settings(arguments))        # as train() does: the reward is looked up there
    except InputError as error:
        message = str(error)
    except SystemExit as stop:
        out = capsys.readouterr()
        assert stop.code == 2 and not out.out
        message = out.err.removeprefix("error: ").removesuffix("\n")
    assert "\n" not in message
    return message


# Fields, help and groups

def test_every_setting_is_explained_in_exactly_one_section():
    listed = [name for texts in cli.sections().values() for name in texts]
    assert listed == NAMES
    assert all(len(text) > 5 for texts in cli.sections().values() for text in texts.values())
    assert list(cli.sections()) == ["Most often changed", "What is trained", "Sampling", "Learning", "Optimizer",
                                    "Normalisation of the reward", "Evaluation", "Reward models", "Run and device"]
    assert list(cli.sections()["Most often changed"]) == ["reward", "prompts", "weights", "epochs", "lr", "out"]


@pytest.mark.parametrize("columns, widest", [("200", 100), ("80", 80)])
def test_the_help_lists_every_flag_once_under_its_title_and_fits(monkeypatch, columns, widest):
    monkeypatch.setenv("COLUMNS", columns)
    text = make_parser().format_help()
    options = text[:text.index("examples:")]
    assert max(map(len, options.splitlines())) <= widest
    found, title = {}, None
    for line in options.splitlines():
        if line and line[0] != " " and line.endswith(":"):
            title = line[:-1]
        elif line.startswith("  -"):
            found.setdefault(title, []).append(re.match(r"  (?:-h, )?--([\w-]+)", line)[1].replace("-", "_"))
    expected = {title: list(texts) for title, texts in cli.sections().items()}
    expected["Run and device"].append("help")
    assert found == expected and list(found) == list(expected)
    assert "--lr FLOAT" in text and "--epochs INT" in text and "--reward TEXT" in text
    assert "--compile, --no-compile" in text and "==SUPPRESS==" not in text


def test_a_flags_text_is_its_comment_and_its_default():
    texts = {action.dest: action.help for action in make_parser()._actions}
    assert texts["samples"] == "pictures sampled an epoch [256] (default: 256)"
    assert texts["guidance_in_training"].endswith("(default: on)") and texts["compile"].endswith("(default: off)")
    assert texts["vlm_model"] == "name of the vision-language model on that server [LLaVA]"


def test_the_examples_of_the_help_are_command_lines():
    parser = make_parser()
    lines = [line.strip() for line in parser.epilog.splitlines() if line.startswith("  python")]
    given = [vars(parser.parse_args(shlex.split(line)[2:])) for line in lines]
    assert given == [dict(reward="jpeg"),
                     dict(weights="stable-diffusion-v1-5/stable-diffusion-v1-5", reward="jpeg", batch=0),
                     dict(resume="runs/jpeg", epochs=12)]


def test_help_ends_well(capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            read_settings([flag])
        assert stop.value.code == 0 and "Most often changed:" in capsys.readouterr().out


def test_part_takes_the_prefix_away():
    s = Settings(vlm_model="m", vlm_idf=True)
    assert s.part("vlm_") == dict(url="http://localhost:8000/v1", model="m", question=s.vlm_question,
                                  reference="{prompt}", encoder="", idf=True, parallel=8,
                                  timeout=60.0, retries=4, api_key_env="OPENAI_API_KEY")
    assert s.part("eval_") == dict(samples=180, prompts="", every=0)


# Values

def test_flags_and_keywords_give_the_same_settings():
    flags = ["--clip-range", "1e-4", "--epochs", "3", "--compile", "--no-guidance-in-training", "--batch", "auto"]
    s = read_settings(flags)
    assert s == make_settings(clip_range=1e-4, epochs=3, compile=True, guidance_in_training=False, batch=0)
    assert s == replace(Settings(preset="laptop"), clip_range=1e-4, epochs=3, compile=True, batch=0,
                        guidance_in_training=False)


def test_without_flags_the_settings_are_the_defaults_to_the_last_one():
    assert read_settings([]) == Settings(preset="laptop") == make_settings()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.type is bool])
def test_switches_go_on_and_off(name, tmp_path):
    flag, out = name.replace("_", "-"), ["--out", str(tmp_path / "run"), "--group-size", "2"]
    out += ["--algorithm", "awm"] * (name == "grid_timesteps")
    assert getattr(read_settings([*out, f"--{flag}"]), name) is True
    assert getattr(read_settings([*out, f"--no-{flag}"]), name) is False
    assert getattr(read_settings([*out, f"--{flag}", f"--no-{flag}"]), name) is False


def test_a_path_will_do_for_text_and_a_whole_number_for_a_float(tiny_file):
    s = make_settings(weights=tiny_file, guidance=2)
    assert s.weights == str(tiny_file) and s.guidance == 2.0


def test_batch_is_a_number_or_auto(capsys):
    assert read_settings(["--batch", "auto"]).batch == 0 and read_settings(["--batch", "16"]).batch == 16
    assert one_line(capsys, ["--batch", "many"]).startswith("argument --batch: 'many' is neither a number nor auto")
    assert one_line(capsys, ["--batch", "-1"]) == "--batch -1: expected 0 or more"


# Presets

@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_has_its_values(preset, head):
    more = {"sd_lora_aesthetic": dict(aesthetic_head=head), "sd_lora_alignment": dict(vlm_model="m")}.get(preset, {})
    s = make_settings(preset=preset, weights=LARGE, **more)
    assert vars(s) == {**vars(Settings()), **PRESETS[preset], **more, "preset": preset, "weights": LARGE}


def test_the_preset_goes_by_the_size_of_the_model_and_by_the_algorithm(tiny_file):
    assert make_settings(weights=str(tiny_file)).preset == make_settings().preset == "laptop"
    assert make_settings(weights=str(SHIPPED)).preset == "laptop"
    assert make_settings(weights=LARGE).preset == "sd_lora"
    assert make_settings(weights=LARGE, algorithm="rwr", normalise="epoch").preset == "sd_lora"
    assert make_settings(weights=LARGE, algorithm="nft").preset == "sd_lora_nft"
    s = make_settings(algorithm="rwr_sparse")
    assert (s.preset, s.percentile, s.steps) == ("laptop_rwr_sparse", 0.7, 16)
    s = make_settings(algorithm="ddpo_sf")
    assert (s.preset, s.updates, s.lr) == ("laptop_ddpo_sf", 1, 3e-3)


def test_what_is_given_wins_over_the_preset():
    assert make_settings(preset="laptop_rwr", steps=5, inner_epochs=2).steps == 5
    assert make_settings(preset="sd_lora", weights=LARGE, guidance=1.0).guidance == 1.0


def test_an_algorithm_on_top_of_anothers_preset_brings_what_it_needs():
    assert make_settings(preset="laptop", algorithm="ddpo_sf").updates == 1
    assert make_settings(preset="laptop", algorithm="rwr").inner_epochs == 4
    assert make_settings(preset="laptop", algorithm="ram").kl_weight == 0.01
    assert make_settings(preset="laptop_rwr", algorithm="rwr").steps == 16
    for more in (*(dict(algorithm=name) for name in ("ddpo_sf", "awm", "nft", "ram", "rwr", "rwr_sparse")),
                 dict(trainable="full")):       # laptop_fast is DDPO's with a LoRA
        s = make_settings(preset="laptop_fast", **more)
        check_settings(s)
        assert s.noise_steps == 4 and s.same_start
        assert s.kl_weight == {"ddpo_sf": 0.1, "ram": 0.01}.get(s.algorithm, 0.0)


def test_a_unit_of_reward_is_worth_what_the_reward_says_but_on_the_laptop_alone():
    assert make_settings(algorithm="rwr").inverse_temperature == 5.0
    assert make_settings(algorithm="rwr", reward="clip").inverse_temperature == 60.0
    assert make_settings(algorithm="rwr", reward="aesthetic").inverse_temperature == 2.0
    assert make_settings(algorithm="rwr", reward="clip", inverse_temperature=1.0).inverse_temperature == 1.0
    assert make_settings(weights=LARGE, reward="clip").inverse_temperature == 0.2


def test_full_training_and_lora_have_learning_rates_of_their_own():
    assert make_settings(trainable="full").lr == 3e-5 and make_settings().lr == 3e-3
    assert make_settings(trainable="full", lr=0.5).lr == 0.5
    s = make_settings(trainable="full", weights=LARGE)
    assert (s.lr, s.dtype) == (1e-5, "float32")
    assert make_settings(preset="paper_ddpo_is", weights=LARGE).lr == 1e-5
    assert make_settings(preset="paper_ddpo_is", trainable="lora", weights=LARGE).lr == 3e-4


def test_the_list_of_presets_names_every_one(capsys):
    with pytest.raises(SystemExit) as stop:
        read_settings(["--preset", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[0].split(maxsplit=1)[1] == "the defaults of --help"
    assert "lr=1e-05" in lines[-1] and "updates=80" in lines[-1] and "algorithm=rwr_sparse" in lines[-1]


# Refusals

@pytest.mark.parametrize("wrong, message", [
    ("--colour red", "--colour: no such flag"),
    ("--epoch 3", "--epoch: no such flag; the nearest is --epochs"),
    ("--inner_epochs 3", "--inner_epochs: no such flag; the nearest is --inner-epochs"),
    ("-lr 3", "-lr: no such flag; the nearest is --lr"), ("--l 3", "--l: no such flag; the nearest is --lr"),
    ("--rewards jpeg", "--rewards: no such flag; the nearest is --reward"),
    ("--compil", "--compil: no such flag; the nearest is --compile"),
    ("--guidence=3", "--guidence: no such flag; the nearest is --guidance"),
    ("jpeg", "jpeg: a value without a flag before it"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--epochs 2.5", "argument --epochs: invalid int value: '2.5'"),
    ("--epochs", "argument --epochs: expected one argument"),
    ("--compile on", "--compile on: it is a switch now, without a value; write --compile or --no-compile"),
    ("--epochs 3 --checkpointing off --seed 1", "--checkpointing off: it is a switch now, without a value; write "
     "--checkpointing or --no-checkpointing"),
    ("--no-compile=on", "--no-compile on: it is a switch now, without a value; write --compile or --no-compile"),
    ("--guidance-in-training maybe", "--guidance-in-training maybe: it is a switch now"),
    ("--vlm-idf=", "--vlm-idf : it is a switch now"),
])
def test_command_lines_that_cannot_be_parsed_are_one_line(wrong, message, capsys):
    said = one_line(capsys, shlex.split(wrong))
    assert said.startswith(message) and said.endswith("; see --help")
    if "nearest" not in message:
        assert "nearest" not in said


@pytest.mark.parametrize("wrong, message", [
    # each setting by itself
    ("--preset huge", "--preset huge: unknown; expected list, or one of laptop, "),
    ("--algorithm grpo", "--algorithm grpo: unknown; expected one of ddpo_is, ddpo_sf, awm, nft, ram, rwr,"),
    ("--trainable half", "--trainable half: unknown; expected one of lora, full"),
    ("--normalise round", "--normalise round: unknown; expected one of prompt, group, epoch"),
    ("--step-weights odd", "--step-weights odd: unknown; expected one of even, paper"),
    ("--device tpu", "--device tpu: unknown; expected one of auto, cpu, cuda, mps"),
    ("--dtype float64", "--dtype float64: unknown; expected one of float32, bfloat16, float16"),
    ("--epochs 0", "--epochs 0: expected 1 or more"), ("--vlm-parallel 0", "--vlm-parallel 0: expected 1 or more"),
    ("--steps 501", "--steps 501: expected 1 to 500"), ("--steps 0", "--steps 0: expected 1 to 500"),
    ("--eta 0", "--eta 0.0: expected a number above 0 and up to 1"),
    ("--timestep-fraction 1.5", "--timestep-fraction 1.5: expected a number above 0 and up to 1"),
    ("--lr=-1", "--lr -1.0: expected a number above 0"), ("--lr nan", "--lr nan: expected a number above 0"),
    ("--lr inf", "--lr inf: expected a number above 0"),
    ("--beta1 1", "--beta1 1.0: expected a number from 0 to below 1"),
    ("--percentile 1", "--percentile 1.0: expected a number between 0 and 1"),
    ("--kl-weight=-0.1", "--kl-weight -0.1: expected 0 or more"), ("--seed -1", "--seed -1: expected 0 to 2^64 - 1"),
    (f"--seed {2 ** 64}", f"--seed {2 ** 64}: expected 0 to 2^64 - 1"),
    # sizes of minibatches, groups, buffers and windows
    ("--samples 10 --updates 4", "--samples 10: not divisible by --updates 4"),
    ("--group-size 3", "--group-size 3: 64 samples a minibatch are no whole groups"),
    ("--group-size 128", "--group-size 128: 64 samples a minibatch are no whole groups"),
    ("--prompt-minimum 40", "--prompt-minimum 40: above --prompt-buffer 16"),
    ("--first-step 5 --last-step 2", "--first-step 5 --last-step 2: no window of the 8 steps"),
    ("--last-step 9", "--first-step 1 --last-step 9: no window of the 8 steps"),
    ("--last-step -1", "--first-step 1 --last-step -1: no window of the 8 steps"),
    ("--noise-steps 9", "--noise-steps 9: more than the 8 denoising steps"),
    ("--noise-steps=-1", "--noise-steps -1: expected 0 or more"),
    ("--noise-steps 4 --last-step 5", "--first-step 1 --last-step 5: no window of the 4 steps that "
     "--noise-steps 4 leaves"),
    ("--noise-steps 4 --first-step 5", "--first-step 5 --last-step 0: no window of the 4 steps that "
     "--noise-steps 4 leaves"),
    ("--same-start", "--same-start: needs --group-size 2 or more, the samples that begin from one x_T"),
    ("--algorithm awm --same-start --group-size 4 --eta 0", "--eta 0: draws without noise; --same-start and"),
    ("--algorithm rwr --noise-steps 4 --eta 0", "--eta 0: draws without noise; --same-start and --noise-steps need"),
    # combinations
    ("--algorithm rwr --timestep-fraction 0.5", "--first-step, --last-step, --timestep-fraction: choose among "
     "denoising steps, which the ddpo algorithms train on and rwr does not"),
    ("--algorithm rwr --last-step 3", "--first-step, --last-step, --timestep-fraction: choose"),
    ("--algorithm awm --timestep-fraction 0.5", "--first-step, --last-step, --timestep-fraction: choose among "
     "denoising steps, which the ddpo algorithms train on and awm does not"),
    ("--algorithm nft --first-step 2", "--first-step, --last-step, --timestep-fraction: choose"),
    ("--normalise group", "--normalise group: needs --group-size 2 or more, and an algorithm with advantages, not rwr"),
    ("--normalise group --group-size 4 --algorithm rwr", "--normalise group: needs --group-size 2 or more, and an "),
    ("--algorithm ddpo_sf --eta 0", "--eta 0.0: expected a number above 0 and up to 1, because ddpo_sf needs the"),
    ("--eta 1.5 --algorithm awm", "--eta 1.5: expected a number from 0 to 1"),
    ("--policy-ema 0.5", "--policy-ema: for --algorithm awm or nft or ram, ddpo_is does not use it; drop it"),
    ("--kl-old 1 --algorithm rwr", "--kl-old: for --algorithm awm or nft or ram, rwr does not use it; drop it"),
    ("--timesteps 6", "--timesteps: for --algorithm awm or nft or ram, ddpo_is does not"),
    ("--grid-timesteps --algorithm rwr_sparse", "--grid-timesteps: for --algorithm awm or nft or ram, rwr_sparse does"),
    ("--nft-beta 0.1 --algorithm awm", "--nft-beta: for --algorithm nft, awm does not use it"),
    ("--awm-power 0.25 --algorithm nft", "--awm-power: for --algorithm awm, nft does not use it"),
    ("--clip-range 0.1 --algorithm ddpo_sf", "--clip-range: for --algorithm ddpo_is or awm, ddpo_sf does not use it"),
    ("--inverse-temperature 1 --algorithm rwr_sparse", "--inverse-temperature: for --algorithm rwr, rwr_sparse does"),
    ("--percentile 0.5 --algorithm rwr", "--percentile: for --algorithm rwr_sparse, rwr does not use it"),
    ("--preset laptop_awm --algorithm ram", "--preset laptop_awm: for --algorithm awm, not for ram; drop one of them"),
    ("--preset laptop_rwr --algorithm ddpo_is", "--preset laptop_rwr: for --algorithm rwr, not for ddpo_is"),
    ("--policy-ema 1 --algorithm nft", "--policy-ema 1.0: expected a number from 0 to below 1"),
    ("--timesteps 0 --algorithm awm", "--timesteps 0: expected 1 or more"),
    ("--awm-power 0 --algorithm awm", "--awm-power 0.0: expected a number above 0 and up to 1"),
    ("--nft-beta 0 --algorithm nft", "--nft-beta 0.0: expected a number above 0"),
    ("--algorithm ram --kl-weight 0", "--algorithm ram: its loss is a pull to the base model, --kl-weight, which must"),
    ("--algorithm ram --trainable full", "--kl-weight: needs --trainable lora, whose base model"),
    ("--algorithm ddpo_sf --updates 4", "--algorithm ddpo_sf: REINFORCE uses its samples once"),
    ("--algorithm ddpo_sf --inner-epochs 2", "--algorithm ddpo_sf: REINFORCE uses its samples once"),
    ("--trainable full --dtype bfloat16", "--trainable full --dtype bfloat16: the trained weights must be float32"),
    ("--trainable full --init-lora a.safetensors", "--init-lora: needs --trainable lora; to train the whole UNet"),
    ("--init-lora a.safetensors --rank 8", "--rank: follows from the file with --init-lora; drop it"),
    ("--kl-weight 0.1 --trainable full", "--kl-weight: needs --trainable lora"),
    ("--kl-weight 0.1 --algorithm rwr", "--kl-weight: needs --trainable lora"),
    ("--preset paper_rwr", "--preset paper_rwr: made for Stable Diffusion's size; give such a file with --weights"),
    # prompts
    ("--prompts nowhere.txt", "--prompts nowhere.txt: neither a prompt set"),
    ("--eval-prompts nowhere.txt", "--eval-prompts nowhere.txt: neither a prompt set"),
    ("--eval-prompts animals", "--eval-prompts animals: all of these prompts are trained on"),
    ("--algorithm rwr --prompts activities", "--algorithm rwr: 256 samples are fewer than 4 for each of 135 prompts, "
     "too few to compare; take more --samples, or --normalise epoch"),
    # rewards
    ("--reward ''", "--reward: empty"), ("--reward beauty", "--reward beauty: unknown"),
    ("--reward jpeg=0", "--reward jpeg=0: weight"), ("--reward jpeg,", "--reward jpeg,: a part without a name"),
    ("--reward jpeg=much", "--reward jpeg=much: 'much' is not a number"),
    ("--reward nowhere.py:red", "--reward nowhere.py:red: no file nowhere.py"),
    ("--watch jpeg=2", "--watch jpeg=2: weights have no meaning there"), ("--watch beauty", "--watch beauty: unknown"),
    ("--reward vlm", "--reward vlm: needs --vlm-model"),
    ("--reward vlm --vlm-model m --vlm-url host", "--vlm-url: not understood; expected http://HOST"),
    ("--reward clip --clip-model none", "--clip-model none: unknown to open_clip"),
    ("--reward aesthetic --aesthetic-head nowhere.pth", "--aesthetic-head nowhere.pth: no such file"),
    # runs
    ("--resume nowhere", "--resume nowhere: not the folder of a run"),
])
def test_settings_that_cannot_work_are_refused_in_one_line(wrong, message, capsys):
    assert one_line(capsys, shlex.split(wrong)).startswith(message)


@pytest.mark.parametrize("nearly", [
    "--steps 500", "--eta 1", "--timestep-fraction 1", "--beta1 0", "--group-size 64", "--prompt-minimum 16",
    "--first-step 8", "--last-step 8", "--algorithm ddpo_sf --updates 1", "--normalise group --group-size 2",
    "--algorithm rwr --prompts activities --normalise epoch", "--algorithm rwr --prompts activities --samples 540",
    "--algorithm rwr --prompts activities --group-size 4", "--kl-weight 0.1", "--init-lora a.safetensors",
    "--trainable full", "--eval-prompts activities", "--watch jpeg,clip", "--reward vlm --vlm-model m",
    "--eval-every 0", "--seed 0 --batch 0 --vlm-retries 0 --kl-weight 0", "--algorithm awm --eta 0 --policy-ema 0.9",
    "--algorithm rwr --eta 0", "--algorithm nft --normalise group --group-size 2", "--algorithm ram --kl-weight 0.001",
    "--algorithm awm --trainable full --kl-old 1 --timesteps 1", "--algorithm nft --trainable full --nft-beta 0.1"])
def test_what_is_just_allowed_is_not_refused(nearly):
    given = shlex.split(nearly)
    s = read_settings(given)
    for name, value in zip(given[::2], given[1::2]):
        kept = getattr(s, name[2:].replace("-", "_"))
        assert kept == type(kept)(value)


@pytest.mark.parametrize("given, message", [
    (dict(rewards="jpeg"), "rewards: no such setting; the nearest is reward"),
    (dict(lr="1e-4"), "--lr '1e-4': expected a number"), (dict(epochs=3.0), "--epochs 3.0: expected a whole number"),
    (dict(epochs=True), "--epochs True: expected a whole number"), (dict(lr=True), "--lr True: expected a number"),
    (dict(compile="on"), "--compile 'on': expected True or False"),
    (dict(compile=1), "--compile 1: expected True or False"),
    (dict(weights=None), "--weights None: expected text"), (dict(reward=["jpeg"]), "--reward ['jpeg']: expected text"),
])
def test_keywords_of_another_name_or_type_are_refused(given, message):
    with pytest.raises(InputError) as caught:
        make_settings(**given)
    assert str(caught.value).startswith(message)


def test_a_reward_of_ones_own_needs_no_name_but_all_else_is_checked():
    s = replace(Settings(preset="laptop"), reward="what I like")
    with pytest.raises(InputError, match="--reward what I like"):
        check_settings(s)
    check_settings(s, own_reward=True)
    check_settings(replace(s, reward=""), own_reward=True)
    with pytest.raises(InputError, match="--watch beauty"):
        check_settings(replace(s, watch="beauty"), own_reward=True)
    with pytest.raises(InputError, match="--epochs 0"):
        check_settings(replace(s, epochs=0), own_reward=True)
    with pytest.raises(InputError, match="--lr 'fast'"):
        check_settings(replace(s, lr="fast"), own_reward=True)


def test_the_rewards_are_checked_with_what_they_will_be_made_from(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "check_rewards", lambda *args, **named: asked.append((args, named)))
    s = make_settings(reward="clip", watch="vlm", clip_model="RN50", clip_weights="cc12m", aesthetic_head="h.pth",
                      hps_weights="h.pt")
    check_settings(replace(s, weights=LARGE))
    named = dict(clip=dict(model="RN50", weights="cc12m", head="h.pth"), vlm=s.part("vlm_"),
                 files=dict(hps="h.pt", pickscore=""))
    assert asked == [(("", "vlm"), dict(small=True, **named)), (("clip", "vlm"), dict(small=False, **named))]


# Resuming

def run_folder(folder, version=__version__, files=("lora.safetensors",), **saved):
    """The folder of a run as far as resuming settings needs it; returns its name."""
    folder.mkdir()
    config = {**asdict(make_settings(epochs=4, steps=3)), **saved}
    marks = dict(sha256=sha256(config), **({"version": version} if version else {}))
    (folder / "config.json").write_text(json.dumps({**config, **marks}))
    for name in ("state.pt", *files):
        (folder / name).touch()
    return str(folder)


def test_a_resumed_run_keeps_its_settings_but_for_what_may_change(tmp_path):
    folder = run_folder(tmp_path / "run", compile=True, reward="jpeg=2,clip=1", normalise="epoch", out="elsewhere")
    s = read_settings(["--resume", folder])
    kept = make_settings(epochs=4, steps=3, compile=True, reward="jpeg=2,clip=1", normalise="epoch")
    assert s == replace(kept, out=folder, resume=folder)
    given = ["--epochs", "9", "--device", "cpu", "--batch", "auto", "--checkpointing", "--no-compile"]
    changed = read_settings(["--resume", folder, *given])
    assert changed == replace(s, epochs=9, device="cpu", batch=0, checkpointing=True, compile=False)
    assert changed == make_settings(resume=folder, epochs=9, device="cpu", batch=0, checkpointing=True, compile=False)


@pytest.mark.parametrize("name", sorted(set(NAMES) - ON_RESUME - {"resume"}))
def test_no_other_setting_may_change_on_resuming(tmp_path, name):
    folder = run_folder(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        make_settings(resume=folder, **{name: getattr(Settings(), name)})
    assert str(caught.value) == (f"--resume goes on with the run's own settings; drop --{name.replace('_', '-')} (only "
                                 "--batch, --checkpointing, --compile, --device, --epochs, --eval-every, "
                                 "--keep-every, --stop-when, --vlm-url, --watch may change)")


def test_the_changes_of_a_resumed_run_are_checked(tmp_path):
    with pytest.raises(InputError, match="--epochs 0: expected 1 or more"):
        read_settings(["--resume", run_folder(tmp_path / "run"), "--epochs", "0"])


def test_a_resumed_run_can_be_given_a_bound_and_the_evaluations_that_it_needs(tmp_path):
    folder = run_folder(tmp_path / "run")
    bounded = ["--resume", folder, "--stop-when", "jpeg<-9"]
    with pytest.raises(InputError, match="evaluations between epochs; add --eval-every 1, or another"):
        check_settings(read_settings(bounded))
    check_settings(read_settings([*bounded, "--eval-every", "2"]))


def test_a_rank_is_refused_beside_a_lora_to_start_from_but_not_where_a_run_wrote_it_down(tmp_path):
    folder = run_folder(tmp_path / "run", init_lora="a.safetensors", rank=4)
    assert read_settings(["--resume", folder]).init_lora == "a.safetensors"
    assert make_settings(init_lora="", rank=8).rank == 8


@pytest.mark.parametrize("text, message", [
    ("{", "not the JSON of a run's settings"), ("[1, 2]", "not the JSON of a run's settings"),
    (json.dumps(dict(version=__version__, colour="red")), "colour: no such setting"),
    (json.dumps(dict(version=__version__, lr="fast")), "--lr 'fast': expected a number"),
    (json.dumps(dict(version=__version__, compile="on")), "--compile 'on': expected True or False"),
])
def test_a_damaged_config_is_named(tmp_path, text, message):
    folder = run_folder(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_settings(["--resume", folder])
    assert str(caught.value).startswith(f"{folder}/config.json: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "state.pt"])
def test_a_folder_without_either_file_is_no_run(tmp_path, missing):
    folder = run_folder(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(InputError, match="not the folder of a run"):
        read_settings(["--resume", folder])


def neighbour(major=0, minor=0, patch=0):
    """This version, counted up."""
    return ".".join(str(int(a) + b) for a, b in zip(__version__.split("."), (major, minor, patch)))


@pytest.mark.parametrize("version, words", [(None, "an older version"), ("0.1.9", "version 0.1.9"),
                                            (neighbour(minor=1), f"version {neighbour(minor=1)}"),
                                            (neighbour(minor=18), f"version {neighbour(minor=18)}"),
                                            (neighbour(major=1), f"version {neighbour(major=1)}"), (7, "version 7")])
def test_a_run_of_another_version_is_not_resumed(tmp_path, version, words):
    """The settings of older runs had other names and values, which must not be what is complained of."""
    folder = run_folder(tmp_path / "run", version, compile="off", normalise="round")
    with pytest.raises(InputError) as caught:
        read_settings(["--resume", folder])
    assert str(caught.value) == (
        f"--resume {folder}: written by {words} of ddpo_min, this is {__version__}; start a new run, or go on from "
        f"what it learned with --init-lora {folder}/lora.safetensors")


def test_what_to_do_with_another_versions_run_goes_by_what_it_left(tmp_path):
    with pytest.raises(InputError, match="start a new run$"):
        make_settings(resume=run_folder(tmp_path / "nothing", "0.1", files=()))
    with pytest.raises(InputError, match="with --weights .*/whole/model.safetensors$"):
        make_settings(resume=run_folder(tmp_path / "whole", "0.1", files=("model.safetensors",)))


def test_a_patch_of_the_same_version_resumes(tmp_path):
    assert read_settings(["--resume", run_folder(tmp_path / "run", neighbour(patch=3))]).steps == 3


# Settings as text

@pytest.mark.parametrize("given, written", [
    (dict(), ""), (dict(epochs=12), "--epochs 12"), (dict(out="somewhere", seed=1), "--seed 1"),
    (dict(reward="clip", algorithm="rwr"), "--algorithm rwr"),
    (dict(preset="laptop_rwr"), "--algorithm rwr"),
    (dict(preset="laptop", algorithm="rwr"), "--preset laptop --algorithm rwr"),
    (dict(trainable="full"), "--trainable full"), (dict(trainable="full", lr=3e-3), "--lr 0.003 --trainable full"),
    (dict(weights=LARGE), f"--weights {LARGE}"), (dict(weights=LARGE, preset="sd_lora"), f"--weights {LARGE}"),
    (dict(weights=LARGE, preset="laptop"), f"--weights {LARGE} --preset laptop"),
    (dict(weights=LARGE, preset="paper_ddpo_sf"), f"--weights {LARGE} --preset paper_ddpo_sf"),
    (dict(weights=LARGE, preset="paper_ddpo_is", trainable="lora"), f"--weights {LARGE} --preset paper_ddpo_is "
     "--trainable lora"),
    (dict(compile=True, guidance_in_training=False), "--no-guidance-in-training --compile"),
    (dict(vlm_question="what's this?"), """--vlm-question 'what'"'"'s this?'"""),
    (dict(vlm_question="-v"), "--vlm-question=-v"), (dict(vlm_question=""), "--vlm-question ''"),
])
def test_the_command_is_as_short_as_it_can_be(given, written):
    reward = given.get("reward", "jpeg")
    s = make_settings(**given)
    assert command(s) == f"python train.py --reward {reward} {written}".strip()
    assert read_settings(shlex.split(command(s))[2:]) == replace(s, out="")


def test_any_settings_are_read_back_from_their_command(tmp_path, tiny_file):
    """Random choices of values; those that cannot work together are drawn again."""
    (tmp_path / "my words.txt").write_text("a cat\na dog\n")
    needy = ("sd_lora_aesthetic", "sd_lora_alignment")      # these want a file fetched and a server's model named
    values = dict(
        reward=["jpeg", "clip", "jpeg=1,clip=-0.5"], prompts=["activities", str(tmp_path / "my words.txt")],
        weights=[str(tiny_file), LARGE], preset=[name for name in PRESETS if name not in needy],
        algorithm=["ddpo_is", "ddpo_sf", "awm", "nft", "ram", "rwr", "rwr_sparse"], trainable=["lora", "full"],
        epochs=[1, 77], lr=[1e-4, 1 / 3, 3e-05], samples=[64, 512], updates=[1, 2], inner_epochs=[1, 2], batch=[0, 3],
        beta2=[0.0], policy_ema=[0.5], ema=[0.9], grid_timesteps=[True, False],
        guidance=[1.0, 7.25], guidance_in_training=[True, False], normalise=["prompt", "group", "epoch"],
        group_size=[1, 4], dtype=["float32", "bfloat16"], compile=[True, False], vlm_idf=[True, False], rank=[2, 4],
        vlm_question=["", "--what?", "a 'quoted' \"one\"\nof two lines", "$HOME `x` 100%"], kl_weight=[0.0, 0.5],
        init_lora=["a b.safetensors"], out=["x"], watch=["clip,jpeg"], clip_weights=["w"])
    rng, done = random.Random(0), 0
    while done < 80:
        given = {name: rng.choice(values[name]) for name in rng.sample(sorted(values), rng.randint(0, 9))}
        try:
            s = make_settings(**given)
        except InputError:
            continue
        again = read_settings(shlex.split(command(s))[2:])
        assert again == replace(s, out=""), given
        done += 1
        words = shlex.split(command(s))[4:]
        starts = [i for i, word in enumerate(words) if word.startswith("--") and " " not in word and word != "--what?"]
        for first, last in zip(starts, [*starts[1:], len(words)]):      # no flag is superfluous
            try:
                assert read_settings(["--reward", s.reward, *words[:first], *words[last:]]) != again, words[first]
            except InputError:
                pass


def test_the_description_names_every_setting_and_marks_what_differs_from_the_preset():
    lines = describe(make_settings(epochs=12, algorithm="rwr", compile=True)).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == NAMES
    marked = {line.split()[0]: line.split("    * ")[1] for line in lines if "    * " in line}
    assert marked == dict(epochs="preset laptop_rwr: 4", compile="preset laptop_rwr: False")
    assert "  epochs               12    * preset laptop_rwr: 4" in lines


@pytest.mark.parametrize("given, line", [
    (dict(), "256 samples x 8 denoising steps; 4 optimizer steps on minibatches of 64, in micro-batches of 64; "
     "1 network pass a step"),
    (dict(weights=LARGE, inner_epochs=3), "256 samples x 50 denoising steps; 12 optimizer steps on minibatches of 64, "
     "in micro-batches of 4; 2 network passes a step"),
    (dict(algorithm="ddpo_sf", batch=0), "256 samples x 8 denoising steps; 1 optimizer step on minibatches of 256, "
     "in micro-batches of as many as fit; 1 network pass a step"),
    (dict(samples=32), "32 samples x 8 denoising steps; 4 optimizer steps on minibatches of 8, in micro-batches of 8; "
     "1 network pass a step"),
])
def test_the_description_ends_with_the_sizes_of_an_epoch(given, line):
    assert describe(make_settings(**given)).splitlines()[-1] == f"  an epoch: {line}"


def test_settings_of_presets_whose_reward_lacks_something_can_still_be_described(head):
    """The base that describe() and command() compare with is not checked: it has no --vlm-model."""
    s = make_settings(weights=LARGE, preset="sd_lora_alignment", vlm_model="m")
    assert command(s) == f"python train.py --reward vlm --weights {LARGE} --preset sd_lora_alignment --vlm-model m"
    assert "'m'    * preset sd_lora_alignment: ''" in describe(s)


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--weights", 2)])
def test_a_script_without_flags_does_nothing_but_explain_itself(flag, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rater.py", flag])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: pytest.fail("it has begun"), "Trains the head.\n\n    python rater.py")
    out, error = capsys.readouterr()
    assert stop.value.code == status and (out if flag == "--help" else error).startswith("usage: rater.py")
    assert ("Trains the head.\n\n    python rater.py\n" in out) == (flag == "--help")

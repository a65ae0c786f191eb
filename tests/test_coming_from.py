"""docs/coming_from.md: every setting of the others is named, and three of their runs become settings of ours."""
import re
import shlex

import pytest

from conftest import ROOT
from ddpo_min.cli import read_settings

PAGE = (ROOT / "docs/coming_from.md").read_text()

# The fields of TRL 0.23.1's DDPOConfig, ddpo-pytorch's besides, and those of Flow-GRPO that its own runs set
TRL = """exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir
    num_epochs save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta
    sample_guidance_scale sample_batch_size sample_num_batches_per_epoch train_batch_size train_use_8bit_adam
    train_learning_rate train_adam_beta1 train_adam_beta2 train_adam_weight_decay train_adam_epsilon
    train_gradient_accumulation_steps train_max_grad_norm train_num_inner_epochs train_cfg train_adv_clip_max
    train_clip_range train_timestep_fraction per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size
    per_prompt_stat_tracking_min_count async_reward_computation max_workers negative_prompts push_to_hub"""
DDPO_PYTORCH = "pretrained.model pretrained.revision use_lora prompt_fn prompt_fn_kwargs reward_fn"
FLOW_GRPO = """sample.num_steps sample.eval_num_steps sample.guidance_scale sample.eval_guidance_scale
    sample.train_batch_size sample.num_image_per_prompt sample.num_batches_per_epoch
    sample.global_std sample.noise_level sample.same_latent sample.sde_window_size sample.sde_window_range
    train.batch_size train.gradient_accumulation_steps train.cfg train.timestep_fraction train.beta train.clip_range
    train.adv_clip_max train.learning_rate train.lora_path reward_fn dataset prompt_fn eval_freq save_freq
    activation_checkpointing"""


def section(title):
    return re.search(rf"^##+ {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)[1]


def rows(title):
    """What stands in the first column of a section's table: names."""
    return set(re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| (`.*?) \|", section(title), re.M))))


def conversion(title, tmp_path, monkeypatch):
    """A run of theirs and of ours: ({name: text} of theirs, our Settings)."""
    blocks = re.findall(r"^```\n(.*?)^```$", section(title), re.M | re.S)
    theirs, ours = (block.replace("\\\n", " ") for block in blocks)
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(ours)[2:]
    if "--prompts" in arguments:
        (tmp_path / arguments[arguments.index("--prompts") + 1]).write_text("cat\ndog\n")
    return dict(re.findall(r"([\w.]+) ?= ?([^,\s]+)", theirs)), read_settings(arguments)


@pytest.mark.parametrize("title, names", [("TRL and ddpo-pytorch", f"{TRL} {DDPO_PYTORCH}"), ("Flow-GRPO", FLOW_GRPO)])
def test_every_setting_of_theirs_has_its_row(title, names):
    assert set(names.split()) - rows(title) == set()


def same_sizes(s, pictures, batches, batch, accumulated, gpus=1):
    """Whether an epoch has as many samples and optimizer steps."""
    samples, minibatch = pictures * batches * gpus, batch * accumulated * gpus
    return (s.samples, s.updates) == (samples, samples // minibatch) and samples % minibatch == 0


def test_the_run_of_trl(tmp_path, monkeypatch):
    theirs, s = conversion("A run of TRL", tmp_path, monkeypatch)
    n = {name.removeprefix("--"): int(value) for name, value in theirs.items() if value.isdigit()}
    assert len(n) == 7 and same_sizes(s, n["sample_batch_size"], n["sample_num_batches_per_epoch"],
                                      n["train_batch_size"], n["train_gradient_accumulation_steps"])
    assert (s.epochs, s.steps, s.prompt_buffer) == (n["num_epochs"], n["sample_num_steps"],
                                                    n["per_prompt_stat_tracking_buffer_size"])
    # TRL's defaults
    assert (s.prompt_minimum, s.normalise, s.guidance, s.eta, s.guidance_in_training) == (16, "prompt", 5, 1, True)
    assert (s.lr, s.beta1, s.beta2, s.weight_decay, s.adam_eps, s.grad_clip) == (3e-4, 0.9, 0.999, 1e-4, 1e-8, 1)
    assert (s.clip_range, s.advantage_clip, s.timestep_fraction, s.inner_epochs) == (1e-4, 5, 1, 1)
    assert (s.dtype, s.rank, s.trainable, s.step_weights, s.reward) == ("float16", 4, "lora", "paper", "aesthetic")
    assert s.batch == n["train_batch_size"]


def test_the_run_of_ddpo_pytorch(tmp_path, monkeypatch):
    theirs, s = conversion("A run of ddpo-pytorch", tmp_path, monkeypatch)
    n = {name: int(value) for name, value in theirs.items() if value.isdigit()}
    assert same_sizes(s, n["sample.batch_size"], n["sample.num_batches_per_epoch"], n["train.batch_size"],
                      n["train.gradient_accumulation_steps"], gpus=8)
    assert (s.prompt_buffer, s.prompt_minimum, s.epochs) == (16, 16, n["num_epochs"])
    assert theirs["prompt_fn"] == f'"{s.prompts}"' and theirs["reward_fn"] == '"jpeg_compressibility"'
    assert (s.reward, s.dtype, s.steps, s.guidance, s.lr, s.clip_range, s.advantage_clip, s.batch) == (
        "jpeg", "float16", 50, 5, 3e-4, 1e-4, 5, n["train.batch_size"])


def test_the_run_of_flow_grpo(tmp_path, monkeypatch):
    theirs, s = conversion("A run of Flow-GRPO", tmp_path, monkeypatch)
    n = {name: float(value) for name, value in theirs.items() if re.fullmatch(r"[\d.]+", value)}
    assert same_sizes(s, n["sample.train_batch_size"], n["sample.num_batches_per_epoch"], n["train.batch_size"],
                      n["train.gradient_accumulation_steps"], gpus=n["num_gpus"])
    assert (s.group_size, s.normalise, s.steps, s.guidance) == (n["sample.num_image_per_prompt"], "group",
                                                                n["sample.num_steps"], n["sample.guidance_scale"])
    assert (s.first_step, s.last_step) == (1, int(n["sample.num_steps"] * n["train.timestep_fraction"]))
    assert s.kl_weight == pytest.approx(n["train.beta"] / n["sample.num_steps"])
    assert (s.reward, s.lr, s.clip_range, s.advantage_clip, s.rank) == ("pickscore", 3e-4, 1e-4, 5, 32)

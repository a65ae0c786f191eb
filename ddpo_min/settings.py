"""All settings of a run in one dataclass, and the presets: sets of values that differ from its defaults.

ddpo_min/cli.py makes the command line from it: the sections are the groups of --help, the comments its texts.
"""
from dataclasses import dataclass, fields

from .v_prediction import PREDICTIONS

FORWARD_PROCESS = ("awm", "nft", "ram")     # algorithms that noise the finished pictures anew


@dataclass
class Settings:
    """Defaults: the laptop preset, for the model in weights/. In brackets: the paper's value for DDPO_IS on Stable
    Diffusion 1.4, or that of its authors' code where the text gives none (marked "code")."""
    # Most often changed
    reward: str = "jpeg"  # jpeg, incompressible, aesthetic, clip, hps, pickscore, vlm, FILE.py:NAME; sum: clip=9,jpeg=1
    prompts: str = "animals"        # animals (45), imagenet_animals, activities, counting, dpok, or a text file
    weights: str = ""               # Stable Diffusion 1.x, 2.x, XL: file, diffusers folder or Hub name; empty: shipped
    epochs: int = 8                 # how often to sample, score and train [code: 100]
    lr: float = 3e-3                # learning rate; full has its own [1e-5 for the whole UNet; code: 3e-4 for LoRA]
    out: str = ""                   # folder of the run; empty: runs/REWARD, numbered if it exists
    # What is trained
    preset: str = ""                # a set of values, "list" prints all; empty: by --weights and --algorithm
    algorithm: str = "ddpo_is"      # ddpo_is (clipped ratio), ddpo_sf (REINFORCE), awm, nft, ram, rwr, rwr_sparse
    trainable: str = "lora"         # lora, or full: the whole UNet [full]
    rank: int = 4                   # of the LoRA on the attention projections [code: 4]
    init_lora: str = ""             # LoRA file to start from, its layers and ranks; --kl-weight's base is without it
    # Sampling
    samples: int = 256              # pictures sampled an epoch [256]
    steps: int = 8                  # denoising steps T [50]
    guidance: float = 1.0           # scale of classifier-free guidance; 1 is none [5.0]
    guidance_in_training: bool = True  # train with sampling's guidance; without it the paper's runs collapse [on]
    prediction: str = ""            # of the UNet: eps (the noise), v or v_zsnr, see docs; empty: what its files say
    size: str = ""                  # of the pictures, WIDTHxHEIGHT in pixels, or one number; empty: the model's own
    eta: float = 1.0                # scale of DDIM's noise, 0 to 1; above 0 for ddpo_is and ddpo_sf [code: 1.0]
    noise_steps: int = 0            # denoising steps with noise in training, the first ones; 0: all. Evaluations: all
    # Learning
    updates: int = 4                # optimizer steps (minibatches) an epoch, each on an equal part of the samples [4]
    inner_epochs: int = 1           # passes over the same samples [1]
    batch: int = 64  # micro-batch: samples that go through the network together; auto (0): as many as fit, up to 64
    clip_range: float = 0.01        # the ratio is clipped to 1 +- this; see README, "What clip 1e-4 means" [1e-4]
    advantage_clip: float = 5.0     # advantages are clipped to +- this [code: 5 or 10]
    step_weights: str = "even"      # even: all timesteps pull alike, see README; paper: as in the algorithm's paper
    first_step: int = 1             # first denoising step to train on, from 1 (the noisiest) to T
    last_step: int = 0              # last denoising step to train on; 0: the last that has noise
    timestep_fraction: float = 0.5  # share of these denoising steps to train on, drawn anew for each minibatch [1]
    kl_weight: float = 0.0          # adds this times the KL divergence (awm, nft, ram: distance) to the base model [0]
    kl_old: float = 0.0             # awm, nft, ram: adds this times the distance from the old policy [awm: 5]
    policy_ema: float = 0.0         # awm, nft, ram: decay of the policy, an average [rising to: nft 0.5, ram 0.9]
    timesteps: int = 2              # awm, nft, ram: timesteps that a picture is noised to in each pass [6, 10, 8]
    grid_timesteps: bool = False    # awm, nft, ram: draw them from the sampler's timesteps alone [awm, nft: on]
    awm_power: float = 1.0          # awm: power of the denoising error; below 1 large errors pull less [awm: 0.25]
    nft_beta: float = 1.0           # nft: distance of its good and bad policy from the old one [nft: 1 or 0.1]
    inverse_temperature: float = 5.0  # beta of rwr, per unit of reward; 0 weighs all samples alike [0.2]
    percentile: float = 0.9         # rwr_sparse keeps the samples from this quantile of the reward on [0.9]
    # Optimizer
    weight_decay: float = 1e-4      # of AdamW [1e-4]
    beta1: float = 0.9              # of AdamW: decay of the gradients' mean [0.9]
    beta2: float = 0.95             # of AdamW: decay of their mean square; short, as the first ones are largest [0.999]
    adam_eps: float = 1e-8          # of AdamW: added to the denominator [1e-8]
    grad_clip: float = 1.0          # largest norm of the gradient [1.0]
    ema: float = 0.0                # decay of an average of what is trained: evaluated, saved; it does not draw
    # Normalisation of the reward
    normalise: str = "prompt"       # compare with the prompt's latest rewards; group: its group; epoch: all [prompt]
    normalise_each: bool = False    # each part of a sum of rewards by itself, then the weighted sum: no scale matters
    group_size: int = 1             # samples of an epoch that share a prompt; 2 or more for --normalise group
    same_start: bool = False        # samples of a group begin from the same x_T, too
    prompt_buffer: int = 16         # latest rewards of a prompt that count [code: 16 or 32]
    prompt_minimum: int = 8         # with fewer than these, the epoch's mean and deviation are used [code: 16]
    # Evaluation
    watch: str = ""                 # rewards to log and draw beside the trained one, with commas between
    eval_samples: int = 180         # pictures of an evaluation, on held-out seeds
    eval_prompts: str = ""          # prompts to evaluate on instead of --prompts, without those trained on
    eval_every: int = 0             # epochs between evaluations, the best of which is kept; 0: before and after only
    stop_when: str = ""             # end below a bound, at an evaluation: "clip<0.7"; the last LoRA above it is kept
    show_every: int = 1             # epochs between two rows of samples.png, and two frames of samples.webp
    # Reward models
    clip_model: str = ""            # open_clip's name, for aesthetic and clip; empty: by --weights [ViT-L-14-quickgelu]
    clip_weights: str = ""          # its file, or a tag that open_clip can fetch
    aesthetic_head: str = ""        # file of the aesthetic head; empty: the shipped one, or LAION's, fetched once
    hps_weights: str = ""           # file of HPS v2.1; empty: HPS_v2.1_compressed.pt, fetched once (2 GB)
    pickscore_weights: str = ""     # file of PickScore; empty: PickScore_v1's model.safetensors, fetched once (4 GB)
    vlm_url: str = "http://localhost:8000/v1"  # an OpenAI-compatible server: vLLM, SGLang, Ollama, llama.cpp, LM Studio
    vlm_model: str = ""             # name of the vision-language model on that server [LLaVA]
    vlm_question: str = "Answer concisely: what is going on in this image?"  # what it is asked [code: the same]
    vlm_reference: str = "{prompt}"  # what its answer is compared with [code: The image contains {prompt}]
    vlm_encoder: str = ""           # FILE.py:FUNCTION for BERTScore; empty: the model's own token embeddings [DeBERTa]
    vlm_idf: bool = False           # weight tokens by their rarity among the prompts
    vlm_parallel: int = 8           # requests in flight
    vlm_timeout: float = 60.0       # seconds to wait for an answer
    vlm_retries: int = 4            # how often to repeat a failed request, after 1, 2, 4, ... seconds
    vlm_api_key_env: str = "OPENAI_API_KEY"  # environment variable with the server's key; the key is never stored
    # Run and device
    seed: int = 0                   # of everything random
    device: str = "auto"            # cpu, cuda, mps; auto takes the best available
    dtype: str = "float32"          # of the frozen networks: float32, bfloat16, or float16 on GPUs before 2020
    checkpointing: bool = False     # compute activations again in the backward pass: less memory, a third more work
    compile: bool = False           # torch.compile the UNet, in sampling and training; takes minutes at the start
    keep_every: int = 0             # epochs between two LoRAs that later ones do not replace; 0: only the last is kept
    auto_resume: bool = False       # start, or go on with the run in --out if there is one: the same command does both
    resume: str = ""                # folder of a run to go on with; docs/metrics.md has the settings that may change

    @property
    def regression(self):
        """Whether the algorithm is weighted denoising (rwr, rwr_sparse), with weights instead of advantages."""
        return self.algorithm.startswith("rwr")

    @property
    def forward_process(self):
        """Whether it is denoising weighted by the advantage (awm, nft, ram)."""
        return self.algorithm in FORWARD_PROCESS

    @property
    def noise_window(self):
        """The denoising steps that have noise in training, counted from 0, the noisiest."""
        return range(self.noise_steps or self.steps)

    @property
    def window(self):
        """Those of them that may be trained on."""
        return self.noise_window[self.first_step - 1:self.last_step or None]

    @property
    def samples_per_start(self):
        """So many samples in a row have one x_T."""
        return self.group_size if self.same_start else 1

    @property
    def reward_models(self):
        """What the rewards with networks are made of: keywords of make_scorer() and check_rewards()."""
        return dict(clip=dict(model=self.clip_model, weights=self.clip_weights, head=self.aesthetic_head),
                    files=dict(hps=self.hps_weights, pickscore=self.pickscore_weights), vlm=self.part("vlm_"))

    def part(self, prefix):
        """The settings whose names start with prefix: {name without it: value}, like vlm_url -> url."""
        return {field.name.removeprefix(prefix): getattr(self, field.name) for field in fields(self)
                if field.name.startswith(prefix)}


# The public LoRA configuration for Stable Diffusion 1.x, and the paper's appendix table for the whole UNet
SD_LORA = dict(samples=256, steps=50, guidance=5.0, epochs=100, updates=4, batch=4, clip_range=1e-4, lr=3e-4,
               eval_samples=32, show_every=10, dtype="bfloat16", step_weights="paper", timestep_fraction=1.0,
               beta2=0.999, prompt_buffer=32, prompt_minimum=16, inverse_temperature=0.2)
PAPER = {**SD_LORA, "prompts": "imagenet_animals", "trainable": "full", "lr": 1e-5, "dtype": "float32"}
# For XL: steps, guidance, rank, learning rate and optimizer of SPO's public run on SDXL (github.com/RockeyCoss/SPO,
# configs/spo_sdxl_4k-prompts_num-sam-2_3-is_10ep_bs2_gradacc2.py), the rest as above; not run here. The clip range is
# that of 512 pixels: the log-probability is a mean over four times as many dimensions.
SDXL_LORA = dict(steps=20, rank=64, lr=1e-5, clip_range=2.5e-5, batch=1, checkpointing=True)
# 10,240 samples where the paper has 10,000, so that its 400 minibatches of 128 come out even
PAPER_RWR = {**PAPER, "samples": 10_240, "updates": 80, "inner_epochs": 5, "epochs": 10}

# What the authors' code has for Stable Diffusion 3.5. AWM's divides the advantages by 5, so its 0.003 and 1 are these;
# with one optimizer step an epoch its ratio is 1 and nothing is clipped
SD_AWM = dict(algorithm="awm", timesteps=6, grid_timesteps=True, updates=1, awm_power=0.25, clip_range=1.0,
              kl_weight=0.015, kl_old=5.0)
SD_NFT = dict(algorithm="nft", timesteps=10, grid_timesteps=True, updates=1, kl_weight=1e-4)
SD_RAM = dict(algorithm="ram", timesteps=8, kl_weight=0.01)
# Noise and training in the first half of the steps, in groups that are equal before: MixGRPO's window, standing still.
# It goes so fast that one epoch too many would do harm, but for the pull to the base model
LAPTOP_FAST = dict(epochs=3, noise_steps=4, timestep_fraction=1.0, group_size=8, same_start=True, normalise="group",
                   kl_weight=0.1)
# One optimizer step an epoch, as in AWM's and NFT's code; with more of them --clip-range 0.01 holds awm back
LAPTOP_FORWARD = dict(epochs=5, samples=64, updates=1, step_weights="paper", timestep_fraction=1.0)

# Regression learns to draw what it drew, and what its pictures lack adds up: with guidance they lack the least
LAPTOP_RWR = dict(steps=16, guidance=2.0, guidance_in_training=False, epochs=4, inner_epochs=4, lr=2.5e-4,
                  timestep_fraction=1.0)

PRESETS = {
    "laptop": {},
    "laptop_fast": LAPTOP_FAST,
    "laptop_ddpo_sf": dict(algorithm="ddpo_sf", updates=1, timestep_fraction=1.0),
    "laptop_awm": {**LAPTOP_FORWARD, "algorithm": "awm", "awm_power": 0.25, "clip_range": 1.0},
    "laptop_nft": {**LAPTOP_FORWARD, "algorithm": "nft"},
    "laptop_ram": {**LAPTOP_FORWARD, "algorithm": "ram", "kl_weight": 0.01},
    "laptop_rwr": {**LAPTOP_RWR, "algorithm": "rwr"},
    "laptop_rwr_sparse": {**LAPTOP_RWR, "algorithm": "rwr_sparse", "percentile": 0.7},
    "sd_lora": SD_LORA,
    "sd_lora_awm": {**SD_LORA, **SD_AWM},
    "sd_lora_nft": {**SD_LORA, **SD_NFT},
    "sd_lora_ram": {**SD_LORA, **SD_RAM},
    "sd_lora_compressibility": {**SD_LORA, "prompts": "imagenet_animals", "prompt_buffer": 16},
    "sd_lora_incompressibility": {**SD_LORA, "reward": "incompressible", "prompts": "imagenet_animals",
                                  "prompt_buffer": 16},
    "sd_lora_aesthetic": {**SD_LORA, "reward": "aesthetic", "epochs": 200, "updates": 2},
    "sd_lora_alignment": {**SD_LORA, "reward": "vlm", "prompts": "activities", "samples": 288, "epochs": 200,
                          "updates": 2},
    "sdxl_lora": {**SD_LORA, **SDXL_LORA},
    "paper_ddpo_is": PAPER,
    "paper_ddpo_sf": {**PAPER, "algorithm": "ddpo_sf", "updates": 1},
    "paper_rwr": {**PAPER_RWR, "algorithm": "rwr"},
    "paper_rwr_sparse": {**PAPER_RWR, "algorithm": "rwr_sparse"},
}
# The rewards' scales differ: what a unit of reward is worth to the laptop's weighted regression
LAPTOP_REWARDS = dict(aesthetic=dict(inverse_temperature=2.0), clip=dict(inverse_temperature=60.0))
# What an algorithm needs that is chosen on top of a preset for ddpo_is
ALGORITHMS = dict(ddpo_is={}, ddpo_sf=dict(updates=1),
                  awm=dict(timestep_fraction=1.0, kl_weight=0.0), nft=dict(timestep_fraction=1.0, kl_weight=0.0),
                  ram=dict(timestep_fraction=1.0, kl_weight=0.01),
                  **dict.fromkeys(("rwr", "rwr_sparse"), dict(inner_epochs=4, timestep_fraction=1.0, kl_weight=0.0,
                                                              normalise="prompt")))
# Who uses what not all algorithms do
USED_BY = dict(clip_range=("ddpo_is", "awm"), inverse_temperature=("rwr",), percentile=("rwr_sparse",),
               awm_power=("awm",), nft_beta=("nft",),
               **dict.fromkeys(("timesteps", "grid_timesteps", "kl_old", "policy_ema"), FORWARD_PROCESS))
FULL_LR = dict(laptop=3e-5, sd=1e-5)     # of --trainable full where the preset is for LoRA
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = dict(preset=tuple(PRESETS), algorithm=tuple(ALGORITHMS), trainable=("lora", "full"),
               step_weights=("even", "paper"), normalise=("prompt", "group", "epoch"),
               prediction=("", *PREDICTIONS), device=("auto", "cpu", "cuda", "mps"), dtype=DTYPES)

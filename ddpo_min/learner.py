"""What is learned, in one object: the trained parameters, their optimizer, the statistics of the prompts' rewards."""
import torch

from .lora import add_lora, load_lora, lora_state, save_lora
from .optimizer import Optimizer
from .weights import save_single_file


class Learner:
    """A LoRA on the UNet's attention, or the whole UNet; the rest of the model stays frozen."""

    def __init__(self, model, *, trainable, rank, init_lora, seed, statistics, **adamw):
        """trainable: "lora" or "full"; init_lora: a file whose layers and ranks are taken instead, or ""; adamw: see
        Optimizer; statistics: PromptStatistics. Changes model.unet."""
        torch.manual_seed(seed)
        self.model, self.statistics = model, statistics
        if trainable == "full":
            self.lora, self.file = {}, "model.safetensors"
            model.unet.requires_grad_(True)
            self.parameters = {f"unet.{name}": p for name, p in model.unet.named_parameters()}
        else:
            self.lora = load_lora(init_lora, model.unet) if init_lora else add_lora(model.unet, rank)
            self.file, self.parameters = "lora.safetensors", lora_state(self.lora)
        self.optimizer = Optimizer(list(self.parameters.values()), **adamw)

    def state_dict(self):
        """All that training changes; prompts, seeds and orders are functions of (seed, epoch)."""
        return dict(parameters={name: p.detach().cpu() for name, p in self.parameters.items()},
                    optimizer=self.optimizer.state_dict(), statistics=self.statistics.state_dict())

    def load_state_dict(self, state):
        """Go on from state_dict(). Raises ValueError if the parameters are others."""
        if state["parameters"].keys() != self.parameters.keys():
            raise ValueError("other parameters")
        for name, p in self.parameters.items():
            p.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])

    def save(self, folder, **story):
        """Write the LoRA, or the complete model in Stable Diffusion's single-file layout (float32)."""
        if self.lora:
            save_lora(folder / self.file, self.lora, **story)
        else:
            model = self.model
            save_single_file(folder / self.file, model.unet, model.vae, model.text_encoder, torch.float32,
                             model.image_size, **story)

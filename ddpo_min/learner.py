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
            self.lora = (load_lora(init_lora, model.unet, base=model.base) if init_lora else
                         add_lora(model.unet, rank))
            self.file, self.parameters = "lora.safetensors", lora_state(self.lora)
        self.alphas = {name: float(layer.alpha) for name, layer in self.lora.items()}
        self.optimizer = Optimizer(list(self.parameters.values()), **adamw)

    def state_dict(self):
        """All that training changes; prompts, seeds and orders are functions of (seed, epoch)."""
        return dict(parameters={name: p.detach().cpu() for name, p in self.parameters.items()}, alphas=self.alphas,
                    optimizer=self.optimizer.state_dict(), statistics=self.statistics.state_dict())

    def load_state_dict(self, state):
        """Go on from state_dict(). Raises ValueError, before anything changes, if it is of another model or LoRA."""
        if (state.keys() != {"parameters", "alphas", "optimizer", "statistics"}
                or state["optimizer"].keys() != {"state", "param_groups", "scaler", "ahead", "average", "steps"}):
            raise ValueError("parts are missing")
        given, moments = state["parameters"], state["optimizer"]["state"]
        ahead, average = state["optimizer"]["ahead"], state["optimizer"]["average"]
        if (given.keys() != self.parameters.keys() or not moments.keys() <= set(range(len(given)))
                or len(ahead) not in (0, len(given)) or len(average) != len(self.optimizer.average)):
            raise ValueError("it has other layers")
        if state["alphas"] != self.alphas:
            raise ValueError("its LoRA has other alphas")
        for i, (name, p) in enumerate(self.parameters.items()):
            own = (moments[i][key] for key in ("exp_avg", "exp_avg_sq") if i in moments)
            for tensor in (given[name], *own, *ahead[i:i + 1], *average[i:i + 1]):
                if tensor.shape != p.shape or tensor.dtype != p.dtype:
                    raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(p.shape)}")
            if not given[name].isfinite().all():
                raise ValueError(f"{name}: numbers that are not finite")
        for name, p in self.parameters.items():
            p.data.copy_(given[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state_dict(state["statistics"])

    def save(self, folder, mark="", **story):
        """Write the LoRA, or the complete model in Stable Diffusion's single-file layout (float32).

        mark: what stands in the file's name before its dot; story: what its metadata say.
        """
        path, model = folder / self.file.replace(".", f"{mark}."), self.model
        with self.optimizer.averaged():
            if self.lora:
                return save_lora(path, self.lora, base_name=model.base, **story)
            save_single_file(path, model.unet, model.vae, model.text_encoder, torch.float32,
                             model.image_size, model.prediction, **story)

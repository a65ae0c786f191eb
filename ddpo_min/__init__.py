"""ddpo_min: DDPO for Stable Diffusion, from scratch, for reading."""
from .weights import load_stable_diffusion

__all__ = ["load_stable_diffusion"]

"""ddpo_min: DDPO for Stable Diffusion, from scratch, for reading."""
__version__ = "0.4.0"       # first: other files read it while they are imported

from .weights import load_stable_diffusion

__all__ = ["load_stable_diffusion"]

"""Instructions to model parameters and back: a DeepSpeed-scaled trainer of SHIP (Sun et al. 2025,
arXiv 2502.02315)."""

__version__ = "0.2.0"

"""Random numbers that are a function of names alone: no rank's generator moves, and every rank and
every start draws the same."""

import hashlib

import torch


def keyed_generator(key: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of the key alone."""
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(digest)

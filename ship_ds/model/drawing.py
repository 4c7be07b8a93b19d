"""Random numbers that are a function of names alone: no rank's generator moves, and every rank and
every start draws the same."""

import hashlib

import torch


def draw_seed(*parts: object) -> int:
    """A seed made of whatever names a draw, such as (seed, examples, "views", 0)."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    # A torch seed has to fit a signed 64-bit number.
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_generator(key: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of the key alone."""
    return torch.Generator().manual_seed(draw_seed(key))

"""Base folders of every shape, and SHIPs over them that were never trained but do something."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ship_ds.api import Ship
from ship_ds.config import Config, base_folder, parse_config
from ship_ds.model.assemble import LoadedWeights, build_ship
from tests.model.models import tiny_t5

FAMILIES = ("llama", "qwen2", "mistral")
PROBES = ("3 7 3 5", "1 3 9")


def make_base(
    folder: Path, family: str = "llama", tied: bool = False, shard_size: str = "5GB", seed: int = 0
) -> Path:
    """A random bf16 model with grouped-query attention and the embedded tokenizer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=266,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size=shard_size
    )
    _copy_tokenizer(folder)
    return folder


def make_t5_base(folder: Path, version: str = "1.1") -> Path:
    """A random T5 in fp32 with the embedded tokenizer."""
    tiny_t5(version, vocabulary=266).save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


def _copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base_folder("embedded") / name, folder / name)


def make_ship(
    base: Path | str,
    *,
    quantisation: str = "nf4",
    encoder: dict[str, object] | None = None,
    decoder: dict[str, object] | None = None,
    std: float = 0.3,
    **hypernetwork: object,
) -> Ship:
    """Adapters large enough that logits tell mistakes apart; the base encodes and decodes, or what
    these sections name."""
    config: Config = parse_config(
        {
            "run": {"folder": "runs/none"},
            "training": {"steps": 1},
            "model": {
                "latent_size": 64,
                "encoder": encoder or {},
                "decoder": decoder or {},
                "task_llm": {"base": str(base), "quantisation": quantisation},
                "hypernetwork": {"rank": 4, "alpha": 6, "width": 32, **hypernetwork}
                if "kind" not in hypernetwork
                else hypernetwork,
            },
        },
        "test",
    )
    torch.manual_seed(1)
    model = build_ship(config.model, LoadedWeights(device=torch.device("cpu"))).eval()
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    return Ship(model, config, "0" * 64)

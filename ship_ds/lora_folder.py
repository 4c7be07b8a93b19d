"""Adapter folders in the layout of `peft`, and what can be done to a LoRA on disk: pad it, add
several, compress it.

    FOLDER/adapter_config.json           peft's own LoraConfig or PromptTuningConfig
    FOLDER/adapter_model.safetensors     base_model.model.<module path>.lora_A.weight (R, I)
                                         base_model.model.<module path>.lora_B.weight (O, R)
                                         or prompt_embeddings (P, H)
                                         or prompt_embeddings (P, L 2 G F) of a prefix

Letters: F size of an attention head, G key-value heads, H hidden size, I inputs of a linear,
L decoder layers, O outputs of a linear, P virtual tokens, R LoRA rank.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.parsing import read_json_object
from ship_ds.tensor_file import TensorFile

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of `peft` under which an adapter is more, or other, than scaling * B A."""
_KEEPS_THE_BASE = ("eva", "gaussian", "orthogonal")
"""Initialisations by name that leave the base's weights alone; PiSSA and its like change them."""


@dataclass(frozen=True)
class Lora:
    """One LoRA: the weight of each linear that it adapts changes by scaling * B A.

    Args:
        factors: Module path -> (A, B), of shapes (R, I) and (O, R).
        scaling: `peft`'s alpha / R, or alpha / sqrt(R) for a rank-stabilised one.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[0]

    def padded(self, rank: int) -> "Lora":
        """The same function with zero rows up to `rank`, for servers that take certain ranks alone.

        The scaling, alpha / R, stays, so alpha grows with the rank; else the function would change.

        Raises:
            UserError: The rank is above that already.
        """
        missing = rank - self.rank
        if missing < 0:
            raise UserError(
                f"--pad-to {rank}: the adapter's rank is {self.rank} already; give that or more"
            )
        pad = torch.nn.functional.pad
        factors = {
            path: (pad(a_RI, (0, 0, 0, missing)), pad(b_OR, (0, missing)))
            for path, (a_RI, b_OR) in self.factors.items()
        }
        return Lora(factors, self.scaling)

    def delta(self, path: str) -> Tensor:
        """The update of one module's weight, scaling * B A in fp32, (O, I)."""
        a_RI, b_OR = self.factors[path]
        return (b_OR.float() @ a_RI.float()).mul_(self.scaling)


def add(parts: Sequence[tuple[float, Lora]]) -> Lora:
    """The weighted sum of several LoRAs, exactly: their ranks side by side, each one's weight and
    scaling in its B."""
    scaling = parts[0][1].scaling
    factors = {}
    for path in parts[0][1].factors:
        a_RI = torch.cat([lora.factors[path][0] for _, lora in parts])
        b_OR = torch.cat(
            [lora.factors[path][1] * (weight * lora.scaling / scaling) for weight, lora in parts], 1
        )
        factors[path] = (a_RI, b_OR)
    return Lora(factors, scaling)


def compressed(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The best LoRA of a lower rank for each module, by truncated SVD without ever forming B A.

    Returns:
        The LoRA, and the error that is left: the Frobenius norm of the difference over that of the
        whole update.

    Raises:
        UserError: The rank is not lower.
    """
    if rank > lora.rank:
        raise UserError(
            f"--rank {rank}: the exact sum's rank is {lora.rank}; leave --rank out, or give less"
        )
    factors, lost, whole = {}, 0.0, 0.0
    for path, (a_RI, b_OR) in lora.factors.items():
        # B A = left (b a^T) right^T, and only the small middle is decomposed.
        left_OR, b_RR = torch.linalg.qr(b_OR.double())
        right_IR, a_RR = torch.linalg.qr(a_RI.double().T)
        u_RR, s_R, v_RR = torch.linalg.svd(b_RR @ a_RR.T)
        root_R = s_R[:rank].sqrt()
        factors[path] = (
            ((right_IR @ v_RR[:rank].T) * root_R).T.contiguous().to(a_RI.dtype),
            ((left_OR @ u_RR[:, :rank]) * root_R).to(b_OR.dtype),
        )
        lost, whole = lost + float(s_R[rank:].square().sum()), whole + float(s_R.square().sum())
    return Lora(factors, lora.scaling), math.sqrt(lost / whole) if whole else 0.0


def write_lora(folder: Path, lora: Lora, base: str) -> None:
    """Write the two files of a LoRA into an existing folder.

    Args:
        folder: Where to.
        lora: Written in its own dtype.
        base: The base model's folder, as the config names it.
    """
    from peft import LoraConfig

    tensors = {}
    for path, (a_RI, b_OR) in lora.factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a_RI
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b_OR
    _write_tensors(folder, tensors)
    alpha = lora.scaling * lora.rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
    )
    # peft makes a set of the list it is given, which it would save in another order each time.
    config.target_modules = sorted({path.rpartition(".")[2] for path in lora.factors})
    config.save_pretrained(str(folder))


def write_soft_prompt(folder: Path, prompt_PH: Tensor, base: str, settings: Any) -> None:
    """Write the two files of a soft prompt, `peft`'s prompt tuning, into an existing folder.

    Args:
        folder: Where to.
        prompt_PH: The embeddings of the virtual tokens.
        base: The base model's folder, as the config names it.
        settings: The base model's transformers config.
    """
    from peft import PromptTuningConfig

    _write_tensors(folder, {"prompt_embeddings": prompt_PH})
    PromptTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=prompt_PH.shape[0],
        token_dim=prompt_PH.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=settings.num_attention_heads,
        num_layers=settings.num_hidden_layers,
    ).save_pretrained(str(folder))


def write_prefix(folder: Path, states: Sequence[Tensor], base: str, settings: Any) -> None:
    """Write the two files of keys and values, `peft`'s prefix tuning, into an existing folder.

    Args:
        folder: Where to.
        states: Keys before values of each block, (2, G, P, F), the keys turned for positions that
            begin behind them.
        base: The base model's folder, as the config names it.
        settings: The base model's transformers config.
    """
    from peft import PrefixTuningConfig

    _, num_heads, length, head_size = states[0].shape
    # peft parts a position's numbers into layer, key or value, head.
    rows = torch.cat([one.permute(2, 0, 1, 3).flatten(1) for one in states], 1)
    _write_tensors(folder, {"prompt_embeddings": rows.contiguous()})
    PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=length,
        token_dim=num_heads * head_size,
        num_transformer_submodules=1,
        # Of keys and values: peft cuts token_dim by it.
        num_attention_heads=num_heads,
        num_layers=settings.num_hidden_layers,
    ).save_pretrained(str(folder))


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    with TensorFile(folder / ADAPTER_WEIGHTS, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor.cpu())


def read_lora(folder: Path) -> Lora:
    """The LoRA in a folder that we or `peft` wrote.

    Returns:
        Its tensors are backed by the file's pages until they are copied.

    Raises:
        UserError: It is no LoRA, or one with a setting that is not supported; or a file is missing
            or damaged. The message names the file.
    """
    config = _read_config(folder)
    path = folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; save the adapter again"
        ) from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        module, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, {})[half] = tensor
    if not pairs:
        raise UserError(f"{path}: has no tensors; expected a LoRA saved by peft")
    factors = {module: _factors(folder, module, pairs[module], config.r) for module in pairs}
    divisor = math.sqrt(config.r) if config.use_rslora else config.r
    return Lora(factors, config.lora_alpha / divisor)


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    # Without this file peft would look for an adapter of that name on the hub.
    if not path.is_file():
        raise UserError(
            f"{folder}: no adapter here (no {ADAPTER_CONFIG}); expected a PEFT LoRA folder"
        )
    try:
        settings: dict[str, Any] = read_json_object(path)
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{path}: peft_type is {settings.get('peft_type')}; expected LORA")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: peft cannot read it: {' '.join(str(error).split())}") from None
    if key := _unsupported(config, settings):
        raise UserError(
            f"{path}: {key} is {settings.get(key)!r}, and that cannot be read here; "
            "save the adapter as a plain LoRA"
        )
    return config


def _unsupported(config: "LoraConfig", settings: Mapping[str, Any]) -> str | None:
    """The first setting under which the adapter is not scaling * B A on the base as it is."""
    if not isinstance(config.r, int) or config.r < 1:
        return "r"
    if not isinstance(config.lora_alpha, int | float):
        return "lora_alpha"
    if config.bias != "none":
        return "bias"
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _KEEPS_THE_BASE:
        return "init_lora_weights"
    # What a newer peft has added is unknown to this one's class, and harmless while it is off.
    unknown = settings.keys() - vars(config).keys() - {"runtime_config"}
    return next((key for key in (*_UNSUPPORTED, *sorted(unknown)) if settings.get(key)), None)


def _factors(
    folder: Path, module: str, pair: Mapping[str, Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if pair.keys() != {"lora_A", "lora_B"}:
        raise UserError(
            f"{path}: {module}: has {', '.join(sorted(pair))}; expected lora_A and lora_B"
        )
    a_RI, b_OR = pair["lora_A"], pair["lora_B"]
    if a_RI.ndim != 2 or b_OR.ndim != 2:
        raise UserError(
            f"{path}: {module}: lora_A is {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)}; "
            "expected the two matrices of a linear"
        )
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        raise UserError(
            f"{path}: {module}: has values that are infinite or no numbers; save the adapter again"
        )
    if a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise UserError(
            f"{path}: {module}: A has rank {a_RI.shape[0]} and B {b_OR.shape[1]}, and "
            f"{ADAPTER_CONFIG} says r={rank}; the two files do not belong together"
        )
    return a_RI, b_OR

"""Adapter folders in the layout of `peft`, and what can be done to a LoRA on disk: pad it, add
several, compress it.

    FOLDER/adapter_config.json           peft's own LoraConfig or PromptTuningConfig, for a causal
                                         LM or one of two stacks
    FOLDER/adapter_model.safetensors     base_model.model.<module path>.lora_A.weight (R, I)
                                         base_model.model.<module path>.lora_B.weight (O, R)
                                         and, of a DoRA,
                                         base_model.model.<module path>.lora_magnitude_vector (O)
                                         or prompt_embeddings (P, H)
                                         or prompt_embeddings (P, L 2 G F) of a prefix
                                         or, of a SHiRA,
                                         base_model.model.<module path>.shira_weight (X)
                                         base_model.model.<module path>.shira_indices (2, X)

Letters: F size of an attention head, G key-value heads, H hidden size, I inputs of a linear,
L decoder layers, O outputs of a linear, P virtual tokens, R LoRA rank, X other letters flattened.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ship_ds.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_TYPES, check_weights
from ship_ds.errors import UserError
from ship_ds.parsing import read_json_object
from ship_ds.tensor_file import TensorFile
from ship_ds.weights_folder import is_finite

if TYPE_CHECKING:
    from peft import LoraConfig

WeightOf = Callable[[str], Tensor]
"""Module path -> the base's weight (O, I) there. Raises UserError for a path that has none."""

_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Settings of `peft` under which an adapter is more, or other, than changes of linears' weights."""
_KEEPS_THE_BASE = ("eva", "gaussian", "orthogonal")
"""Initialisations by name that leave the base's weights alone; PiSSA and its like change them."""
_PLAIN_PATTERN = re.compile(r"\^?[\w.\\\[\]|-]+(?:[*+][\w.\\\[\]|-]*){0,2}\$?")
"""Keys of rank_pattern and alpha_pattern that are matched: names, and expressions without groups
and with two repetitions at most, as one of somebody else's could else run for ever."""
_MOST_KEYS = 512
"""Of either: each is matched against each module."""
_LARGEST = 10**9
"""Rank or alpha, of either sign: the square of a larger one may be no float."""
_SHIRA_WEIGHT, _SHIRA_INDICES = "shira_weight", "shira_indices"
_FIRST_RANK, _TOLERANCE = 64, 1e-4
"""Of `factored`: the rank that is tried first, and what it may lose of the norm."""


class Update(Protocol):
    """One adapter that is a change of linears' weights."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (O, I) of each weight that it changes."""

    def delta(self, path: str) -> Tensor:
        """The update of one module's weight in fp32, (O, I)."""


@dataclass(frozen=True)
class Lora:
    """One LoRA: the weight of each linear that it adapts changes by scaling * B A.

    Args:
        factors: Module path -> (A, B), of shapes (R, I) and (O, R); R may differ between modules.
        scaling: `peft`'s alpha / R, or alpha / sqrt(R) for a rank-stabilised one.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Update`."""
        return {path: (len(b_OR), a_RI.shape[1]) for path, (a_RI, b_OR) in self.factors.items()}

    @property
    def rank(self) -> int:
        """The highest of its modules."""
        return max(a_RI.shape[0] for a_RI, _ in self.factors.values())

    def padded(self, rank: int) -> "Lora":
        """The same function with zero rows up to `rank`, for servers that take certain ranks alone.

        The scaling, alpha / R, stays, so alpha grows with the rank; else the function would change.

        Raises:
            UserError: The rank is above that already.
        """
        if rank < self.rank:
            raise UserError(
                f"--pad-to {rank}: the adapter's rank is {self.rank} already; give that or more"
            )
        pad = torch.nn.functional.pad
        factors = {
            path: (
                pad(a_RI, (0, 0, 0, rank - a_RI.shape[0])),
                pad(b_OR, (0, rank - b_OR.shape[1])),
            )
            for path, (a_RI, b_OR) in self.factors.items()
        }
        return Lora(factors, self.scaling)

    def delta(self, path: str) -> Tensor:
        """The update of one module's weight, scaling * B A in fp32, (O, I)."""
        a_RI, b_OR = self.factors[path]
        return (b_OR.float() @ a_RI.float()).mul_(self.scaling)


@dataclass(frozen=True)
class SparseUpdate:
    """One SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): some weights of linears change.

    Args:
        entries: Module path -> output and input of each such weight, (2, X), none twice; and by how
            much it changes, (X,).
        sizes: Module path -> (O, I).
    """

    entries: Mapping[str, tuple[Tensor, Tensor]]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Update`."""
        return {path: self.sizes[path] for path in self.entries}

    def delta(self, path: str) -> Tensor:
        """See `Update`."""
        places, values_X = self.entries[path]
        delta_OI = torch.zeros(self.sizes[path])
        delta_OI[tuple(places.long())] = values_X.float()
        return delta_OI


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
        The LoRA, with zeros up to the rank where a module's weight has a lower one; and the error
        that is left: the Frobenius norm of the difference over that of the whole update.

    Raises:
        UserError: The rank is above the sum's.
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
        # Of a weight with a side below R the middle has a side below R, too, and is not square.
        u_RR, s_R, v_RR = torch.linalg.svd(b_RR @ a_RR.T, full_matrices=False)
        root_R = s_R[:rank].sqrt()
        factors[path] = (
            ((right_IR @ v_RR[:rank].T) * root_R).T.contiguous().to(a_RI.dtype),
            ((left_OR @ u_RR[:, :rank]) * root_R).to(b_OR.dtype),
        )
        lost, whole = lost + float(s_R[rank:].square().sum()), whole + float(s_R.square().sum())
    return Lora(factors, lora.scaling).padded(rank), math.sqrt(lost / whole) if whole else 0.0


def write_lora(folder: Path, lora: Lora, base: str, settings: Any = None) -> None:
    """Write the two files of a LoRA into an existing folder.

    Args:
        folder: Where to.
        lora: Written in its own dtype.
        base: The base model's folder, as the config names it.
        settings: The base model's transformers config; None: that of a causal LM.
    """
    from peft import LoraConfig

    tensors = {}
    for path, (a_RI, b_OR) in lora.factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a_RI
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b_OR
    _write_tensors(folder, tensors)
    alpha = lora.scaling * lora.rank
    config = LoraConfig(
        task_type=_task_type(settings),
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
        task_type=_task_type(settings),
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
        task_type=_task_type(settings),
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=length,
        token_dim=num_heads * head_size,
        num_transformer_submodules=1,
        # Of keys and values: peft cuts token_dim by it.
        num_attention_heads=num_heads,
        num_layers=settings.num_hidden_layers,
    ).save_pretrained(str(folder))


def write_sparse(folder: Path, update: SparseUpdate, rank: int, base: str, settings: Any) -> None:
    """Write the two files of a SHiRA into an existing folder.

    Args:
        folder: Where to.
        update: With rank (I + O) weights of each linear.
        rank: `peft`'s r.
        base: The base model's folder, as the config names it.
        settings: The base model's transformers config.
    """
    from peft import ShiraConfig

    tensors = {}
    for path, (places, values_X) in update.entries.items():
        tensors[f"{_PREFIX}{path}.{_SHIRA_WEIGHT}"] = values_X
        tensors[f"{_PREFIX}{path}.{_SHIRA_INDICES}"] = places.int()
    _write_tensors(folder, tensors)
    config = ShiraConfig(
        task_type=_task_type(settings),
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
    )
    # Whole paths, since other blocks have linears of the same names; a list, as in `write_lora`.
    config.target_modules = sorted(update.entries)
    config.save_pretrained(str(folder))


def _task_type(settings: Any) -> str:
    """As `peft` calls what a base is for: of two stacks it is told both's tokens."""
    return "SEQ_2_SEQ_LM" if getattr(settings, "is_encoder_decoder", False) else "CAUSAL_LM"


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    with TensorFile(folder / ADAPTER_WEIGHTS, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor.cpu())


def factored(delta_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) in fp32 with B A equal to the update of a weight: of the lowest rank
    that loses less than 1e-4 of its norm where that is 64 at most, else the update itself."""
    delta_OI = delta_OI.float()
    norm, rank = delta_OI.norm(), min(_FIRST_RANK, *delta_OI.shape)
    # A fixed sketch: the same folder gives the same factors.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u_OR, s_R, v_IR = torch.svd_lowrank(delta_OI, q=rank, niter=2)
    rank = max(1, int((s_R > _TOLERANCE * norm / math.sqrt(rank)).sum()))
    a_RI, b_OR = v_IR[:, :rank].T.contiguous(), u_OR[:, :rank] * s_R[:rank]
    if (delta_OI - b_OR @ a_RI).norm() <= 2 * _TOLERANCE * norm:
        return a_RI, b_OR
    num_out, num_in = delta_OI.shape
    if num_in <= num_out:
        return torch.eye(num_in, device=delta_OI.device), delta_OI
    return delta_OI, torch.eye(num_out, device=delta_OI.device)


def read_lora(folder: Path, weight: WeightOf | None = None) -> Lora:
    """The LoRA in a folder that we or `peft` wrote; a DoRA as the equal update of the weights.

    Args:
        folder: Of `peft`, with ranks and alphas of its own for some modules or not, rank-stabilised
            or not.
        weight: The base's weights, which a DoRA cannot be read without.

    Returns:
        Its tensors are backed by the file's pages until they are copied, where nothing had to be
        computed.

    Raises:
        UserError: It is no LoRA, or one with a setting that is not supported; or a file is missing
            or damaged. The message names the file, and setting or module.
    """
    config = _read_lora_config(folder)
    if config.use_dora and weight is None:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: use_dora is True, and that cannot be read here without "
            "the base's weights; save the adapter as a plain LoRA"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(_read_tensors(folder).items()):
        module, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: has no tensors; expected a LoRA saved by peft"
        )
    common = _scaling(config, config.r, config.lora_alpha) or 1.0
    ranks, alphas = _compiled(config.rank_pattern or {}), _compiled(config.alpha_pattern or {})
    factors = {}
    for module, tensors in modules.items():
        rank = _of_module(ranks, module, config.r)
        alpha = _of_module(alphas, module, config.lora_alpha)
        a_RI, b_OR = _factors(folder, module, tensors, rank, bool(config.use_dora))
        scaling = _scaling(config, rank, alpha)
        if config.use_dora:
            assert weight is not None
            magnitude_O = tensors["lora_magnitude_vector"].float().flatten()
            delta_OI = scaling * (b_OR.float() @ a_RI.float())
            delta_OI = _dora_update(folder, module, weight, delta_OI, magnitude_O)
            _refuse_infinite(folder, module, delta_OI)
            a_RI, b_OR = factored(delta_OI)
            scaling = 1.0
        if scaling != common:
            b_OR = b_OR.float() * (scaling / common)
            _refuse_infinite(folder, module, b_OR)
        if not config.use_dora:
            _refuse_infinite(folder, module, _squared_norm(a_RI, b_OR, common))
        factors[module] = (a_RI, b_OR)
    return Lora(factors, common)


def _refuse_infinite(folder: Path, module: str, computed: Tensor) -> None:
    """Raise UserError where finite numbers of a file have become others. By the norm, which later
    steps take, and whose square has to be a number, too."""
    if not computed.norm().isfinite():
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: {module}: its update has no finite norm; train the "
            "adapter again, with a lower learning rate or alpha"
        )


def _squared_norm(a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """Of scaling * B A, in fp32, where it may be infinite: from the products of A and of B with
    themselves, (R, R), without forming (O, I)."""
    square = torch.full((), torch.inf)
    for dtype in (torch.float32, torch.float64):
        # In the first, which is quicker, these may overflow where the whole does not.
        if not square.isfinite():
            a, b = a_RI.to(dtype), b_OR.to(dtype)
            square = ((a @ a.T) * (b.T @ b)).sum().clamp(min=0) * scaling * scaling
    return square.float()


def read_sparse(folder: Path, shape_of: Callable[[str], tuple[int, int] | None]) -> SparseUpdate:
    """The SHiRA in a folder that we or `peft` wrote.

    Args:
        folder: Of `peft`.
        shape_of: Module path -> (O, I) of the weight there; None for a path that has none.

    Raises:
        UserError: It is none, or of a base of other sizes; or a file is missing or damaged.
    """
    settings = _read_settings(folder, "SHIRA")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(_read_tensors(folder, _SHIRA_INDICES).items()):
        module, _, part = name.removeprefix(_PREFIX).rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    entries, sizes = {}, {}
    for module, tensors in modules.items():
        shape = shape_of(module)
        if shape is None:
            raise UserError(
                f"{folder}: changes {module}, which is none of the linears that can change here: "
                "an adapter of another base model, or of a run with other settings"
            )
        sizes[module] = shape
        entries[module] = _entries(folder, module, tensors, shape, settings)
    if not entries:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: has no tensors; expected a SHiRA saved by peft"
        )
    return SparseUpdate(entries, sizes)


def _entries(
    folder: Path,
    module: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Places and numbers of one linear, that fit its weight and the config."""
    path, expected = folder / ADAPTER_WEIGHTS, [_SHIRA_INDICES, _SHIRA_WEIGHT]
    if sorted(tensors) != expected:
        raise UserError(
            f"{path}: {module}: has {', '.join(sorted(tensors))}; expected {' and '.join(expected)}"
        )
    places, values_X = tensors[_SHIRA_INDICES].long(), tensors[_SHIRA_WEIGHT]
    rank: Any = settings.get("r")
    count = values_X.numel()
    fits = places.shape == (2, count) and values_X.ndim == 1 and _is_number(rank, int)
    if not fits or not count or count != rank * sum(shape) or not _lie_in(places, shape):
        raise UserError(
            f"{path}: {module}: places {tuple(places.shape)} of {count} numbers, which are not the "
            f"r={rank} x (in + out) of a weight of {shape}: another base model's, or damaged"
        )
    return places, values_X


def _lie_in(places: Tensor, shape: tuple[int, int]) -> bool:
    """Whether these are places of a matrix, each once."""
    low, high = places.amin(1), places.amax(1)
    if int(low.min()) < 0 or int(high[0]) >= shape[0] or int(high[1]) >= shape[1]:
        return False
    flat = places[0] * shape[1] + places[1]
    return flat.unique().numel() == flat.numel()


def read_update(
    folder: Path, shape_of: Callable[[str], tuple[int, int] | None]
) -> "Lora | SparseUpdate":
    """What a folder changes of linears' weights; arguments as `read_sparse` has them.

    Raises:
        UserError: It is neither a LoRA nor a SHiRA, or a damaged one.
    """
    path = folder / ADAPTER_CONFIG
    is_sparse = path.is_file() and read_json_object(path).get("peft_type") == "SHIRA"
    return read_sparse(folder, shape_of) if is_sparse else read_lora(folder)


def _scaling(config: "LoraConfig", rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _compiled(pattern: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    """A pattern of `peft`, once for all modules: more keys than re remembers are compiled anew."""
    return [(re.compile(rf"(.*\.)?(?:{name})$"), value) for name, value in pattern.items()]


def _of_module(pattern: Sequence[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    """A module's own number in a pattern, by the first key that it matches."""
    return next((value for name, value in pattern if name.match(module)), default)


def other_sizes(
    folder: Path, module: str, there: Sequence[int], expected: Sequence[int]
) -> UserError:
    """The error of an adapter of linears with other (inputs, outputs) than the base's.

    Args:
        folder: Of the adapter.
        module: The linear's path.
        there: Its inputs and outputs in the adapter.
        expected: Its inputs and outputs in the base.

    Returns:
        The error, which the caller raises.
    """
    return UserError(
        f"{folder}: {module} is {there[0]} -> {there[1]} and this run's base has "
        f"{expected[0]} -> {expected[1]} there: an adapter of another base model"
    )


def _dora_update(
    folder: Path, module: str, weight: WeightOf, delta_OI: Tensor, magnitude_O: Tensor
) -> Tensor:
    """W' - W with W' = magnitude * (W + delta) / |W + delta|, row by row (Liu et al. 2024, arXiv
    2402.09353, equation 5). Raises UserError."""
    weight_OI = weight(module).float()
    if weight_OI.shape != delta_OI.shape:
        raise other_sizes(folder, module, delta_OI.shape[::-1], weight_OI.shape[::-1])
    moved_OI = weight_OI + delta_OI.to(weight_OI.device)
    norm_O = moved_OI.norm(dim=1)
    if not norm_O.all():
        # peft divides by it, too, and what it computes or merges there is NaN.
        output = int(norm_O.eq(0).int().argmax())
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: {module}: output {output} has no weight but zeros, in "
            "the base with the update, and a DoRA divides by their norm; train one without this "
            "module, or a plain LoRA"
        )
    scale_O = magnitude_O.to(weight_OI.device) / norm_O
    return scale_O[:, None] * moved_OI - weight_OI


def read_soft_prompt(folder: Path) -> Tensor:
    """The embeddings of the virtual tokens in a folder of `peft`'s prompt tuning, (P, H) in fp32.

    Raises:
        UserError: It is none, or a file is missing or damaged.
    """
    _read_settings(folder, "PROMPT_TUNING")
    return _read_embeddings(folder)


def read_prefix(folder: Path, num_blocks: int, heads: tuple[int, int]) -> list[Tensor]:
    """Keys before values of each block, (2, G, P, F) in fp32, as `write_prefix` takes them.

    Args:
        folder: Of `peft`'s prefix tuning.
        num_blocks: Of the base.
        heads: Its key-value heads and the size of one.

    Raises:
        UserError: It is none, or of a base of other sizes; or a file is missing or damaged.
    """
    _read_settings(folder, "PREFIX_TUNING")
    rows = _read_embeddings(folder)
    num_heads, head_size = heads
    width = num_blocks * 2 * num_heads * head_size
    if rows.shape[1] != width:
        raise UserError(
            f"{folder}: prompt_embeddings: {rows.shape[1]} numbers a position, and this run's base "
            f"takes {width}: an adapter of another base model"
        )
    return [
        one.unflatten(1, (2, num_heads, head_size)).permute(1, 2, 0, 3).contiguous()
        for one in rows.chunk(num_blocks, 1)
    ]


def _read_embeddings(folder: Path) -> Tensor:
    tensors = _read_tensors(folder)
    rows = tensors.get("prompt_embeddings")
    if rows is None or rows.ndim != 2 or len(tensors) != 1:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: has {', '.join(sorted(tensors)) or 'nothing'}; expected "
            "prompt_embeddings, a row a virtual token"
        )
    return rows.float()


def _read_tensors(folder: Path, integers: str = "") -> dict[str, Tensor]:
    """The folder's tensors, all of finite numbers, but for those of this last name of integers."""
    path = folder / ADAPTER_WEIGHTS
    check_weights(folder)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; save the adapter again"
        ) from None
    for name, tensor in tensors.items():
        is_right = tensor.is_floating_point() and is_finite(tensor)
        if integers and name.rpartition(".")[2] == integers:
            is_right = tensor.dtype in (torch.int32, torch.int64)
        if not is_right:
            raise UserError(
                f"{path}: {name} has values that are no finite numbers; train or save the adapter "
                "again"
            )
    return tensors


def _read_settings(folder: Path, kind: str) -> dict[str, Any]:
    """adapter_config.json as it stands, of this `peft_type`."""
    path = folder / ADAPTER_CONFIG
    # Without this file peft would look for an adapter of that name on the hub.
    if not path.is_file():
        expected = "expected a PEFT LoRA folder" if kind == "LORA" else "expected a PEFT folder"
        inside = " or ".join(name for name in PEFT_TYPES if (folder / name).is_dir())
        if inside:
            expected = (
                f"its parts are in folders of their own, and this run's adapters are of one kind: "
                f"give {inside} in it"
            )
        raise UserError(f"{folder}: no adapter here (no {ADAPTER_CONFIG}); {expected}")
    settings = read_json_object(path)
    if settings.get("peft_type") != kind:
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')}; expected {kind}")
    return settings


def _read_lora_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    settings = _read_settings(folder, "LORA")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise UserError(
            f"{path}: peft cannot read it: {' '.join(str(error).split())}; save the adapter again"
        ) from None
    if key := _unsupported(config, settings):
        raise UserError(
            f"{path}: {key} is {settings.get(key)!r:.80}, and that cannot be read here; "
            "save the adapter as a plain LoRA"
        )
    return config


def _unsupported(config: "LoraConfig", settings: Mapping[str, Any]) -> str | None:
    """The first setting under which the adapter is more than updates of the base as it is."""
    if not _is_number(config.r, int) or config.r < 1:
        return "r"
    if not _is_number(config.lora_alpha, int | float):
        return "lora_alpha"
    ranks = config.rank_pattern or {}
    if not _is_pattern(ranks, int) or min(ranks.values(), default=1) < 1:
        return "rank_pattern"
    if not _is_pattern(config.alpha_pattern or {}, int | float):
        return "alpha_pattern"
    # Of a plain LoRA the factors are the same however the base stores its weight.
    if config.use_dora and config.fan_in_fan_out:
        return "fan_in_fan_out"
    if config.bias != "none":
        return "bias"
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _KEEPS_THE_BASE:
        return "init_lora_weights"
    # What a newer peft has added is unknown to this one's class, and harmless while it is off.
    unknown = settings.keys() - vars(config).keys() - {"runtime_config"}
    return next((key for key in (*_UNSUPPORTED, *sorted(unknown)) if settings.get(key)), None)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _is_pattern(pattern: Any, kind: Any) -> bool:
    """Whether it maps names, or harmless expressions, to numbers."""
    if not isinstance(pattern, dict) or len(pattern) > _MOST_KEYS:
        return False
    for key, value in pattern.items():
        if not _PLAIN_PATTERN.fullmatch(key) or not _is_number(value, kind):
            return False
        try:
            re.compile(key)
        except re.error:
            return False
    return True


def _factors(
    folder: Path, module: str, tensors: Mapping[str, Tensor], rank: int, has_magnitude: bool
) -> tuple[Tensor, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    expected = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if has_magnitude else [])]
    if sorted(tensors) != expected:
        *first, last = expected
        raise UserError(
            f"{path}: {module or 'the model'}: has {', '.join(sorted(tensors))}; "
            f"expected {', '.join(first)} and "
            f"{last}"
        )
    a_RI, b_OR = tensors["lora_A"], tensors["lora_B"]
    if a_RI.ndim != 2 or b_OR.ndim != 2:
        raise UserError(
            f"{path}: {module}: lora_A is {tuple(a_RI.shape)} and lora_B {tuple(b_OR.shape)}; "
            "expected the two matrices of a linear"
        )
    if a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise UserError(
            f"{path}: {module}: A has rank {a_RI.shape[0]} and B {b_OR.shape[1]}, and "
            f"{ADAPTER_CONFIG} says r={rank}; the two files do not belong together"
        )
    if has_magnitude and tensors["lora_magnitude_vector"].numel() != b_OR.shape[0]:
        raise UserError(
            f"{path}: {module}: {tensors['lora_magnitude_vector'].numel()} magnitudes of "
            f"{b_OR.shape[0]} outputs; the files do not belong together"
        )
    return a_RI, b_OR

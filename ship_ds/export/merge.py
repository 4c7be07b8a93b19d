"""Base + adapter -> a model folder that transformers loads, one tensor in memory at a time.

    OUT.part/plan.json                        what is being merged; another merge is refused here
    OUT.part/model-00001-of-00004.safetensors finished shards, each synced before it gets its name;
                                              a restart keeps them
    OUT/                                      when all is there: shards, index, config, tokenizer,
                                              generation config, merge.json
    OUT/prefix/                               of an adapter with a part that changes no weights:
                                              a folder that peft loads around the merged model

The largest thing held is one matrix's update in fp32; the base's own pages are mapped, and the
result is written in pieces.

Letters: I inputs of a linear, O outputs of a linear.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ship_ds.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_folder,
    weights_digest,
)
from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.export.targets import (
    RoundingError,
    TargetName,
    build_target,
    default_target,
    transposed_names,
)
from ship_ds.files import (
    disk_error,
    part_of,
    publish,
    refuse_existing,
    whole_file,
    write_json,
    write_text,
)
from ship_ds.lora_folder import Update, read_update
from ship_ds.origin import Origin, read_origin
from ship_ds.parsing import read_json_object
from ship_ds.safetensors_header import SINGLE_FILE, WEIGHTS_INDEX
from ship_ds.tensor_file import TensorFile
from ship_ds.weights_folder import WeightsFolder

MergedDtype = Literal["auto", "bfloat16", "float16", "float32"]
_PLAN, MERGE_REPORT, _CARD = "plan.json", "merge.json", "README.md"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ROUNDING = "ship_rounding_loss"
"""The key of a shard's RoundingError in its metadata."""


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the merged model and the base's tensors that go into it."""

    file: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything that decides the bytes of the merged model.

    Args:
        adapter: SHA-256 of the adapter's weights.
        base: Fingerprint of the base model.
        target: What is made of the two.
        dtype: Of the result; "auto" for that of each tensor of the base.
        shard_gigabytes: Size of a file, at most.
    """

    adapter: str
    base: str
    target: TargetName
    dtype: MergedDtype
    shard_gigabytes: float


class Merge:
    """One merge, checked when it is made, so that a wrong base or rank ends it before anything is
    written.

    Args:
        adapter: A LoRA or SHiRA folder of ours, or one with such a part.
        target: What to make of it and its base; None for what training saw.
        base: The base model; None for the one that the adapter was made for.
        dtype: Of the result; "auto" for that of each tensor of the base.
        shard_gigabytes: Size of a file, at most.

    Raises:
        UserError: The adapter is damaged, or it was made for another base.
    """

    def __init__(
        self,
        adapter: Path,
        target: TargetName | None = None,
        base: str | None = None,
        dtype: MergedDtype = "auto",
        shard_gigabytes: float = 2.0,
    ) -> None:
        self.adapter, self.origin = adapter, read_origin(adapter)
        self.folder = base_folder(base or self.origin.base)
        self.base = WeightsFolder(self.folder)
        # What stands before the prompt is no change of weights, and goes along as it is.
        changes, *self.around = self.origin.paths(adapter)
        for name in self.origin.folders:
            check_folder(adapter / name, name)
        self.update = read_update(changes, self._shape_of)
        self.config: dict[str, Any] = read_json_object(self.folder / "config.json")
        if transposed := transposed_names(self.folder) & self.update.shapes.keys():
            raise UserError(
                f"{self.folder}: {min(transposed)} lies transposed in its files (Conv1D), which "
                "cannot be merged into here: load base and adapter by peft, or merge there"
            )
        check_made_for_base(self.base, self.config, self.update, self.origin)
        target = target or default_target(self.origin.quantisation)
        self.plan = MergePlan(
            self.origin.adapter, self.base.fingerprint, target, dtype, shard_gigabytes
        )
        if weights_digest(self.origin.paths(adapter)) != self.origin.adapter:
            raise UserError(
                f"{' or '.join(str(one / ADAPTER_WEIGHTS) for one in self.origin.paths(adapter))}: "
                "not the file that its ship.json lists; export the adapter again"
            )
        self.target = build_target(target, self.folder, self.origin.quantisation)
        self.shards = self._shards()

    def _shape_of(self, path: str) -> tuple[int, int] | None:
        """Of a linear's weight as it lies in the base; None: the base has none there."""
        entry = self.base.entries.get(f"{path}.weight")
        if entry is None or len(entry.shape) != 2:
            return None
        num_out, num_in = entry.shape
        return num_out, num_in

    @property
    def differs_from_training(self) -> bool:
        """Whether the adapter is added to other weights than those it was trained around."""
        return self.plan.target == "original" and self.origin.quantisation == "nf4"

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor of the merged model; integers stay what they are."""
        dtype = self.base.entries[name].dtype
        if self.plan.dtype == "auto" or not dtype.is_floating_point:
            return dtype
        chosen: torch.dtype = getattr(torch, self.plan.dtype)
        return chosen

    def _shards(self) -> list[OutputFile]:
        groups: list[list[str]] = [[]]
        size = 0
        # In the order of the base's files, so that their pages are read one after the other.
        for name, entry in self.base.entries.items():
            num_bytes = self.target.num_bytes(name, entry.shape, self.dtype_of(name))
            if groups[-1] and size + num_bytes > self.plan.shard_gigabytes * 1e9:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += num_bytes
        if len(groups) == 1:
            return [OutputFile(SINGLE_FILE, tuple(groups[0]))]
        return [
            OutputFile(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(g))
            for i, g in enumerate(groups, 1)
        ]

    def run(
        self, out: Path, finish: Callable[[Path], Mapping[str, Any]] = lambda part: {}
    ) -> dict[str, Any]:
        """Write the merged model. After a kill, or when the disk was full, the same command goes on
        where it stopped.

        Args:
            out: Its folder, which must not exist yet.
            finish: Is shown the whole model before it gets its name, and adds to the report.

        Returns:
            What merge.json says.

        Raises:
            UserError: The folder is there already, or holds the beginning of another merge; or the
                disk is full.
        """
        refuse_existing(out)
        part = part_of(out)
        try:
            self._begin(part)
            num_kept = [self._write_shard(part, shard) for shard in self.shards].count(False)
            self._write_rest(part)
            self._write_around(part, out)
            report = {
                **asdict(self.plan),
                "adapter_folder": str(self.adapter),
                "made_from": self.origin.made_from,
                "num_shards": len(self.shards),
                "num_shards_kept": num_kept,
                **({"around": [path.name for path in self.around]} if self.around else {}),
                **self._rounding(part),
                **finish(part),
            }
            write_json(part / MERGE_REPORT, report, indent=2)
            publish(part, out)
        except OSError as error:
            advice = f"{part} keeps the finished shards; make room and run the same command again"
            raise disk_error(part, error, advice) from None
        # After the renaming: without its plan the folder would not be taken for this merge's.
        (out / _PLAN).unlink()
        return report

    def _begin(self, part: Path) -> None:
        plan = json.dumps(asdict(self.plan), indent=2) + "\n"
        # A start that was killed while it wrote its plan has left nothing but a part of that.
        is_ours = (part / _PLAN).is_file() and (part / _PLAN).read_text(encoding="utf-8") == plan
        if (
            part.exists()
            and not is_ours
            and any(path.name != part_of(part / _PLAN).name for path in part.iterdir())
        ):
            raise UserError(
                f"{part}: is left from another merge; run that one's command again, or "
                "remove the folder"
            )
        part.mkdir(parents=True, exist_ok=True)
        write_text(part / _PLAN, plan)

    def _write_shard(self, part: Path, shard: OutputFile) -> bool:
        """Write a file of the merged model; False where an earlier start had finished it."""
        path = part / shard.file
        if path.is_file():
            return False
        self.target.rounding.clear()
        shapes = self.update.shapes
        keys = [key for name in shard.names for key in self.target.names(name)]
        with whole_file(path) as beside, TensorFile(beside, keys) as file:
            for name in shard.names:
                dtype, module = self.dtype_of(name), name.removesuffix(".weight")
                delta_OI = self.update.delta(module) if module in shapes else None
                self.target.write(file, name, self.base.read(name), dtype, delta_OI)
            file.metadata[_ROUNDING] = json.dumps(asdict(self.target.rounding))
        return True

    def _rounding(self, part: Path) -> dict[str, float]:
        """What NF4 lost of the adapter's update; the shards carry their shares, so that a restart
        has them all."""
        total = RoundingError()
        for shard in self.shards:
            with safe_open(part / shard.file, "pt") as file:
                total += RoundingError(**json.loads(file.metadata()[_ROUNDING]))
        return (
            {"rounding_error_of_update": math.sqrt(total.lost / total.update)}
            if total.update
            else {}
        )

    def _write_rest(self, part: Path) -> None:
        """Index, config, card, and the base's tokenizer, generation config and licence."""
        dtype = self.dtype_of(f"{next(iter(self.update.shapes))}.weight")
        # Both would contradict what the target says of the weights and where they are now.
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("torch_dtype", "_name_or_path")
        }
        (part / "config.json").write_text(
            json.dumps(config | self.target.settings(dtype), indent=2) + "\n", encoding="utf-8"
        )
        if len(self.shards) > 1:
            places = {
                key: s.file
                for s in self.shards
                for name in s.names
                for key in self.target.names(name)
            }
            size = sum((part / shard.file).stat().st_size for shard in self.shards)
            (part / WEIGHTS_INDEX).write_text(
                json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
                + "\n",
                encoding="utf-8",
            )
        for path in sorted(filter(Path.is_file, self.folder.iterdir())):
            if path.suffix not in _WEIGHT_SUFFIXES and path.name not in (
                "config.json",
                _CARD,
                WEIGHTS_INDEX,
            ):
                shutil.copyfile(path, part / path.name)
        (part / _CARD).write_text(
            f"# {self.origin.base} with an adapter merged in\n\n- made from: "
            f"{json.dumps(self.origin.made_from)}\n"
            f"- target: {self.plan.target}, {dtype}\n- adapter weights sha256: "
            f"{self.plan.adapter}\n"
            f"- base fingerprint: {self.plan.base}\n- run: {self.origin.run}, weights sha256 "
            f"{self.origin.bundle}\n"
            f"- figures: {MERGE_REPORT}\n"
            + "".join(
                f"- {path.name}/ is the adapter's other part: peft loads it around this model\n"
                for path in self.around
            ),
            encoding="utf-8",
        )

    def _write_around(self, part: Path, out: Path) -> None:
        """The folders that `peft` loads around the merged model, which they now name."""
        for path in self.around:
            shutil.rmtree(part / path.name, ignore_errors=True)
            (part / path.name).mkdir()
            shutil.copyfile(path / ADAPTER_WEIGHTS, part / path.name / ADAPTER_WEIGHTS)
            config = read_json_object(path / ADAPTER_CONFIG)
            config["base_model_name_or_path"] = str(out.resolve())
            write_json(part / path.name / ADAPTER_CONFIG, config, indent=2)


def check_made_for_base(
    base: WeightsFolder, config: Mapping[str, Any], update: Update, origin: Origin
) -> None:
    """See that the adapter was made for this very base, and that its weights are plain.

    Args:
        base: The base model's weights.
        config: Its config.json.
        update: The adapter.
        origin: Where that comes from.

    Raises:
        UserError: They do not belong together, or the base is quantised already.
    """
    if "quantization_config" in config:
        raise UserError(
            f"{base.folder}: is quantised already; give the base it was made from, in 16 or 32 bits"
        )
    for path, shape in update.shapes.items():
        entry = base.entries.get(f"{path}.weight")
        if entry is None or entry.shape != shape:
            there = "no such weight" if entry is None else f"one of {entry.shape}"
            raise UserError(
                f"{base.folder}: the adapter changes {path}.weight of {shape}, and "
                f"the base has {there}: wrong base"
            )
    other = origin.other_than(base)
    if other == "weights":
        raise UserError(
            f"{base.folder}: same shapes, other weights than the base this adapter was made for "
            f"({origin.base}, fingerprint "
            f"{origin.base_fingerprint[:12]}): give that one as --base"
        )
    if other == "settings":
        raise UserError(
            f"{base.folder / 'config.json'}: same weights, other settings than the base this "
            "adapter was made for: give that one as --base"
        )

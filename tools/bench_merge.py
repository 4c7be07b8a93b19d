r"""Peak memory and seconds of the streamed merge beside `peft`'s in-memory one; adapters a second.

    python tools/bench_merge.py merge --gigabytes 1 4 --work /tmp/bench \
        --out tools/results/merge.json
    python tools/bench_merge.py adapters --run runs/quickstart --count 1000 \
        --work /tmp/bench --out tools/results/adapters.json

`merge` makes Llamas of random bf16 weights in shards of 1 GB and a random LoRA of rank 16 on all
seven projections. Each measurement is a process of its own; memory is counted beyond what it held
after its imports, pages of mapped files apart.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ship_ds.adapter_files import ADAPTER_WEIGHTS
from ship_ds.api import Ship
from ship_ds.export.deduce import export_many, generate
from ship_ds.export.merge import Merge
from ship_ds.export.requests import Request
from ship_ds.files import sha256
from ship_ds.lora_folder import Lora, write_lora
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.monitor.memory import PeakMemory, resident
from ship_ds.origin import Origin
from ship_ds.tensor_file import TensorFile
from ship_ds.weights_folder import WeightsFolder

HIDDEN, INNER, VOCABULARY, RANK = 2048, 8192, 32000, 16
SHARD_BYTES = 1_000_000_000
METHODS = ("original", "dequantised", "nf4", "peft")


def make_base(folder: Path, gigabytes: float) -> None:
    """Streamed, so that the benchmark itself needs no memory."""
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    num_layers = max(1, round((gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / per_layer))
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    groups: list[list[str]] = [[]]
    for name in shapes:
        if (
            sum(2 * shapes[other].numel() for other in groups[-1]) + 2 * shapes[name].numel()
            > SHARD_BYTES
        ):
            groups.append([])
        groups[-1].append(name)
    folder.mkdir(parents=True)
    generator, places = torch.Generator().manual_seed(0), {}
    for index, names in enumerate(groups, 1):
        shard = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        with TensorFile(folder / shard, names) as file:
            for name in names:
                places[name] = shard
                file.add(
                    name,
                    torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(
                        -0.03, 0.03, generator=generator
                    ),
                )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    config.save_pretrained(folder)


def make_adapter(folder: Path, base: Path) -> None:
    weights, generator = WeightsFolder(base), torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    factors = {
        name.removesuffix(".weight"): (draw(RANK, entry.shape[1]), draw(entry.shape[0], RANK))
        for name, entry in weights.entries.items()
        if "_proj" in name
    }
    folder.mkdir()
    write_lora(folder, Lora(factors, 2.0), str(base))
    Origin(
        "random",
        "none",
        "none",
        str(base),
        weights.fingerprint,
        "nf4",
        f"LoRA, rank {RANK}",
        {},
        [[1]],
        {"from_live": 0.0, "from_base": 1.0},
        sha256(folder / ADAPTER_WEIGHTS),
    ).write(folder)


def merge_with_peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(
        out, max_shard_size=SHARD_BYTES
    )


def measure(method: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    import peft  # noqa: F401  so that its import is not counted
    from transformers import LlamaForCausalLM  # noqa: F401

    def stream() -> None:
        Merge(adapter, method, shard_gigabytes=SHARD_BYTES / 1e9).run(out)  # type: ignore[arg-type]

    work: Callable[[], None] = (
        (lambda: merge_with_peft(base, adapter, out)) if method == "peft" else stream
    )
    before, started = resident(), time.perf_counter()
    with PeakMemory() as peak:
        work()
    largest = max(entry.end - entry.start for entry in WeightsFolder(base).entries.values())
    return {
        "method": method,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "own_megabytes": round(peak.anonymous / 1e6),
        "mapped_megabytes": round(peak.mapped / 1e6),
        "imports_megabytes": round((before["RssAnon"] + before["RssFile"]) / 1e6),
        "high_water_megabytes": round(resident()["VmHWM"] / 1e6),
        "largest_tensor_megabytes": round(largest / 1e6),
        "allowed_megabytes": round((4 * largest) / 1e6 + 300),
    }


def bench_merge(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for gigabytes in args.gigabytes:
        base, adapter, out = (args.work / name for name in ("base", "adapter", "out"))
        for folder in (base, adapter, out):
            shutil.rmtree(folder, ignore_errors=True)
        make_base(base, gigabytes)
        make_adapter(adapter, base)
        for method in METHODS:
            done = subprocess.run(
                [sys.executable, __file__, "one", "--method", method, "--work", str(args.work)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(
                {
                    "gigabytes": round(
                        sum(p.stat().st_size for p in base.glob("*.safetensors")) / 1e9, 2
                    ),
                    **json.loads(done.stdout.splitlines()[-1]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(out)
    return rows


def bench_adapters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Made (encoder and hypernetwork alone), and made, written, loaded back by `peft` and
    proved."""
    ship, out = Ship.from_run(args.run), args.work / "adapters"
    shutil.rmtree(out, ignore_errors=True)
    requests = [
        Request(f"{i:05d}", f"put {i % 10} at the front and remove {i % 7}")
        for i in range(args.count)
    ]
    started = time.perf_counter()
    for _ in generate(ship, requests):
        pass
    made = time.perf_counter() - started
    started = time.perf_counter()
    export_many(ship, requests, out, ["3 7 3 5"])
    proved = time.perf_counter() - started
    per_second = {
        name: round(args.count / seconds, 1)
        for name, seconds in (("made", made), ("proved", proved))
    }
    return [
        {"count": args.count, **{f"{name}_per_second": value for name, value in per_second.items()}}
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["merge", "adapters", "one"])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    parser.add_argument(
        "--work", type=Path, required=True, help="room for three times the largest model"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", default="runs/quickstart")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--method", choices=METHODS)
    args = parser.parse_args()
    if args.what == "one":
        print(
            json.dumps(
                measure(args.method, *(args.work / name for name in ("base", "adapter", "out")))
            )
        )
        return
    rows = bench_merge(args) if args.what == "merge" else bench_adapters(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", *sys.argv]).replace(str(args.work), "WORK")
        report = {
            "command": command,
            "machine": describe_machine(),
            "versions": versions(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

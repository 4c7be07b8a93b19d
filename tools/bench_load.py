"""Peak memory of a rank while a 4-bit base loads: transformers' way and one matrix at a time.
Writes tools/results/load.json.

    # two gloo ranks, a random Llama of 1.2 GB in bf16; three minutes a repeat
    python tools/bench_load.py

Memory is anonymous pages, in RAM or swapped out, sampled every two milliseconds, beyond what the
process held before: pages of a memory-mapped file belong to the kernel's cache and are left out.
The C library is told to give freed blocks back at once, or what it keeps for later would be
counted, which is up to the size of the model. Whatever way was taken, the gathered weights have the
same hash.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.monitor.memory import PeakMemory, resident

RESULTS = Path(__file__).parent / "results" / "load.json"
WAYS = (
    "transformers, then sharded",
    "one matrix at a time, sharded at once",
    "one matrix at a time, whole on each rank",
)


def make_base(folder: Path, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=2000,  # whole matrices in 16 bits would hide what is saved
    )
    model: Any = LlamaForCausalLM(settings)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300MB")


def load(way: str, folder: Path) -> Any:
    import deepspeed
    from transformers import AutoModelForCausalLM

    from ship_ds.config import TrainingConfig
    from ship_ds.model import nf4
    from ship_ds.model.loading import load_lm
    from ship_ds.runtime import shards
    from ship_ds.runtime.deepspeed_config import read_deepspeed_config

    if way == WAYS[1]:
        return load_lm(
            str(folder),
            "nf4",
            torch.bfloat16,
            shard=shards.sharder(TrainingConfig(deepspeed="zero3_bf16")),
        )
    if way == WAYS[2]:
        return load_lm(str(folder), "nf4", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.bfloat16,
        quantization_config=nf4.config(torch.bfloat16),
    )
    settings = read_deepspeed_config("zero3_bf16") | {"train_micro_batch_size_per_gpu": 1}
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    return model


def digest(model: Any) -> str:
    """Of every weight, gathered where it is sharded."""
    import deepspeed

    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found.update(
                name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            )
    return found.hexdigest()


def work(way: str, folder: Path, out: Path) -> None:
    from ship_ds.runtime import ranks

    ranks.start(1)
    started = time.perf_counter()
    held_before = resident()["RssAnon"]
    with PeakMemory() as peak:
        model = load(way, folder)
    mine = {
        "peak_bytes": peak.anonymous,
        "held_bytes": resident()["RssAnon"] - held_before,
        "seconds": round(time.perf_counter() - started, 1),
        "sha256": digest(model),
    }
    everyone = ranks.gather_objects(mine)
    if ranks.rank() == 0:
        out.write_text(json.dumps(everyone))
    ranks.exit_process(0)


def measure(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for _ in range(repeats):
        out = folder / "measured.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
        ]
        frees_at_once = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
            "MALLOC_TRIM_THRESHOLD_": "0",
        }
        subprocess.run(
            [*command, "--way", way, "--folder", str(folder), "--out", str(out)],
            check=True,
            env=frees_at_once,
        )
        runs += json.loads(out.read_text())
    assert len({run["sha256"] for run in runs}) == 1
    return {
        "peak_megabytes": [round(run["peak_bytes"] / 1e6) for run in runs],
        "held_megabytes": [round(run["held_bytes"] / 1e6) for run in runs],
        "seconds": [run["seconds"] for run in runs],
        "sha256": runs[0]["sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    for name in ("way", "folder", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return work(args.way, Path(args.folder), Path(args.out))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder, args.layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = {way: measure(way, folder, args.repeats) for way in WAYS}
    assert len({row["sha256"] for row in found.values()}) == 1
    RESULTS.parent.mkdir(exist_ok=True)
    report = {
        "command": f"python tools/bench_load.py --layers {args.layers} --repeats {args.repeats}",
        "ranks": "two, gloo, one thread each",
        "machine": describe_machine(),
        "versions": versions(),
        "base_megabytes": round(size / 1e6),
        "ways": found,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

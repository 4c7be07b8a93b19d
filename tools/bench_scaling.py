"""Training on one rank and on two, under ZeRO-2 and ZeRO-3; writes tools/results/scaling.json.

    python tools/bench_scaling.py --config quickstart
    python tools/bench_scaling.py --config quickstart --files zero2 zero3 --ranks 2 --rounds 10

The ranks of each group are processes that stay. A group takes some steps under one file of
ds_configs/, then under the next, then the other group, round after round, so that whatever else the
machine does meets all of them alike; who is not in turn waits without spinning. Every rank has one
thread. All take the same steps of the same run, so tokens are the same. A ratio is the median over
rounds of the two speeds within a round.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "scaling.json"


def work(files: Sequence[str], config: str, overrides: Sequence[str]) -> None:
    """A rank's process: for every line {"file": ..., "steps": ...} that it reads, take the steps
    and write {"seconds": ..., "tokens": ..., "loss": ...}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    from ship_ds.config import load_config
    from ship_ds.runtime import ranks
    from ship_ds.train import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            file: Trainer(
                load_config(
                    config,
                    [
                        "training.threads=1",
                        "training.max_minutes=null",
                        *overrides,
                        f"run.folder={folder}/{file}",
                        f"training.deepspeed={file}",
                    ],
                )
            )
            for file in files
        }
        print(json.dumps({"ready": ranks.rank()}), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            trainer = trainers[order["file"]]
            tokens = trainer.watch.tokens
            ranks.barrier()
            started = time.perf_counter()
            for _ in range(order["steps"]):
                trainer.take_step()
            row = {
                "seconds": time.perf_counter() - started,
                "tokens": trainer.watch.tokens - tokens,
            }
            if trainer.monitor is not None:
                rows = (trainer.folder / "metrics.jsonl").read_text().splitlines()
                row["loss"] = json.loads(rows[-1])["loss/total"]
            print(json.dumps(row), file=answers, flush=True)
    ranks.exit_process(0)


class Group:
    """The processes of one number of ranks."""

    def __init__(self, num_ranks: int, arguments: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ
                | {
                    "PYTHONPATH": str(REPOSITORY),
                    "OMP_NUM_THREADS": "1",
                    "OMP_WAIT_POLICY": "passive",
                    "HF_HUB_OFFLINE": "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
            )
            for rank in range(num_ranks)
        ]
        self._read()

    def take_steps(self, file: str, steps: int) -> dict[str, float]:
        """Rank 0's figures of so many steps."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"file": file, "steps": steps}) + "\n")
            process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        rows = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"bench_scaling: a rank ended with code {process.wait()}")
            rows.append(json.loads(line))
        first: dict[str, float] = rows[0]
        return first

    def close(self) -> None:
        for process in self.processes:
            process.communicate()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every case, and the ratios."""
    overrides = ["--config", args.config, *args.overrides, "--files", *args.files]
    groups = {num_ranks: Group(num_ranks, overrides) for num_ranks in args.ranks}
    speeds: dict[tuple[int, str], list[float]] = {}
    losses: dict[tuple[int, str], float] = {}
    for turn in range(args.rounds + 1):
        for num_ranks, group in groups.items():
            for file in args.files:
                row = group.take_steps(file, args.steps)
                losses[num_ranks, file] = row["loss"]
                if turn:  # the first warms up: ZeRO-3 records its order of gathers in it
                    speeds.setdefault((num_ranks, file), []).append(row["tokens"] / row["seconds"])
    for group in groups.values():
        group.close()
    return {
        "command": "python tools/bench_scaling.py " + " ".join(sys.argv[1:]),
        "steps_a_round": args.steps,
        "rounds": args.rounds,
        "tokens_per_second": {
            f"{file}, {num_ranks} rank(s)": {
                "median": round(statistics.median(values), 1),
                "min": round(min(values), 1),
                "max": round(max(values), 1),
                "last_loss": losses[num_ranks, file],
            }
            for (num_ranks, file), values in speeds.items()
        },
        "ratios": _ratios(speeds, args),
    }


def _ratios(speeds: dict[tuple[int, str], list[float]], args: argparse.Namespace) -> dict[str, Any]:
    """Every file to the first, at each number of ranks; every number to the first, under each
    file."""
    pairs = {
        f"{file} to {args.files[0]}, {n} rank(s)": (speeds[n, file], speeds[n, args.files[0]])
        for n in args.ranks
        for file in args.files[1:]
    } | {
        f"{n} ranks to {args.ranks[0]}, {file}": (speeds[n, file], speeds[args.ranks[0], file])
        for n in args.ranks[1:]
        for file in args.files
    }
    rows = {}
    for name, (values, references) in pairs.items():
        ratios = [value / other for value, other in zip(values, references, strict=True)]
        rows[name] = {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--files", nargs="+", default=["zero2", "zero3"], help="of ds_configs/")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=8, help="of a case in each round")
    parser.add_argument("--rounds", type=int, default=6, help="that count; one more warms up")
    parser.add_argument("--label", help="the name of this row; default: the config's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.worker:
        work(args.files, args.config, args.overrides)
        return
    from ship_ds.allocator import allocator_in_use, use_scalable_malloc
    from ship_ds.monitor.machine import add_row

    # All ranks inherit the allocator that a training takes.
    use_scalable_malloc()
    row = compare(args) | {"malloc": allocator_in_use()}
    add_row(args.out, args.label or args.config, row)


if __name__ == "__main__":
    main()

r"""Time to the first token from `ship-ds serve`, and what many adapters in a batch cost.

    python tools/bench_serve.py --run runs/quickstart --out tools/results/serve.json

The first part starts the verb as a user does, and asks it over HTTP, one request after another: an
instructions that it has not seen, and then the same once more. What is timed is the event of a
stream that brings the first token, and the processor's time that the server took for it: on a
machine with other work the two differ.

The second part writes the same 16 inputs by the decoder of the server, once under 16 adapters, once
under these with the base's 4-bit weights as they lie (a CPU keeps them dequantised), and once under
one, in turns whose order is drawn; all of it on as many threads as there are cores, as the verb
runs where nobody says otherwise, and on one. No answer ends before its length, or the two would not
write equally many tokens: the end of sequence is taken for a token like others.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import torch

from ship_ds.api import Ship
from ship_ds.files import write_json
from ship_ds.model.nf4_linear import Nf4Linear
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.serving.decoding import AnswerWriter, Row, Sampling, Source
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics

NUM_ADAPTERS = 16
FIRST = ("add 1", "add 2", "add 3", "reverse the list", "remove every 3", "keep the first 4")
SECOND = ("sort the list", "remove element 2", "take the last 3", "add 4", "repeat the list")


def unseen(known: Sequence[str], count: int) -> list[str]:
    """Instructions of two steps that the run was not trained on."""
    made = [f"{one} and then {other}" for one, other in product(FIRST, SECOND)]
    return [text for text in made if text not in set(known)][:count]


def seconds_to_first_token(client: httpx.Client, instruction: str, text: str) -> float | None:
    """From sending to the event with the first token; None: the instruction cannot be read."""
    body = {"model": f"ship:{instruction}", "prompt": text, "stream": True, "max_tokens": 1}
    since = time.perf_counter()
    with client.stream("POST", "/completions", json=body) as told:
        if told.status_code == 400:
            return None
        told.raise_for_status()
        next(line for line in told.iter_lines() if line.startswith("data: {"))
        return time.perf_counter() - since


def processor_seconds(process: int) -> float:
    """Of a process, all its threads together, until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_tokens(run: Path, instructions: Sequence[str], text: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ship_ds.cli", "serve", "--run", str(run), "--port", "0"]
    measured: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(": ")[0]
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                for warm in ("add 5", "add 6", "add 7"):
                    seconds_to_first_token(client, warm, text)
                for kind in ("unseen", "cached"):
                    before = processor_seconds(process.pid)
                    asked = [seconds_to_first_token(client, one, text) for one in instructions]
                    seconds = [one for one in asked if one is not None]
                    used = processor_seconds(process.pid) - before
                    measured[kind] = {
                        "requests": len(seconds),
                        "ms": spread(seconds, 1000),
                        "processor_ms": round(1000 * used / len(seconds), 1),
                    }
        finally:
            process.terminate()
    return measured


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(factor * statistics.median(ordered), 1),
        "p90": round(factor * ordered[int(0.9 * (len(ordered) - 1))], 1),
        "largest": round(factor * ordered[-1], 1),
    }


def tokens_a_second(
    ship: Ship, sources: Sequence[Source], text: str, length: int
) -> tuple[float, float]:
    """Of rows that begin together, until all are done, by the clock and by the processor's time;
    their adapters are made within it."""
    decoder = AnswerWriter(ship.model, Limits(), Metrics())
    sampling = Sampling(length)
    question = ship.model.question(text)
    decoder.submit([Row(source, question, sampling, lambda piece: None) for source in sources])
    since, used = time.perf_counter(), time.process_time()
    while not decoder.is_idle:
        decoder.turn()
    num_tokens = len(sources) * length
    used = time.process_time() - used
    return num_tokens / (time.perf_counter() - since), num_tokens / used


def batches(run: Path, instructions: Sequence[str], text: str, turns: int) -> dict[str, Any]:
    ship = Ship.from_run(run)
    ship.model.prompts.eos_id = -1
    roles = [ship.model.encoder, ship.model.task_llm, ship.model.decoder]
    linears = [one for role in roles for one in role.modules() if isinstance(one, Nf4Linear)]
    kept = [one.unpacked for one in linears]
    many = [Source(one, ship.model.encode([one]).cpu(), one) for one in instructions[:NUM_ADAPTERS]]
    cases = {"adapters_16": many, "adapters_1": many[:1] * NUM_ADAPTERS, "rows_1": many[:1]}
    if any(one is not None for one in kept):
        cases |= {"adapters_16_packed": many, "rows_1_packed": many[:1]}
    threads = sorted({1, len(os.sched_getaffinity(0))}, reverse=True)
    runs = [(count, name) for count in threads for name in cases]
    speeds: dict[tuple[int, str], list[tuple[float, float]]] = {run: [] for run in runs}
    rng = random.Random(0)
    for turn in range(turns + 1):
        # In an order of its own each: what ran before decides what is in the processor's caches.
        for count, name in rng.sample(runs, len(runs)):
            torch.set_num_threads(count)
            for linear, weight in zip(linears, kept, strict=True):
                linear.unpacked = None if name.endswith("_packed") else weight
            speed = tokens_a_second(ship, cases[name], text, 64)
            if turn:  # the first one warms up
                speeds[count, name].append(speed)
    return {
        "rows": NUM_ADAPTERS,
        "new_tokens": 64,
        "turns": turns,
        "threads": {
            str(count): compared({name: speeds[count, name] for name in cases}) for count in threads
        },
    }


def compared(speeds: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """The cases on one number of threads: how fast each is, and the ratios of their turns."""

    def over(one: str, other: str, kind: int) -> float:
        """The median of the turns' ratios, by the clock (0) or by the processor's time (1)."""
        pairs = zip(speeds[one], speeds[other], strict=True)
        return round(statistics.median(a[kind] / b[kind] for a, b in pairs), 3)

    unpacked = {
        f"{name}_over_packed_by_processor_time": over(name, f"{name}_packed", 1)
        for name in ("adapters_16", "rows_1")
        if f"{name}_packed" in speeds
    }
    return {
        "tokens_a_second": {
            name: spread([speed for speed, _ in values]) for name, values in speeds.items()
        },
        "tokens_a_processor_second": {
            name: spread([speed for _, speed in values]) for name, values in speeds.items()
        },
        "adapters_16_over_1": over("adapters_16", "adapters_1", 0),
        "adapters_16_over_1_by_processor_time": over("adapters_16", "adapters_1", 1),
        **unpacked,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    ship = Ship.from_run(options.run)
    text, instructions = ship.probes[0], unseen(ship.known, options.count)
    del ship
    result = {
        "command": f"python tools/bench_serve.py --run RUN --count {options.count} "
        f"--turns {options.turns} --out tools/results/serve.json",
        "machine": describe_machine(),
        "versions": versions(),
        "first_token": first_tokens(options.run, instructions, text),
        "batch": batches(options.run, instructions, text, options.turns),
    }
    write_json(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

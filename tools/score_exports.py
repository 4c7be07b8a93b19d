r"""What a run's adapters answer after they have left it: by `peft` on the base that training saw,
and merged into each target, beside the live ones.

    python tools/score_exports.py --run RUN --part unseen --num-tasks 16 --work FOLDER \
        --out tools/results/exports.json

Each task's instruction becomes a folder, as `ship-ds deduce` writes it, and a merged model for each
target, as `ship-ds merge` does; what stands before the prompt, where an adapter has such a part, is
loaded around it by `peft`. Every way is asked the task's test inputs, greedily, by transformers'
own `generate` but for the live one. By way: each metric with its interval over tasks, and the share
of answers that are the live adapter's.

Writes JSON, prints a line a way. A merged model is removed once it has answered.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ship_ds.api import Ship
from ship_ds.console import no_log
from ship_ds.data.source import source_of
from ship_ds.errors import UserError
from ship_ds.evaluation.measure import columns_of_answers
from ship_ds.evaluation.metrics import summary
from ship_ds.evaluation.questions import PARTS, Question, ask, tasks_of
from ship_ds.export.deduce import export_many
from ship_ds.export.drift import load_merged
from ship_ds.export.merge import Merge
from ship_ds.export.proof import PeftBase
from ship_ds.export.requests import Request, slug
from ship_ds.export.targets import TargetName
from ship_ds.files import write_json
from ship_ds.model.loading import load_lm
from ship_ds.monitor.machine import describe_machine, versions
from ship_ds.origin import read_origin
from ship_ds.runtime import ranks

TARGETS: tuple[TargetName, ...] = ("original", "dequantised", "nf4")
METRICS = ("exact_match", "rouge_l")
Answers = list[list[str | None]]
"""Of each task."""


def questions_of(ship: Ship, part: Any, num_tasks: int) -> list[Question]:
    """Tasks of a part, evenly spaced."""
    splits = source_of(ship.config.data).read(ship.model.prompts.tokenizer, no_log)
    return [ask(task, 0, 0, part=part) for task in tasks_of(splits, part, num_tasks)]


def write(model: Any, ship: Ship, wording: str, inputs: Sequence[str]) -> list[str | None]:
    """What a transformers model writes to each input, greedily; None where it does not end."""
    prompts = ship.model.prompts
    ends = [prompts.eos_id, *prompts.other_ends]
    texts: list[str | None] = []
    for text in inputs:
        ids = torch.tensor([list(ship.model.question(text, wording))])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ship.config.evaluation.max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=prompts.pad_id,
        )[0, ids.shape[1] :].tolist()
        ended = written[-1] in ends
        texts.append(prompts.finished_text([*written[:-1], prompts.eos_id]) if ended else None)
    return texts


def by_peft(ship: Ship, folders: Sequence[Path], questions: Sequence[Question]) -> Answers:
    """On the base in the numbers of training."""
    config, cpu = ship.config.model.task_llm, torch.device("cpu")
    base = PeftBase(load_lm(config.base, config.quantisation, ship.dtype, device=cpu), cpu)
    answers = []
    for folder, question in zip(folders, questions, strict=True):
        model = base.load(read_origin(folder).paths(folder))
        answers.append(write(model, ship, question.wording, question.inputs))
    return answers


def merged(
    ship: Ship,
    target: TargetName,
    folders: Sequence[Path],
    questions: Sequence[Question],
    work: Path,
) -> Answers:
    """Each adapter in a model of its own."""
    answers, base = [], str(ship.config.model.task_llm.base)
    for folder, question in zip(folders, questions, strict=True):
        out = work / "merged"
        Merge(folder, target, base).run(out)
        model = PeftBase(load_merged(out), torch.device("cpu"))
        around = [out / name for name in read_origin(folder).folders[1:]]
        loaded = model.load(around) if around else model.base
        answers.append(write(loaded, ship, question.wording, question.inputs))
        shutil.rmtree(out)
    return answers


def scores(answers: Answers, live: Answers, questions: Sequence[Question]) -> dict[str, Any]:
    """The metrics, and how many answers are the live adapter's."""
    columns = columns_of_answers(answers, questions)
    rows = [
        {metric: columns[metric][place] for metric in METRICS} for place in range(len(questions))
    ]
    pairs = [pair for row in zip(answers, live, strict=True) for pair in zip(*row, strict=True)]
    return summary(METRICS, rows) | {"as_live": sum(a == b for a, b in pairs) / len(pairs)}


def measure(run: Path, part: str, num_tasks: int, work: Path) -> dict[str, Any]:
    """Every way of one run."""
    ship = Ship.from_run(run, "cpu")
    questions = questions_of(ship, part, num_tasks)
    if not questions:
        raise UserError(f"--part {part}: {run} has no task there")
    texts = [question.wording for question in questions]
    live = ship.answer_many(texts, [question.inputs for question in questions])
    requests = [Request(f"{n:03d}-{slug(text)}", text) for n, text in enumerate(texts)]
    folders = [work / "adapters" / request.name for request in requests]
    batch = export_many(ship, requests, work / "adapters", ship.probes)
    found = {"live": scores(live, live, questions)}
    found["peft"] = scores(by_peft(ship, folders, questions), live, questions)
    for target in TARGETS:
        answers = merged(ship, target, folders, questions, work)
        found[f"merged, {target}"] = scores(answers, live, questions)
    return {
        "run": run.name,
        "part": part,
        "folders": read_origin(folders[0]).folders,
        "from_live": batch.worst.from_live,
        "from_base": batch.worst.from_base,
        "ways": found,
        "machine": describe_machine(),
        "versions": versions(),
    }


def main(arguments: list[str]) -> int:
    """Measure, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--part", default="unseen", choices=PARTS)
    parser.add_argument("--num-tasks", type=int, default=16)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    ranks.quiet_libraries()
    try:
        found = measure(given.run, given.part, given.num_tasks, given.work)
    except UserError as error:
        print(f"score_exports: {error}", file=sys.stderr)
        return 2
    for way, one in found["ways"].items():
        said = ", ".join(
            f"{metric} {one[metric]['value']:.3f} {one[metric]['ci95']}" for metric in METRICS
        )
        print(f"{way}: {said}; {100 * one['as_live']:.0f} % of the answers are the live adapter's")
    if given.out is not None:
        write_json(given.out, found, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

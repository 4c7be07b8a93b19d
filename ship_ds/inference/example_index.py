"""Which known tasks have examples like those given, by the words that they have in common.

TF-IDF (Spärck Jones 1972) with logarithms of counts, compared by cosine (Salton & Buckley 1988),
over the words of inputs, pairs of neighbours among these, and the words of targets. Nothing is
trained and no model reads anything, so it is the first thing that an induction may look at and the
control that a trained one has to beat.

    index = ExampleIndex.of_tasks(splits.seen)
    index.resemblance([[Example("2 3 5", "5 3 2")]])  -> [[0.41, 0.02, ...]], a cosine a row
    index.nearest([[Example("2 3 5", "5 3 2")]], 8)   -> [[41, 7, ...]], rows of index.instructions
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np

from ship_ds.data.task import Example, SplitTask
from ship_ds.data.words import words_and_marks

_MOST_EXAMPLES = 24
"""Training examples that are read of a task. The text of the most alike of 596 known tasks has
ROUGE-L 0.367, 0.382 and 0.390 with those of 123 dev tasks of Super-NaturalInstructions where 4, 8
and 24 are read."""
_MOST_WORDS = 400
"""That are read of an input or a target; the rest of a long passage says little more of its
task."""
_NUM_FEATURES = 2**20
"""Into which words are hashed: no vocabulary has to be kept, and none of the data is kept in clear.
The hash has no secret: whoever has a word can ask whether it is there."""
_VERSION = "1"
"""Of what is counted; an index of another one is made again."""
COUNTED = {"version": _VERSION, "examples": _MOST_EXAMPLES, "words": _MOST_WORDS}
"""What a score that comes of an index depends on."""


@dataclass(frozen=True, eq=False)
class ExampleIndex:
    """Known instructions by the words of their tasks' examples.

    Args:
        instructions: one a row, each once.
        counts: how often each feature occurs in its examples: a CSR matrix of scipy, a row an
            instruction, `_NUM_FEATURES` columns.
    """

    instructions: tuple[str, ...]
    counts: Any

    @classmethod
    def of_tasks(cls, tasks: Sequence[SplitTask]) -> "ExampleIndex":
        """Of tasks that were trained on, by the examples that they were trained on; tasks with one
        instruction share a row, and one without examples is in none."""
        read: dict[str, list[Example]] = {}
        for task in tasks:
            if task.train:
                read.setdefault(task.task.instruction, []).extend(task.train[:_MOST_EXAMPLES])
        return cls(tuple(read), _counts(list(read.values())))

    def resemblance(self, tasks: Sequence[Sequence[Example]]) -> np.ndarray:
        """How alike each task's examples and those of each row are: cosines from 0, no word in
        common, to 1, of shape (tasks, rows)."""
        if not self.instructions or not tasks:
            return np.zeros((len(tasks), len(self.instructions)))
        transform, known = self._weighing
        alike: np.ndarray = (transform.transform(_counts(tasks)) @ known.T).toarray()
        return alike

    def nearest(self, tasks: Sequence[Sequence[Example]], count: int) -> list[list[int]]:
        """The rows whose examples are most like each task's, most alike first.

        Args:
            tasks: the examples of each.
            count: of rows a task, at most: one without a word in common is left out.
        """
        alike = self.resemblance(tasks)
        # Stable: of equal ones the first, on every machine.
        order = np.argsort(-alike, axis=1, kind="stable")[:, :count]
        return [
            [int(row) for row in rows if alike[task, row] > 0] for task, rows in enumerate(order)
        ]

    @cached_property
    def _weighing(self) -> tuple[Any, Any]:
        """TF-IDF as fitted on the rows, and the rows under it."""
        from sklearn.feature_extraction.text import TfidfTransformer

        transform = TfidfTransformer(sublinear_tf=True)
        return transform, transform.fit_transform(self.counts)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept of it beside `metadata`; see `of_arrays`."""
        counts = self.counts
        kept = {"ends": counts.indptr, "features": counts.indices, "counts": counts.data}
        return {name: array.astype(np.int32) for name, array in kept.items()}

    def metadata(self) -> dict[str, str]:
        """What is kept of it beside `arrays`, as texts."""
        return {"version": _VERSION, "instructions": json.dumps(self.instructions)}

    @classmethod
    def of_arrays(
        cls, arrays: dict[str, np.ndarray], metadata: dict[str, str]
    ) -> "ExampleIndex | None":
        """An index that was kept; None of one that counts other things.

        Raises:
            ValueError, KeyError, TypeError: they are no index.
        """
        from scipy.sparse import csr_matrix

        if metadata["version"] != _VERSION:
            return None
        instructions = tuple(json.loads(metadata["instructions"]))
        parts = arrays["counts"].astype(np.float64), arrays["features"], arrays["ends"]
        counts = csr_matrix(parts, shape=(len(instructions), _NUM_FEATURES))
        counts.check_format(full_check=True)
        # Of whose logarithm TF-IDF is made.
        if counts.nnz and counts.data.min() < 1:
            raise ValueError("counts below 1")
        return cls(instructions, counts)


def _counts(tasks: Sequence[Sequence[Example]]) -> Any:
    """How often each feature occurs in each task's examples, as a CSR matrix."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    if not tasks:
        return csr_matrix((0, _NUM_FEATURES))
    hashing = HashingVectorizer(
        analyzer=_features, n_features=_NUM_FEATURES, norm=None, alternate_sign=False
    )
    return hashing.transform(tasks)


def _features(examples: Sequence[Example]) -> Iterator[str]:
    """The words of inputs, their neighbours, and the words of targets; those of inputs and of
    targets apart, as "yes" in a passage says other things than "yes" for an answer."""
    for example in examples:
        words = list(islice(words_and_marks(example.input), _MOST_WORDS))
        yield from (f"input {word}" for word in words)
        yield from (f"input {one} {two}" for one, two in pairwise(words))
        for word in islice(words_and_marks(example.target), _MOST_WORDS):
            yield f"target {word}"

"""Results with the head of class statistics, beside those of texts alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mulki.runs.answers import ACC1_HEAD, RECALL1, Answers
from mulki.runs.metrics import (
    ACC1_SEEN_HEAD,
    HEAD_METRICS,
    AccuracyMatrix,
    ClassIncremental,
)
from mulki.runs.results import Evaluation


@dataclass(frozen=True)
class WithHead:
    """What the models of a run score where `mulki.clip.head` answers.

    Attributes:
        matrix: accuracies in percent, a row for each learned task. A data set of captions has its
            recall, which no head changes; there is no zero-shot row, since the start model has no
            statistics.
        class_incremental: A_i of the same.
    """

    matrix: AccuracyMatrix
    class_incremental: ClassIncremental

    def with_row(self, after_task: str, answers: Mapping[str, Answers], seen: float) -> WithHead:
        """These and one more row.

        Args:
            answers: by data set, with a head for each data set of classes.
            seen: A_i in percent.
        """
        row = {name: round((each.head or each).accuracy, 4) for name, each in answers.items()}
        after = {**self.class_incremental.after, after_task: round(seen, 4)}
        return WithHead(self.matrix.with_row(after_task, row), ClassIncremental(after))

    def to_dict(self) -> dict[str, object]:
        """As ``summary.json`` holds it."""
        return {
            "tasks": list(self.matrix.tasks),
            "columns": list(self.matrix.columns),
            "matrix": [list(row) for row in self.matrix.rows],
            "metrics": self.matrix.metrics().to_dict(),
            "class_incremental": self.class_incremental.to_dict(),
        }

    def metrics(self) -> dict[str, float | None]:
        """Those of `mulki.runs.metrics.HEAD_METRICS`."""
        found = self.matrix.metrics().to_dict() | self.class_incremental.metrics()
        return {name: found[of] for name, of in HEAD_METRICS.items()}

    @classmethod
    def of_lines(
        cls, lines: Iterable[Evaluation], columns: Sequence[str], tasks: Sequence[str]
    ) -> WithHead | None:
        """From ``results.jsonl``; None where a row of these learned tasks has no head.

        Raises:
            InputError: a value that is no percentage.
        """
        values: dict[str, dict[str, float]] = {task: {} for task in tasks}
        after = {}
        for line in lines:
            if line.after_task not in values:
                continue
            if line.metric == ACC1_SEEN_HEAD:
                after[line.after_task] = round(line.value, 4)
            elif line.metric in (ACC1_HEAD, RECALL1):
                values[line.after_task][line.eval_dataset] = round(line.value, 4)
        if after.keys() != values.keys() or any({*columns} - of.keys() for of in values.values()):
            return None
        rows = tuple(tuple(values[task][column] for column in columns) for task in tasks)
        return cls(
            AccuracyMatrix(tuple(columns), tuple(tasks), rows),
            ClassIncremental({task: after[task] for task in tasks}),
        )

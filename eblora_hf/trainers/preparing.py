"""Has every task's data prepared as the trainer's constructor prepares its own."""

import dataclasses
from typing import Any

from ..tasks import Task, TaskSequence
from .surface import TrainerSurface


class PreparingMixin(TrainerSurface):
    """
    For trainers that prepare their data in the constructor by a method `_prepare_dataset`, as TRL's do: templates,
    tokens, packing. They see the data set of one task; the others are prepared by the same method in the same way.
    """

    _seen: Any = None  # the training set that the parent's constructor is given
    _how: tuple[tuple, dict[str, Any]] | None = None  # with what else it calls `_prepare_dataset`

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if dataset is self._seen and self._how is None:
            self._how = args, kwargs
        return super()._prepare_dataset(dataset, *args, **kwargs)  # type: ignore[misc]

    def prepared(self, tasks: TaskSequence) -> TaskSequence:
        """
        The tasks with their data as the parent's constructor has prepared those of the first.

        Raises:
            ValueError: if it has done so in a way that cannot be repeated for further tasks.
        """
        first, *others = tasks
        if self._how is None and others and self.train_dataset is not first.train_dataset:
            raise ValueError(
                f"The constructor of {type(self).__mro__[1].__name__} has prepared the data of the task "
                f"{first.name!r}, but not by a method `_prepare_dataset(dataset, ...)` that could be called for "
                f"{', '.join(task.name for task in others)}. Give it such a method, or prepare the data beforehand."
            )
        self._check_columns(tasks)
        done = [dataclasses.replace(first, train_dataset=self.train_dataset)]
        done += [dataclasses.replace(task, train_dataset=self.prepared_alone(task)) for task in others]
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {first.name: self.eval_dataset}
        return TaskSequence(
            [
                dataclasses.replace(task, eval_dataset=task.eval_dataset and sets.get(task.name, task.eval_dataset))
                for task in done
            ]
        )

    def _check_columns(self, tasks: TaskSequence) -> None:
        """Raises a `ValueError` for a task of whose columns the model takes none, before another one is learnt."""
        self._set_signature_columns_if_needed()
        for task in tasks if self._how is None and self.args.remove_unused_columns else ():
            columns = getattr(task.train_dataset, "column_names", None)
            taken: list[str] = self._signature_columns or []
            if isinstance(columns, list) and taken and not set(columns) & set(taken):
                raise ValueError(
                    f"The task {task.name!r} has the columns {', '.join(columns)}, but the model takes "
                    f"{', '.join(taken)}: all tasks of a sequence are inputs of one model. Prepare "
                    "its data, or pass TrainingArguments(remove_unused_columns=False) if a collator does."
                )

    def prepared_alone(self, task: Task) -> Any:
        """The training set of a task as the parent's constructor would have prepared it."""
        if self._how is None:
            return task.train_dataset
        args, kwargs = self._how
        return self._prepare_dataset(task.train_dataset, *args, **kwargs)

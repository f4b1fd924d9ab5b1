"""The forms of rows of public data sets, and how they become views: one file for each evaluation task that has such a form.

The preparation and the scoring both read the rows of a task through `data_prep/task_rows.py`, which asks here. So the contexts that are
scored are the contexts that are kept out of training. The other half of a task, its options, metrics and score, is in `pretrain/tasks`.
"""

import importlib
import importlib.util

from data_prep.tasks.row_format import RowFormat


def public_row_format(task: str) -> RowFormat | None:
    """Return the form in which the public data set of a task has its rows, from `data_prep.tasks.TASK`; None if the task knows none."""
    name = f"{__name__}.{task}"
    if not task.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    row_format: RowFormat | None = getattr(importlib.import_module(name), "ROW_FORMAT", None)
    return row_format

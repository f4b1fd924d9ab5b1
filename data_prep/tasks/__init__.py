"""Row formats of public data sets and the views that they make: one file for each evaluation task with a format.

The preparation and the evaluation both read the rows of a task through `data_prep/task_rows.py`, which uses these
formats. Therefore the evaluated contexts are exactly the ones that are kept out of training. The options, metrics and
scores of a task are in `pretrain/tasks`.
"""

import importlib
import importlib.util

from data_prep.tasks.row_format import RowFormat


def public_row_format(task: str) -> RowFormat | None:
    """Return the row format of a task's public data set, from `data_prep.tasks.TASK`, or None if there is none."""
    name = f"{__name__}.{task}"
    if not task.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    row_format: RowFormat | None = getattr(importlib.import_module(name), "ROW_FORMAT", None)
    return row_format

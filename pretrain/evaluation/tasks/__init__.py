"""Downstream tasks, a file each. A task is a function from a TaskRun to metrics; rates are fractions."""

from pretrain.evaluation.tasks import loss, nl_rx

TASKS = {"nl_rx": nl_rx.evaluate, "loss": loss.evaluate}

"""Downstream tasks, a file each. A task is a function from a TaskRun to metrics; rates are fractions."""

from pretrain.evaluation.tasks import geometry, gsm8k, hellaswag, loss, nl_rx, nq_open, retrieval, rotten_tomatoes, spider, yelp

TASKS = {module.__name__.rsplit(".", 1)[1]: module.evaluate
         for module in (nl_rx, gsm8k, spider, rotten_tomatoes, yelp, nq_open, hellaswag, retrieval, geometry, loss)}

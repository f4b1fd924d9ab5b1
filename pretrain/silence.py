"""Less output of libraries."""

import os

from pretrain.imports import import_transformers


def silence_libraries() -> None:
    """Hide the messages and progress bars of transformers and tokenizers among the lines of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_transformers()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

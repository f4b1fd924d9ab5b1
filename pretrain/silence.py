"""Less output of libraries."""

import os


def silence_libraries() -> None:
    """Hide the messages and progress bars of transformers and tokenizers among the lines of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

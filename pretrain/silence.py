"""Less output of libraries."""

import os


def silence_transformers() -> None:
    """Hide the notes and progress bars of transformers, which it would print among the lines of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

"""Generate answers: `launcher/generate.py RUN|EXPORT [PROMPT ...] [--file FILE] [--sample]`."""

from pretrain.inference.generate import main

if __name__ == "__main__":
    main()

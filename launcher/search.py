"""Search texts by meaning: `launcher/search.py RUN|EXPORT --index FILE [QUERY ...] [--file FILE]`."""

from pretrain.inference.search import main

if __name__ == "__main__":
    main()

"""Check a run before it starts.

Usage: `python launcher/doctor.py CONFIG [key=value ...] [--hostfile H] [--json] [--write-env]`.
"""

from pretrain.cluster.doctor import main

if __name__ == "__main__":
    main()

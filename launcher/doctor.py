"""What would go wrong with a run, before it starts: `python launcher/doctor.py CONFIG [key=value ...] [--hostfile H] [--json] [--write-env]`."""

from pretrain.cluster.doctor import main

if __name__ == "__main__":
    main()

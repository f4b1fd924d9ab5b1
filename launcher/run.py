"""Pretrain: `deepspeed [...] launcher/run.py CONFIG [key=value ...]`, or under torchrun, srun or plain python."""

from pretrain.training.main import main

if __name__ == "__main__":
    main()

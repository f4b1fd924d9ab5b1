"""Write a first configuration for your data: `launcher/init.py FILE|FOLDER|HUB_NAME [-o configs/mine.yaml]`."""

from pretrain.init.main import main

if __name__ == "__main__":
    main()

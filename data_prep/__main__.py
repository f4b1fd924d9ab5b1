"""`python -m data_prep CONFIG [key=value ...]`: prepare the corpus of a configuration."""

import argparse

from data_prep.config import DataConfig, load_yaml, validate
from data_prep.console import UserError, exit_on_user_error
from data_prep.pipeline import prepare


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Turn a corpus into paired-view token shards.")
    parser.add_argument("config", help="YAML file of the run; its `data` section is used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    arguments = parser.parse_args()
    values = load_yaml(arguments.config, arguments.overrides)
    if "data" not in values:
        raise UserError(f"{arguments.config} has no `data` section")
    prepare(validate(DataConfig, values["data"], "data"))


if __name__ == "__main__":
    exit_on_user_error(main)

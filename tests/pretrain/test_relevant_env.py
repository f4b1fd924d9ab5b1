"""Secrets are removed from texts that are shown or written."""

import pytest

from pretrain.relevant_env import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("401 for url 'http://me:pa55@127.0.0.1:80/x'", "401 for url 'http://***@127.0.0.1:80/x'"),
        ("postgresql://u:pa/ss@host/db", "postgresql://***@host/db"),
        ("mysql+pymysql://u:p@ss#w@host/db", "mysql+pymysql://***@host/db"),
        ("postgresql://host/db?user=u&password=hunter2&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        ("https://host/?access_token=abc", "https://host/?access_token=***"),
        ("tokens hf_abcdefghij and api_org_abcdefghij", "tokens *** and ***"),
        ("the value very-secret of WANDB_API_KEY", "the value *** of WANDB_API_KEY"),
        ("https://host/path?page=2 and sqlite:///runs/mlflow.db", None),
    ],
)
def test_secrets_are_removed(text, expected):
    assert redact(text, {"WANDB_API_KEY": "very-secret", "HOME": "/path"}) == (expected or text)

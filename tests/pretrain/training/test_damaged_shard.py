"""A flipped bit in a shard ends a run on all ranks with one error line and a checkpoint.

The run resumes from that checkpoint once the shard is fixed.
"""

import json

import pyarrow as pa
import pyarrow.ipc
import pytest

from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.models.language_model import special_ids
from pretrain.planning.plan import make_loader
from pretrain.run_folder import list_steps, read_status
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config

STEP = 4
"""Step that reads the damaged record."""


def flip_a_token(shard, view: str, record: int) -> None:
    """Flip the lowest bit of the first token of a record's view."""
    content = pa.memory_map(str(shard)).read_buffer()
    column = pa.ipc.open_file(content).get_batch(0).column(view)
    offset = column.buffers()[3].address - content.address + 2 * column.offsets[record].as_py()
    changed = bytearray(shard.read_bytes())
    changed[offset] ^= 1
    shard.write_bytes(changed)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Train on two ranks with a flipped bit in a record that only rank 1 reads.

    Return the run folder, the shard and its original bytes, the record, the finished process and its command.
    """
    folder = tmp_path_factory.mktemp("damaged")
    path = write_config(folder, tiny_config(folder, train__steps=6, checkpoint={"every": 100}))
    prepare_corpus(path)
    config = load_config(path)
    corpus = Corpus(config.data.path, "train")
    layout = config.objective.make_layout(special_ids(corpus.tokenizer, 448), 2, "all")
    loader = make_loader(config, corpus, layout)
    rows = [loader.next_rows(8) for _ in range(STEP)][-1].select(4, 8)  # rank 1 reads the second half
    record = next(record for record in rows.records.tolist() if record not in (0, len(corpus) - 1))
    [shard] = (folder / "corpus").glob("train-*.arrow")
    original = shard.read_bytes()
    flip_a_token(shard, "code", record)
    command = ranks_command(2, "launcher/run.py", path)
    done = run_command(command, check=False)
    return {
        "run": config.run_dir,
        "shard": shard,
        "original": original,
        "record": record,
        "done": done,
        "command": command,
    }


def test_all_ranks_end_and_one_error_line_names_the_row(damaged):
    done, shard, record = damaged["done"], damaged["shard"], damaged["record"]
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert (
        f"error: the shard {shard} is corrupt or from a different preparation: "
        f"row {record}, counted from 0: its checksum is wrong; "
    ) in output


def test_the_steps_before_are_kept_and_the_run_resumes_once_the_shard_is_fixed(damaged):
    run, status = damaged["run"], read_status(damaged["run"])
    assert status["status"] == "failed" and "is corrupt" in status["reason"] and status["step"] == STEP - 1
    assert status["again"] is False  # a restart would fail in the same way
    assert list_steps(run / "checkpoints") == [STEP - 1]
    damaged["shard"].write_bytes(damaged["original"])
    assert f"resuming from step {STEP - 1}" in run_command(damaged["command"]).stdout
    assert read_status(run)["status"] == "finished"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_shard_that_is_truncated_during_a_run_is_named(tmp_path):
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=8))
    prepare_corpus(path)
    [shard] = (tmp_path / "corpus").glob("train-*.arrow")
    size = shard.stat().st_size
    done = run_command(
        ["python", str(ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"), "truncate:5", str(path)],
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stdout + done.stderr
    assert (
        f"error: the shard {shard} is corrupt or from a different preparation: "
        f"it has {size // 2} bytes instead of {size}" in done.stderr
    )

"""A bit that flips while a run goes on ends it on all ranks, in one line, with a checkpoint from which it goes on once the shard is mended."""

import json

import pyarrow as pa
import pyarrow.ipc
import pytest

from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.models.language_model import special_ids
from pretrain.run_folder import list_steps, read_status
from pretrain.training.setup import make_loader
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config

STEP = 4
"""The step that meets the damage."""


def flip_a_token(shard, view: str, record: int) -> None:
    """Flip the lowest bit of the first token of a record's view."""
    content = pa.memory_map(str(shard)).read_buffer()
    column = pa.ipc.open_file(content).get_batch(0).column(view)
    place = column.buffers()[3].address - content.address + 2 * column.offsets[record].as_py()
    changed = bytearray(shard.read_bytes())
    changed[place] ^= 1
    shard.write_bytes(changed)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A run on two ranks that meets a flipped bit in a record that rank 1 alone reads; what it did, and the mended shard."""
    folder = tmp_path_factory.mktemp("damaged")
    path = write_config(folder, tiny_config(folder, train__steps=6, checkpoint={"every": 100}))
    prepare_corpus(path)
    config = load_config(path)
    corpus = Corpus(config.data.path, "train")
    layout = config.objective.make_layout(special_ids(corpus.tokenizer, 448), 2, "all")
    loader = make_loader(config, corpus, layout)
    rows = [loader.next_rows(8) for _ in range(STEP)][-1].select(4, 8)  # the second half is that of rank 1
    record = next(record for record in rows.records.tolist() if record not in (0, len(corpus) - 1))
    [shard] = (folder / "corpus").glob("train-*.arrow")
    whole = shard.read_bytes()
    flip_a_token(shard, "code", record)
    command = ranks_command(2, "launcher/run.py", path)
    done = run_command(command, check=False)
    return {"run": config.run_dir, "shard": shard, "whole": whole, "record": record, "done": done, "command": command}


def test_all_ranks_end_and_one_says_in_a_line_which_row_it_is(damaged):
    done, shard, record = damaged["done"], damaged["shard"], damaged["record"]
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert (
        f"error: the shard {shard} is damaged or of another run: row {record}, counted from 0: its checksum does not hold; "
        in said
    )


def test_the_steps_before_are_kept_and_the_run_goes_on_once_the_shard_is_mended(damaged):
    run, status = damaged["run"], read_status(damaged["run"])
    assert status["status"] == "failed" and "is damaged" in status["reason"] and status["step"] == STEP - 1
    assert status["again"] is False  # another start would meet the same
    assert list_steps(run / "checkpoints") == [STEP - 1]
    damaged["shard"].write_bytes(damaged["whole"])
    assert f"going on from step {STEP - 1}" in run_command(damaged["command"]).stdout
    assert read_status(run)["status"] == "finished"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_shard_that_is_truncated_while_a_run_reads_it_is_named(tmp_path):
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
        f"error: the shard {shard} is damaged or of another run: it has {size // 2} bytes, the manifest says {size}"
        in done.stderr
    )

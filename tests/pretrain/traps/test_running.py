"""Traps of complete runs on real ranks: a single process, and two ranks on two simulated nodes.

The runs are trained by trapped_runs.py.
"""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from data_prep import encode
from data_prep.layout import Pairing, SpecialTokenIds, make_layout
from data_prep.nlrx_grammar import generate
from data_prep.shards import read_manifest
from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data.loader import Loader
from pretrain.run_folder import list_steps, step_name
from pretrain.training.checkpoint import check
from pretrain.training.checkpoint_loading import consolidate
from pretrain.training.distributed import World
from pretrain.training.setup import set_up
from tests.commands import ROOT, TIMEOUT, free_port, run_command, start, tiny_config, write_config
from tests.mutants import assert_detects_mutant, assert_fails_with

WORKER = ROOT / "tests/pretrain/traps/trapped_runs.py"
STEPS = 3
RUNS = {
    "plain": {"train__micro_batch_rows": 8},
    "accumulated": {"train__micro_batch_rows": 2},
    "bf16": {
        "train__precision": "bf16",
        "train__learning_rate": 1e-4,
        "train__warmup_fraction": 0.0,
        "train__final_rate": 1.0,
    },
    "dropout": {"objective__dropout": 0.3},
}
SINGLE_PROCESS_RUNS = [
    ("launcher-needed", "launcher_needed", "plain"),
    ("plain", "", "plain"),
    ("accumulated", "", "accumulated"),
    ("per-micro-batch", "pairs_of_a_micro_batch", "accumulated"),
    ("bf16", "", "bf16"),
    ("no-master", "no_master_weights", "bf16"),
    ("unmeasured", "losses_alone", "plain"),
    ("dropout", "", "dropout"),
    ("resumed", "stopped", "plain"),
    ("resumed", "", "plain"),
    ("deleted", "stopped+deleted_at_start", "plain"),
    ("deleted", "deleted_at_start", "plain"),
]
"""Name, changes and settings of the single-process runs, in their order.

`launcher_needed` has an effect only in a process that has not trained a run before, so it is the first.
"""
TWO_RANK_RUNS = [
    ("two-ranks", "", "dropout"),
    ("dropout-per-rank", "dropout_in_the_loss", "dropout"),
    ("saved-by-rank-0", "saved_by_rank_0", ""),
    ("tokenizing", "tokenized_at_start", ""),
    ("two-writers", "device_0_is_rank_0", ""),
]
"""Name, changes and settings of the two-rank runs. `device_0_is_rank_0` is the last because it ends both ranks."""
NO_GPU = 'raise RuntimeError("no CUDA GPUs are available")\n'
TOKENIZING_ON_A_GPU = """
from data_prep.tokenizer import Tokenizer
original = Tokenizer.encode_ragged
def encode_ragged(self, texts):
    import torch
    return tuple(torch.from_numpy(array).cuda().numpy() for array in original(self, texts))
Tokenizer.encode_ragged = encode_ragged
"""


def write_sources(folder: Path) -> list[dict]:
    sources = []
    for split, rows in (("train", 500), ("validation", 40)):
        path = folder / f"{split}.jsonl"
        pairs = (generate(0, split, index) for index in range(rows))
        path.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs))
        sources.append({"type": "json", "split": split, "path": str(path)})
    return sources


class Prepared(NamedTuple):
    folder: Path
    done: dict[str, subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def prepared_without_torch(tmp_path_factory) -> Prepared:
    """Prepare a corpus without an importable torch. Then try the same, as `mutant`, with a tokenizer that needs torch.

    The sources are removed afterwards.
    """
    folder = tmp_path_factory.mktemp("running")
    done = {}
    sources = write_sources(folder)
    for name, more in (("corpus", {}), ("mutant", {"sitecustomize.py": TOKENIZING_ON_A_GPU})):
        modules = folder / f"{name}-modules"
        modules.mkdir()
        for file, content in ({"torch.py": NO_GPU} | more).items():
            (modules / file).write_text(content)
        config = write_config(
            folder, tiny_config(folder, name=name, data__sources=sources, data__path=str(folder / name))
        )
        done[name] = run_command(
            ["python", "-m", "data_prep", str(config)], check=False, PYTHONPATH=f"{modules}:{ROOT}"
        )
    for source in sources:
        Path(source["path"]).unlink()
    return Prepared(folder, done)


def write_arguments(folder: Path, runs: list[tuple[str, str, str]]) -> list[str]:
    """Write the configurations of the runs and return the arguments of the worker."""
    arguments = []
    for name, changes, settings in runs:
        values = tiny_config(
            folder,
            name=name,
            objective__distance="cosine",
            train__steps=STEPS,
            monitor__loggers=[],
            data__sources=[],
            **RUNS.get(settings, {}),
        )
        arguments.append(f"{changes}:{write_config(folder, values)}")
    return arguments


@pytest.fixture(scope="module")
def folder(prepared_without_torch) -> Path:
    """Run the single process and the two ranks at the same time, and return the folder of all runs."""
    folder = prepared_without_torch.folder
    two_nodes = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    two_rank_arguments = write_arguments(folder, TWO_RANK_RUNS)
    commands = {
        "alone": (write_arguments(folder, SINGLE_PROCESS_RUNS), {}),
        **{f"rank-{rank}": (two_rank_arguments, two_nodes | {"SLURM_PROCID": str(rank)}) for rank in range(2)},
    }
    processes = []
    for process_name, (arguments, variables) in commands.items():
        with open(folder / f"{process_name}.log", "w") as output:
            processes.append(start(["python", WORKER, *arguments], output, output, **variables))
    try:
        for process in processes:
            process.wait(TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    expected_codes = (0, 2, 2)  # both ranks report device_0_is_rank_0 as an error of the user
    for process_name, process, code in zip(commands, processes, expected_codes, strict=True):
        assert process.returncode == code, (folder / f"{process_name}.log").read_text()[-4000:]
    return folder


def metrics(folder: Path, name: str) -> list[dict]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outcome(folder: Path, name: str, rank: int = 0) -> dict:
    path = folder / f"{name}.rank{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def equal_metrics(one: list[dict], other: list[dict], tags: tuple[str, ...]) -> bool:
    return [[line[tag] for tag in tags] for line in one] == [
        pytest.approx([line[tag] for tag in tags], rel=1e-4) for line in other
    ]


def test_trap_04_the_pair_loss_is_normalised_over_accumulated_micro_batches(folder):
    def check_against_a_single_micro_batch(name):
        single, accumulated = metrics(folder, "plain"), metrics(folder, name)
        assert len(single) == len(accumulated) == STEPS
        assert equal_metrics(single, accumulated, ("loss/total", "loss/lm", "loss/jepa", "optimizer/grad_norm")), (
            "accumulation changes the gradient"
        )

    check_against_a_single_micro_batch("accumulated")
    assert_fails_with(
        lambda: check_against_a_single_micro_batch("per-micro-batch"), "accumulation changes the gradient"
    )


def moments(state) -> list[torch.Tensor]:
    """Return all first and second moments in the nested state of an optimizer."""
    if isinstance(state, dict):
        return [
            tensor
            for key, value in state.items()
            for tensor in ([value] if key in ("exp_avg", "exp_avg_sq") else moments(value))
        ]
    return [tensor for part in state for tensor in moments(part)] if isinstance(state, list | tuple) else []


def test_trap_05_bf16_has_fp32_master_weights_and_moments(folder):
    def check_fp32_master_weights_and_moments(name):
        checkpoint = folder / "runs" / name / "checkpoints" / step_name(STEPS)
        norms = {key: value for key, value in consolidate(checkpoint).items() if "norm" in key}
        assert norms and all(((value.double() - 1).abs() > 1e-5).any() for value in norms.values()), (
            "small updates of weights near 1 are lost"
        )
        [shard] = checkpoint.glob("*optim_states.pt")
        found = moments(torch.load(shard, weights_only=False))
        assert found and all((tensor.float() != tensor.bfloat16().float()).any() for tensor in found), (
            "moments are rounded"
        )

    check_fp32_master_weights_and_moments("bf16")
    assert_fails_with(
        lambda: check_fp32_master_weights_and_moments("no-master"), "small updates of weights near 1 are lost"
    )


def test_trap_11_a_collapse_is_measured(folder):
    def check_measures(name):
        last = metrics(folder, name)[-1]
        for prefix in ("embedding/", "validation/embedding/"):
            measures = {
                prefix + measure for measure in ("paired_cosine", "shuffled_cosine", "effective_rank", "retrieval_at_1")
            }
            assert measures <= last.keys(), "only the losses are measured"

    check_measures("plain")
    assert_fails_with(lambda: check_measures("unmeasured"), "only the losses are measured")


def test_trap_13_records_longer_than_a_row_are_dropped_and_counted_or_refused(prepare_in_process, tmp_path):
    texts = [(f"number {number}", f"[{number}]") for number in range(30)]
    long = [("0123456789" * 9, "[0-9]"), ("a long one", "0123456789" * 4)]
    corpora = []

    def check_every_record_fits_or_is_counted():
        corpus = prepare_in_process([*texts, *long], sequence_length=96)
        corpora.append(corpus)
        dropped = read_manifest(corpus.folder)["dropped"]
        assert dropped.get("too_long", {}).get("count") == len(long), "records are too long for a row"
        layout = make_layout("joint", SpecialTokenIds(0, 1, 2, 3, 400), pairing=Pairing(12))
        rows = Loader(corpus, layout, 96, seed=0, epochs=1).next_rows(len(texts))
        assert sorted(rows.records) == list(range(len(texts)))

    def no_length_limit(patch):
        patch.setattr(encode, "positions_needed", lambda lengths: lengths[:, 0] * 0)

    assert_detects_mutant(no_length_limit, check_every_record_fits_or_is_counted, "records are too long for a row")
    fitting, too_long = corpora
    prepended = {"direction": "both", "predictor_tokens": 12, "predictor_placement": "prepend"}
    for name, corpus, length, objective in (("too-long", too_long, 96, {}), ("prepended", fitting, 40, prepended)):
        values = tiny_config(
            tmp_path,
            name=name,
            data__path=str(corpus.folder),
            data__sources=[],
            data__deduplicate="exact",
            data__sequence_length=length,
        )
        values["data"]["tokenizer"] = {"vocab_size": 320}
        values["objective"] |= objective
        with pytest.raises(UserError, match="too short for the records"):
            set_up(load_config(write_config(tmp_path, values)), World(0, 1, torch.device("cpu")))


def test_trap_14_the_records_without_pairs_do_not_depend_on_ranks(folder):
    def check_against_one_rank(name):
        one_rank, two_ranks = metrics(folder, "dropout"), metrics(folder, name)
        assert len(one_rank) == len(two_ranks) == STEPS
        assert equal_metrics(one_rank, two_ranks, ("records", "loss/jepa")), "every rank draws its own records"
        assert two_ranks[-1]["records"] > metrics(folder, "plain")[-1]["records"], (
            "positions that are free without the dropped pairs are not used"
        )

    check_against_one_rank("two-ranks")
    assert_fails_with(lambda: check_against_one_rank("dropout-per-rank"), "every rank draws its own records")


def test_trap_15_a_second_start_resumes_the_run(folder):
    def check_the_second_start(name):
        assert outcome(folder, name)["ended"] == "finished"
        assert [line["step"] for line in metrics(folder, name)] == [1, 2, 3]
        assert list_steps(folder / "runs" / name / "checkpoints") == [2, 3], "the first start is lost"

    check_the_second_start("resumed")
    assert_fails_with(lambda: check_the_second_start("deleted"), "the first start is lost")


def test_trap_16_one_rank_writes_metrics_and_all_ranks_save(folder):
    def check_the_run_of_two_nodes(name):
        steps = [line["step"] for line in metrics(folder, name)]
        assert steps == [1, 2, 3], "two ranks write metrics"
        checkpoint = folder / "runs" / name / "checkpoints" / step_name(STEPS)
        assert len(list(checkpoint.glob("*optim_states.pt"))) == 2, "a rank's shard is missing"
        assert check(checkpoint) is None and outcome(folder, name, rank=1)["ended"] == "finished"

    check_the_run_of_two_nodes("two-ranks")
    assert ["step      1" in (folder / f"rank-{rank}.log").read_text() for rank in range(2)] == [True, False]
    assert_fails_with(lambda: check_the_run_of_two_nodes("two-writers"), "two ranks write metrics")
    assert_fails_with(lambda: check_the_run_of_two_nodes("saved-by-rank-0"), "a rank's shard is missing")


def test_trap_17_neither_a_gpu_to_tokenize_nor_a_launcher_to_train_is_needed(folder, prepared_without_torch):
    def check_the_preparation(name):
        assert prepared_without_torch.done[name].returncode == 0, "tokenizing needs a GPU"

    def check_the_run_of_one_process(name):
        assert outcome(folder, name)["ended"] == "finished", "one process alone cannot train"

    check_the_preparation("corpus")
    assert_fails_with(lambda: check_the_preparation("mutant"), "tokenizing needs a GPU")
    check_the_run_of_one_process("plain")
    assert_fails_with(lambda: check_the_run_of_one_process("launcher-needed"), "one process alone cannot train")


def test_trap_24_no_rank_tokenizes_at_startup(folder):
    # the sources were removed before these runs, and the ranks could not tokenize them anyway

    def check_texts(name):
        assert [outcome(folder, name, rank)["tokenized"] for rank in (0, 1)] == [0, 0], "a rank tokenizes"

    check_texts("two-ranks")
    assert_fails_with(lambda: check_texts("tokenizing"), "a rank tokenizes")

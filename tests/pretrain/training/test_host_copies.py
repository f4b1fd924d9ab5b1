"""Host copies of the state from which a checkpoint is written."""

from itertools import groupby

import torch

from pretrain.training.host_copies import HostCopies
from tests.commands import ROOT, prepare_corpus, run_command, tiny_config, write_config

WORKER = ROOT / "tests" / "pretrain" / "training" / "copy_order.py"


def state(seed: int, width: int = 5) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, width, generator=generator)
    return {
        "weights": weights,
        "again": weights,
        "moments": [torch.randn(7, generator=generator).bfloat16(), (torch.tensor(seed),)],
        "step": seed,
    }


def tensors_of(value: dict) -> list[torch.Tensor]:
    return [value["weights"], value["moments"][0], value["moments"][1][0]]


def test_a_copy_does_not_change_when_the_original_does():
    copies, original = HostCopies(torch.device("cpu")), state(1)
    copies.begin()
    copied = copies.copy(original)
    copies.before_change()
    for tensor in tensors_of(original):
        tensor.zero_()
    original["moments"].append("later")
    copies.wait()
    assert copied["step"] == 1 and len(copied["moments"]) == 2
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype
        for one, other in zip(tensors_of(copied), tensors_of(state(1)), strict=True)
    )
    assert copied["again"] is copied["weights"], "a tensor that is referenced twice should be copied once"


def test_the_next_save_reuses_the_same_memory():
    copies = HostCopies(torch.device("cpu"))
    addresses = []
    for seed in (1, 2):
        copies.begin()
        files = [copies.copy(state(seed)), copies.copy(state(seed + 10))]
        addresses.append([tensor.data_ptr() for file in files for tensor in tensors_of(file)])
        for file, number in zip(files, (seed, seed + 10), strict=True):
            assert all(
                torch.equal(one, other) for one, other in zip(tensors_of(file), tensors_of(state(number)), strict=True)
            )
    assert addresses[0] == addresses[1] and len(set(addresses[0])) == 6


def test_tensors_of_a_different_shape_get_new_memory():
    copies = HostCopies(torch.device("cpu"))
    for width in (5, 9, 5):
        copies.begin()
        assert torch.equal(copies.copy(state(3, width))["weights"], state(3, width)["weights"])


def test_a_run_waits_for_the_copies_before_it_changes_or_writes_anything(tmp_path):
    path = write_config(tmp_path, tiny_config(tmp_path, train__steps=2, checkpoint={"every": 1, "background": False}))
    prepare_corpus(path)
    printed = run_command(["python", str(WORKER), path]).stdout
    events = [
        event for event, _ in groupby(line.split()[1] for line in printed.splitlines() if line.startswith("event "))
    ]
    assert [event for event in events if event != "update"] == 2 * ["before_change", "begin", "copy", "wait"]
    updates = [index for index, event in enumerate(events) if event == "update"]
    assert len(updates) == 2 and all(events[index - 1] == "before_change" for index in updates)

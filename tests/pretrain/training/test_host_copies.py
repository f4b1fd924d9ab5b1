"""The copies from which a checkpoint is written."""

import torch

from pretrain.training.host_copies import HostCopies


def state(seed: int, width: int = 5) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, width, generator=generator)
    return {"weights": weights, "again": weights, "moments": [torch.randn(7, generator=generator).bfloat16(), (torch.tensor(seed),)], "step": seed}


def flat(value: dict) -> list[torch.Tensor]:
    return [value["weights"], value["moments"][0], value["moments"][1][0]]


def test_a_copy_does_not_change_with_the_original():
    copies, original = HostCopies(torch.device("cpu")), state(1)
    copies.begin()
    copied = copies.copy(original)
    copies.before_change()
    for tensor in flat(original):
        tensor.zero_()
    original["moments"].append("later")
    copies.wait()
    assert copied["step"] == 1 and len(copied["moments"]) == 2
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(flat(copied), flat(state(1)), strict=True))
    assert copied["again"] is copied["weights"], "what stands in two places is copied once"


def test_the_next_save_takes_the_same_memory():
    copies = HostCopies(torch.device("cpu"))
    addresses = []
    for seed in (1, 2):
        copies.begin()
        files = [copies.copy(state(seed)), copies.copy(state(seed + 10))]
        addresses.append([tensor.data_ptr() for file in files for tensor in flat(file)])
        for file, number in zip(files, (seed, seed + 10), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(flat(file), flat(state(number)), strict=True))
    assert addresses[0] == addresses[1] and len(set(addresses[0])) == 6


def test_tensors_of_another_shape_get_memory_of_their_own():
    copies = HostCopies(torch.device("cpu"))
    for width in (5, 9, 5):
        copies.begin()
        assert torch.equal(copies.copy(state(3, width))["weights"], state(3, width)["weights"])

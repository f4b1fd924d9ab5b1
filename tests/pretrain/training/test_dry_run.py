"""The plan that `--dry-run` prints matches the run."""

import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from pretrain.cluster.estimate import PROCESS_BYTES, estimate_resources
from pretrain.config import load_config
from pretrain.data import order
from pretrain.data.batch import assemble
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Consumed, Loader
from pretrain.models import head
from pretrain.models.attention import visibility_mask
from pretrain.models.language_model import LanguageModel, build_model_config, random_causal_lm, special_ids
from pretrain.models.lora import add_adapters
from pretrain.objectives.base import ForwardPass, Objective, build_objective
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.pool import select_pair_embeddings
from pretrain.planning.budget import consumed_fraction
from pretrain.planning.memory import activations
from pretrain.planning.plan import make_loader, make_plan
from pretrain.sections import LoraConfig
from pretrain.training.main import main
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.families import FAMILIES
from tests.pretrain.evaluation.test_lora import WITHOUT_PEFT
from tests.pretrain.training.test_launchers import INVALID_CONFIGS, write_invalid_config

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""A shape whose model states need much more memory than anything else."""
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
EPOCH = {"train__steps": None, "train__epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


@pytest.fixture
def plan(folder, monkeypatch, capsys):
    """Return a function that plans the tiny configuration with changes, and returns the columns of each printed row."""

    def plan(ranks: int | None = None, **changes) -> dict[str, list[str]]:
        if ranks:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
        path = write_config(folder, tiny_config(folder, **{"name": "planned"} | changes))
        monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run", "seed=3"])
        main()
        return rows_of(capsys.readouterr().out)

    return plan


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the other columns of each line by its first column. At least two spaces separate columns."""
    split = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    rows: dict[str, list[str]] = {}
    for name, *columns in split:
        key = f"{name} {columns[0]}" if re.match(r"(no )?ZeRO", name) else name
        assert key not in rows or not columns, f"{key} is printed twice"
        rows[key] = columns
    return rows


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%"))


def test_the_plan_of_a_step_matches_the_loader_and_the_mask(folder, plan):
    rows = plan(**EPOCH, objective__dropout=0.25, objective__predictor_tokens=2)
    config = load_config(folder / "planned.yaml")
    corpus = Corpus(config.data.path, "train")
    specials = special_ids(corpus.tokenizer, 448)
    layout = config.objective.make_layout(specials, corpus.views, "all")
    loader = Loader(corpus, layout, 128, config.seed, dropout=0.25)
    planned = int(next(name for name in rows if name.startswith("one step, mean of")).split()[-2])
    batches = [loader.next_rows(8) for _ in range(planned)]
    assert planned > 10 and loader.epoch == 0
    loader.next_rows(8)
    assert loader.epoch == 1, "the plan should cover all full steps of the epoch and not the partial last one"
    visible = targets = 0
    for batch in batches:
        tensors = assemble(batch, corpus, layout, specials, 128, len(batch.records))
        padding = batch.count * 128 - int(batch.segment_lengths.sum())
        # each padding position sees itself
        visible += int(visibility_mask(tensors.visible_until, "sdpa").sum()) - padding
        targets += len(tensors.label_index)
    expected = {
        "records": sum(len(batch.records) for batch in batches),
        "corpus tokens": sum(batch.lengths.sum() for batch in batches),
        "pairs": sum(batch.paired.sum() for batch in batches),
        "positions": sum(batch.segment_lengths.sum() for batch in batches),
        "predictor tokens": 2 * sum(batch.paired.sum() for batch in batches),
        "next-token targets": targets,
        "FLOPs, attention scores": 12 * 2 * 32 * visible,
    }
    for name, total in expected.items():
        assert number(rows[name][0]) == pytest.approx(total / planned, rel=0.01, abs=0.5), name
    assert number(rows["padding"][0]) / 100 == pytest.approx(1 - expected["positions"] / planned / (8 * 128), abs=0.001)


SCHEDULES = {
    "the first quarter": {"active": [0, 0.25]},
    "from the middle on": {"weight_schedule": [[0.5, 0], [0.6, 1]], "dropout": 0.25},
    "rising dropout": {"dropout": [[0, 0], [0.8, 0.9]], "active": [0, 0.8]},
}


@pytest.mark.parametrize("budget", [{"steps": 120}, {"tokens": 90_000}, {"records": 2300}, {"epochs": 4}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_plan_is_the_mean_over_a_run_whose_terms_are_switched(folder, plan, schedule, budget):
    """Compare with the steps of the loader up to the end of the run."""
    changes = {f"objective__{key}": value for key, value in SCHEDULES[schedule].items()}
    ((unit, amount),) = budget.items()
    plan(**changes | {"train__steps": None, f"train__{unit}": amount})
    config = load_config(folder / "planned.yaml")
    corpus = Corpus(config.data.path, "train")
    planned = make_plan(config, corpus)
    layout = config.make_layout(special_ids(corpus.tokenizer, 448), corpus.views)
    loader = make_loader(config, corpus, layout)
    steps = []
    while consumed_fraction(loader.consumed, config.train, loader.records) < 1:
        steps.append(loader.next_rows(8))
    pairs = [int(step.paired.sum()) for step in steps]
    assert 0 in pairs and len(steps) > 90, "the test needs a switch"
    one_step = Consumed(1, planned.step.records, planned.step.tokens)
    expected_steps = 1 / consumed_fraction(one_step, config.train, loader.records)
    assert expected_steps == pytest.approx(len(steps), abs=1, rel=0.01)
    assert expected_steps * planned.step.records == pytest.approx(loader.consumed.records, rel=0.02)
    assert expected_steps * planned.step.tokens == pytest.approx(loader.consumed.tokens, rel=0.02)
    # a step may begin before the switch and end after it, and each epoch draws other records
    assert expected_steps * planned.step.pairs == pytest.approx(sum(pairs), rel=0.04)
    assert expected_steps * planned.step.stream.positions == pytest.approx(
        sum(step.segment_lengths.sum() for step in steps), rel=0.02
    )
    targets = [layout.count_lm_targets(step.lengths, step.segment_lengths).sum() for step in steps]
    assert expected_steps * planned.step.stream.targets == pytest.approx(sum(targets), rel=0.02)
    without_pairs = [count for count, number in zip(targets, pairs, strict=True) if not number]
    assert planned.step.max_counts["lm"] == pytest.approx(np.mean(without_pairs), rel=0.03)


def test_the_printed_plan_names_the_part_with_pairs_and_totals_the_whole_run(folder, plan):
    rows = plan(train__steps=100, objective__active=[0, 0.25])
    assert "note: means of a step are over the whole run; the terms on pairs are active in 25% of it" in rows
    always, never = plan(train__steps=100), plan(train__steps=100, objective={"name": "next_token"})
    for name in ("records", "corpus tokens", "total FLOPs"):
        mixed = 0.25 * number(always[name][0]) + 0.75 * number(never[name][0])
        assert number(rows[name][0]) == pytest.approx(mixed, rel=0.015), name
    assert number(rows["pairs"][0]) == pytest.approx(0.25 * number(always["pairs"][0]), abs=0.5)
    rising = plan(objective__dropout=[[0, 0], [1, 0.5]], train__steps=640)
    (note,) = (name for name in rising if name.startswith("note: means of a step"))
    assert note.endswith("are active in 100% of it, with objective.dropout from 0.00 to 0.50")
    assert not any(name.startswith("note: means of a step") for name in always)
    tube = plan(objective={"name": "semantic_tube", "weight": 0.02, "active": [0, 0.25]})
    assert not any(name.startswith("note: means of a step") for name in tube), "its steps do not change"


def test_the_jepa_term_adds_target_copies_and_predictor_tokens(folder, plan):
    rows = plan(**EPOCH)
    shards = Corpus(folder / "corpus", "train").manifest["splits"]["train"]["shards"]
    records = sum(shard["records"] for shard in shards)
    context, target = (sum(shard["tokens"][view] for shard in shards) for view in ("text", "code"))
    # [target EOS] and one predictor token are added to [BOS context SEP target EOS]
    extra = (target + 2 * records) / (context + target + 3 * records)
    assert number(rows["positions"][2]) / 100 == pytest.approx(extra, abs=0.01)
    assert number(rows["FLOPs, layers"][2]) == number(rows["positions"][2])
    assert number(rows["next-token targets"][2]) == 0
    plain = plan(**EPOCH, objective={"name": "next_token", "weight": 0.5})
    assert len(plain["positions"]) == 1 and "pairs" not in plain
    assert any(name.endswith("ignored with objective.name=next_token: weight") for name in plain)


@pytest.mark.parametrize(
    ("objective", "layers", "head_products"),
    [
        ({"name": "nitp"}, [(32, 32), (32, 32)], 0),
        ({"name": "nextlat"}, [(64, 32), (32, 32), (32, 32)], 0),
        ({"name": "nextlat", "kl_weight": 0.5}, [(64, 32), (32, 32), (32, 32)], 6),
        ({"name": "llm_jepa", "predictor_mlp": 24}, [(32, 24), (24, 32)], 0),
    ],
)
def test_the_weights_of_an_objective_and_their_flops_are_counted(plan, objective, layers, head_products):
    rows = plan(1, **EPOCH, objective=objective)
    weights = sum(inputs * outputs for inputs, outputs in layers)
    norm = 2 * 64 * (objective["name"] == "nextlat")
    assert number(rows["weights of the objective"][0]) == weights + sum(outputs for _, outputs in layers) + norm
    has_pairs = objective["name"] == "llm_jepa"
    plain = plan(1, **EPOCH, objective={"name": "llm_jepa" if has_pairs else "next_token"})
    assert number(rows["total"][0]) == number(plain["total"][0]) + number(rows["weights of the objective"][0])
    assert "activations of the objective" in rows and "activations of the objective" not in plain
    targets = number(rows["pairs" if has_pairs else "next-token targets"][0])
    expected = 6 * targets * weights + head_products * targets * 448 * 32
    # the printed number of pairs is rounded
    assert number(rows["FLOPs, objective"][0]) == pytest.approx(expected, rel=0.04 if has_pairs else 0.01)
    assert number(rows["FLOPs"][0]) == pytest.approx(number(plain["FLOPs"][0]) + expected, rel=0.01)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(
    "objective",
    [
        "{name: nitp}",
        "{name: nextlat}",
        "{name: nextlat, kl_weight: 0.5}",
        "{name: llm_jepa, predictor_mlp: 96, weight: 0.5}",
    ],
)
def test_the_activation_estimate_of_an_objective_is_close(make_model, objective, precision, dtype):
    """Compare with the tensors that autograd keeps; for llm_jepa, with the difference that the MLP makes."""
    model, rows = make_model(1, dtype=dtype), 2000
    index = torch.arange(rows)
    batch = SimpleNamespace(
        label_index=index, prediction_index=index, target_index=index + 1, pair_valid=torch.ones(rows, dtype=torch.bool)
    )
    states = [torch.randn(rows + 1, model.hidden_size, dtype=dtype, requires_grad=True) for _ in range(3)]

    def kept_bytes(built: Objective) -> int:
        known = {tensor.untyped_storage().data_ptr() for tensor in (*states, *model.parameters(), *built.parameters())}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known and tensor.is_floating_point():
                kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layers = {number: states[number] for number in built.layers}
            context, target = select_pair_embeddings(states[2], batch)
            built.auxiliary_sums(
                ForwardPass(batch, states[2], layers, model, None), built.predict(context), target, None
            )
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    config = load_config(ROOT / "configs" / "demo.yaml", [f"objective={objective}"]).objective
    built = build_objective(config, model.shape).to(dtype)
    held = kept_bytes(built) - (kept_bytes(LlmJepa(0.5, "cosine")) if config.name == "llm_jepa" else 0)
    counts = dict.fromkeys(built.weights, float(rows))
    assert built.activation_bytes(counts, dtype.itemsize) == pytest.approx(held, rel=0.2)


def test_the_plan_matches_the_run(folder, plan):
    rows = plan(**EPOCH, name="done")
    assert not (folder / "runs" / "done").exists()
    done = run_command(["python", "launcher/run.py", str(folder / "done.yaml")])
    assert f"{rows['total'][0]} parameters, {rows['train'][0]} records" in done.stdout
    metrics = [json.loads(line) for line in (folder / "runs" / "done" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == number(rows["steps, about"][0])
    padding = [line["throughput/padding_fraction"] for line in metrics[:-1]]  # the last step is not full
    assert sum(padding) / len(padding) == pytest.approx(number(rows["padding"][0]) / 100, abs=0.01)
    assert json.loads((folder / "runs" / "done" / "status.json").read_text())["status"] == "finished"


def test_the_planned_steps_of_three_epochs_count_a_batch_that_spans_two_epochs_once(folder, plan):
    changes = {"train__steps": None, "train__epochs": 3, "train__global_batch_rows": 240}
    rows = plan(**changes)
    config = load_config(folder / "planned.yaml")
    corpus = Corpus(config.data.path, "train")
    layout = config.objective.make_layout(special_ids(corpus.tokenizer, 448), corpus.views, "all")
    loader = Loader(corpus, layout, 128, config.seed, epochs=3)
    steps = []
    while not loader.exhausted:
        steps.append(loader.next_rows(240))
    steps_per_epoch = len(corpus) / len(steps[0].records)
    assert not steps_per_epoch.is_integer() and len(steps) != 3 * math.ceil(steps_per_epoch), (
        "the test needs batches that span epochs, and a last batch that is not full"
    )
    assert number(rows["steps, about"][0]) == len(steps) and rows["epochs"][0] == "3.00"
    assert number(rows["total corpus tokens"][0]) == pytest.approx(sum(step.lengths.sum() for step in steps), rel=0.02)
    flops = number(rows["FLOPs"][0]) * sum(len(step.records) for step in steps) / number(rows["records"][0])
    assert number(rows["total FLOPs"][0]) == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("window", [1024, 256])
def test_the_cost_of_pairs_is_averaged_over_the_epoch_not_over_its_first_window(
    tmp_path, write_corpus, monkeypatch, capsys, window
):
    """Place the pairs after 3,072 documents, so some windows have no pairs and others consist almost only of pairs."""
    monkeypatch.setattr(order, "WINDOW", window)
    corpus = write_corpus([([5] * 9, [])] * 3072 + [([5] * 4, [6] * 5)] * 1024)
    values = tiny_config(
        tmp_path,
        data__path=str(corpus.folder),
        data__sources=[],
        data__views=["view0", "view1"],
        data__missing_views="keep",
        data__tokenizer={"vocab_size": 512},
        train__global_batch_rows=4,
    )
    corpus.manifest["settings"]["data"] |= {"tokenizer": {"vocab_size": 512}, "missing_views": "keep"}
    (corpus.folder / "manifest.json").write_text(json.dumps(corpus.manifest))
    monkeypatch.setattr(sys, "argv", ["run.py", str(write_config(tmp_path, values)), "--dry-run"])
    main()
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    record_order = order.Order([(0, 4096, 1.0)], 3)
    pair_fractions = [(record_order.window(0, number)[0] >= 3072).mean() for number in range(record_order.windows(0))]
    assert max(pair_fractions) - min(pair_fractions) > 0.5
    # the plan reads four windows: all windows of 1,024 records, or a quarter of the windows of 256 records
    tolerance = 0.02 if window == 1024 else 0.3
    assert number(rows["pairs"][0]) / number(rows["records"][0]) == pytest.approx(0.25, abs=tolerance)
    planned = int(next(name for name in rows if name.startswith("one step, mean of")).split()[-2])
    assert (f"note: means of a step are over {planned} steps, spread evenly over the first epoch" in printed) == (
        window == 256
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_the_parameters_of_every_family(folder, plan, family):
    shape = yaml.safe_load((ROOT / "configs/models" / f"{family}_tiny.yaml").read_text())
    config = build_model_config(family, shape, Corpus(folder / "corpus", "train").tokenizer, 128)
    real = LanguageModel(random_causal_lm(config, "eager", torch.float32), 1, "eager")
    rows = plan(model={"family": family, "shape": shape}, objective__predictor_tokens=1)
    assert number(rows["total"][0]) == sum(parameter.numel() for parameter in real.parameters())


@pytest.fixture(scope="module")
def init_folder(folder):
    """Write a model for model.init_from, and return its folder."""
    config = load_config(write_config(folder, tiny_config(folder, name="start")))
    shape = build_model_config(
        "llama", {**config.model.shape, **SHAPE}, Corpus(config.data.path, "train").tokenizer, 128
    )
    torch.manual_seed(1)
    random_causal_lm(shape, "sdpa", torch.float32).save_pretrained(folder / "start-of-lora")
    return folder / "start-of-lora"


@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_adapters_are_counted_as_peft_adds_them(folder, plan, make_model, family):
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    model = make_model(2, family=family)
    model.causal_lm.config.max_position_embeddings = 128
    model.causal_lm.save_pretrained(folder / family)
    corpus = Corpus(folder / "corpus", "train")
    rows = plan(
        model={"init_from": str(folder / family), "lora": {"rank": 3, "alpha": 6}}, objective__predictor_tokens=2
    )
    before = sum(parameter.numel() for parameter in model.parameters())
    add_adapters(model, LoraConfig(rank=3, alpha=6))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert number(rows["adapters"][0]) == total - before > 0 and number(rows["total"][0]) == total
    assert number(rows["trained"][0]) == sum(trained) and corpus.views == 2


def test_a_run_with_adapters_needs_optimizer_memory_only_for_the_adapters(folder, init_folder, plan):
    lora = {"init_from": str(init_folder), "lora": {"rank": 2, "alpha": 4}}
    rows = plan(1, model=lora, train__precision="bf16", deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    total, trained = number(rows["total"][0]), number(rows["trained"][0])
    assert trained < total / 20
    parameters, gradients, optimizer = (number(text) * 2**20 for text in rows["ZeRO 3, as configured 1"][1:4])
    assert parameters == pytest.approx(2 * total, abs=2**13)
    assert gradients == pytest.approx(4 * trained, abs=2**13) and optimizer == pytest.approx(12 * trained, abs=2**13)
    assert number(rows["gathered parameters, at most"][0]) * 2**20 == pytest.approx(2 * total, abs=2**13)
    estimate = estimate_resources(load_config(folder / "planned.yaml"), 1)
    assert (
        estimate.parameters == total
        and estimate.checkpoint == 12 * trained + 2 * (total - trained)
        and estimate.bucket == 2 * 1000
    )


def test_unfilled_gradient_buckets_count_only_on_cuda(folder, plan):
    rows = plan(1)
    total = number(rows["total"][0])
    item_bytes = 4
    assert number(rows["gradients to be reduced, on CUDA all of reduce_bucket_size"][0]) * 2**20 == pytest.approx(
        item_bytes * 5e8, rel=1e-4
    )
    assert number(rows["gradients to be reduced, on CPU the used part only"][0]) * 2**20 == pytest.approx(
        item_bytes * total, abs=2**13
    )
    estimate = estimate_resources(load_config(folder / "planned.yaml"), 1)
    held = number(rows["ZeRO 3, as configured 1"][-2])
    for device in ("cuda", "cpu"):
        together = held + number(rows[f"combined on {device.upper()}"][0])
        assert estimate.rank_memory[device] - PROCESS_BYTES[device] == pytest.approx(together * 2**20, rel=0.01)
    filled = plan(1, deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    assert "combined" in filled and "gradients to be reduced" in filled and "combined on CPU" not in filled
    doubled = plan(1, deepspeed={"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000}})
    assert number(doubled["gradients to be reduced"][0]) * 2**20 == pytest.approx(2 * 10_000 * item_bytes, abs=2**13)


def two_step_changes(name: str, precision: str, stage: int) -> dict:
    """Return the changes to the tiny configuration for a run whose model states are measured."""
    return {
        "name": name,
        "model__shape": {**SHAPE, "tie_word_embeddings": True},
        "train__precision": precision,
        "train__steps": 2,
        "train__micro_batch_rows": 2,
        "monitor__loggers": [],
        "monitor__validation_records": 2,
        "deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000}},
    }


def measure(command: list[str]) -> list[dict]:
    """Return the JSON lines that peak_tensor_bytes.py prints."""
    return [json.loads(line) for line in run_command(command).stdout.splitlines() if line.startswith("{")]


def assert_held(row: list[str], measured: dict, case: object, tolerance: float = 0.03) -> None:
    """Assert that the planned bytes are close to the measured ones, which also count batches and small buffers."""
    assert number(row[-2]) * 2**20 == pytest.approx(measured["held"], rel=tolerance), case
    assert number(row[-1]) * 2**20 == pytest.approx(measured["in_step"], rel=tolerance), case


@pytest.mark.slow
def test_planned_model_states_match_deepspeed(folder, plan):
    cases = {
        "fp32-3": ("fp32", 3),
        "fp32-1": ("fp32", 1),
        "bf16-3": ("bf16", 3),
        "bf16-2": ("bf16", 2),
        "bf16-1": ("bf16", 1),
        "bf16-2-bf16": ("bf16", 2),
    }
    changes = {name: two_step_changes(name, *case) for name, case in cases.items()}
    changes["bf16-2-bf16"]["deepspeed"]["data_types"] = {"grad_accum_dtype": "bf16"}
    paths = {name: write_config(folder, tiny_config(folder, **change)) for name, change in changes.items()}
    on_two_ranks = measure(ranks_command(2, "tests/pretrain/training/peak_tensor_bytes.py", *paths.values()))
    alone = write_config(folder, tiny_config(folder, **changes["fp32-3"] | {"name": "alone"}))
    on_one_rank = measure(["python", "tests/pretrain/training/peak_tensor_bytes.py", str(alone)])
    assert len(on_two_ranks) == len(cases) and len(on_one_rank) == 1
    for ranks, measurements in ((2, on_two_ranks), (1, on_one_rank)):
        for measured in measurements:
            name = "fp32-3" if ranks == 1 else measured["name"]
            rows = plan(ranks, **changes[name] | {"name": "planned"})
            assert_held(rows[f"ZeRO {cases[name][1]}, as configured {ranks}"], measured, (name, ranks))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 3), ("fp32", 1)])
def test_planned_model_states_with_adapters_match_deepspeed(folder, plan, init_folder, precision, stage):
    pytest.importorskip("peft", reason=WITHOUT_PEFT)
    changes = two_step_changes(f"adapted-{stage}", precision, stage)
    del changes["model__shape"]
    changes["model"] = {"init_from": str(init_folder), "lora": {"rank": 16, "alpha": 16}}
    changes["deepspeed"]["zero_optimization"]["reduce_bucket_size"] = 1000
    path = write_config(folder, tiny_config(folder, **changes))
    (measured,) = measure(ranks_command(2, "tests/pretrain/training/peak_tensor_bytes.py", path))
    rows = plan(2, **changes | {"name": "planned"})
    assert_held(rows[f"ZeRO {stage}, as configured 2"], measured, (precision, stage), 0.05)


@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    [
        *((family, "fp32", torch.float32) for family in ("llama", "olmo2", "qwen3", "smollm3", "olmo3", "gemma3_text")),
        # the norms of other families keep more tensors in fp32
        *((family, "bf16", torch.bfloat16) for family in ("llama", "qwen3", "smollm3")),
    ],
)
def test_the_activation_estimate_is_close_to_the_tensors_that_autograd_keeps(make_model, precision, dtype, family):
    """Compare within 15%, without a mask. With one, transformers would repeat the keys and values of grouped heads."""
    model = make_model(0, dtype=dtype, family=family)
    rows, length = 4, 64
    tensors: dict[int, torch.Tensor] = {
        parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()
    }
    parameter_addresses = set(tensors)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    embedded = torch.randn(rows, length, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.causal_lm.model(inputs_embeds=embedded, use_cache=False)
    held = sum(
        tensor.untyped_storage().nbytes() for address, tensor in tensors.items() if address not in parameter_addresses
    )
    assert activations(model, precision, rows * length, 0, "cpu").layers == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_estimate_of_the_head_is_close_to_its_peak(make_model, monkeypatch, precision, dtype, family):
    """Compare for several chunks, without soft-capping and with it (gemma2)."""
    model = make_model(0, dtype=dtype, family=family)
    targets, chunk = 4000, 1000
    monkeypatch.setitem(head.MAX_LOGITS, "cpu", chunk * model.vocab_size)
    hidden = torch.randn(targets, model.hidden_size, dtype=dtype, requires_grad=True)
    labels = torch.randint(model.vocab_size, (targets,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.cross_entropy(hidden, labels).backward()
    held = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    expected = activations(model, precision, 0, targets, "cpu")
    hidden_bytes = hidden.numel() * hidden.element_size()
    assert expected.logits == pytest.approx(
        chunk * model.vocab_size * (4 + 2 * (precision == "bf16") + 4 * (family == "gemma2"))
    )
    weight_bytes = 4 * model.vocab_size * model.hidden_size
    assert peak == pytest.approx(expected.logits + weight_bytes + hidden_bytes, rel=0.1)
    assert expected.head >= 2 * weight_bytes, "the peak should be in the forward pass"


def test_a_large_model_without_a_corpus_is_planned_once_on_two_ranks(folder):
    values = tiny_config(
        folder,
        name="large",
        data__path=str(folder / "later"),
        data__tokenizer={"vocab_size": 128_000},
        data__sequence_length=4096,
        model__shape=LLAMA_8B,
        train={
            "tokens": 2 * 10**11,
            "global_batch_rows": 1024,
            "micro_batch_rows": 1,
            "learning_rate": 3e-4,
            "precision": "bf16",
        },
    )
    done = run_command([*ranks_command(2, "launcher/run.py", write_config(folder, values)), "--dry-run"])
    rows = rows_of("\n".join(line for line in done.stdout.splitlines() if not line.startswith("[")))
    hidden_size, intermediate_size, key_width = 4096, 14336, 1024
    layer = (
        2 * hidden_size * hidden_size
        + 2 * hidden_size * key_width
        + 3 * hidden_size * intermediate_size
        + 2 * hidden_size
    )
    embedding_and_head = 2 * 128_000 * hidden_size
    final_norm = predictor_token = hidden_size
    assert number(rows["total"][0]) == embedding_and_head + 32 * layer + final_norm + predictor_token
    assert number(rows["steps, at least"][0]) == math.ceil(2 * 10**11 / (1024 * 4096))
    assert number(rows["micro steps per rank (2 ranks)"][0]) == 512
    assert not (folder / "runs" / "large").exists() and not (folder / "later").exists()


def test_an_imported_tokenizer_determines_the_vocabulary(folder, plan):
    prepared = plan()
    later = plan(data__path=str(folder / "later"), data__tokenizer={"path": str(folder / "corpus" / "tokenizer")})
    assert later["total"] == prepared["total"]
    assert "records" not in later


@pytest.mark.parametrize("mistake", [mistake for mistake in INVALID_CONFIGS if mistake != "no corpus"])
def test_a_dry_run_reports_the_same_errors_as_a_real_launch(folder, tmp_path, monkeypatch, capsys, mistake):
    path, expected = write_invalid_config(folder, tmp_path, mistake)
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err


def test_a_folder_with_a_different_run_is_refused(folder, plan, capsys):
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "config.yaml").write_text(
        (folder / "run.yaml").read_text().replace("seed: 3", "seed: 4")
    )
    with pytest.raises(SystemExit):
        plan(name="taken")
    assert "contains a run with a different" in capsys.readouterr().err

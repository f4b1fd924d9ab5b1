"""The plan that `--dry-run` prints is what a run then does, and costs seconds."""

import json
import re
import sys

import pytest
import torch

from pretrain.config import load_config
from pretrain.data.batch import assemble
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Loader
from pretrain.models.attention import visibility_mask
from pretrain.models.language_model import special_ids
from pretrain.training.main import main
from pretrain.training.memory import activations
from tests.launching import call, ranks_command, tiny_config, write_config
from tests.pretrain.training.test_launchers import MISTAKES, write_mistake

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Large enough that its model states outweigh everything else."""
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
EPOCH = {"train__steps": None, "train__epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    call(["python", "-m", "data_prep", str(write_config(folder, tiny_config(folder)))])
    return folder


@pytest.fixture
def plan(folder, monkeypatch, capsys):
    """Calls the command on a changed tiny configuration; what it printed, as rows by name."""

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
    """Columns of each line by what stands first; columns are at least two blanks apart."""
    split = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    rows: dict[str, list[str]] = {}
    for name, *columns in split:
        key = f"{name} {columns[0]}" if re.match(r"(no )?ZeRO", name) else name
        assert key not in rows or not columns, f"{key} is printed twice"
        rows[key] = columns
    return rows


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%"))


def test_the_plan_of_a_step_is_what_the_loader_and_the_mask_give(folder, plan):
    rows = plan(**EPOCH, objective__dropout=0.25, objective__predictor_tokens=2)
    config = load_config(folder / "planned.yaml")
    corpus = Corpus(config.data.path, "train")
    specials = special_ids(corpus.tokenizer, 448)
    layout = config.objective.make_layout(specials, corpus.views, "all")
    loader = Loader(corpus, layout, 128, config.seed, dropout=0.25)
    planned = int(next(name for name in rows if name.startswith("a step, mean of")).split()[-1])
    batches = [loader.next_rows(8) for _ in range(planned)]
    assert planned > 10 and loader.epoch == 0
    loader.next_rows(8)
    assert loader.epoch == 1, "the last, partial step of the epoch is left out"
    visible = targets = 0
    for batch in batches:
        tensors = assemble(batch, corpus, layout, specials, 128, len(batch.records))
        padding = batch.count * 128 - int(batch.segment_lengths.sum())
        visible += int(visibility_mask(tensors.visible_until, "sdpa").sum()) - padding  # padding sees itself
        targets += len(tensors.label_index)
    expected = {"records": sum(len(batch.records) for batch in batches), "corpus tokens": sum(batch.lengths.sum() for batch in batches),
                "pairs": sum(batch.paired.sum() for batch in batches), "positions": sum(batch.segment_lengths.sum() for batch in batches),
                "predictor tokens": 2 * sum(batch.paired.sum() for batch in batches), "next-token targets": targets,
                "FLOPs, attention scores": 12 * 2 * 32 * visible}
    for name, total in expected.items():
        assert number(rows[name][0]) == pytest.approx(total / planned, rel=0.01, abs=0.5), name
    assert number(rows["padding"][0]) / 100 == pytest.approx(1 - expected["positions"] / planned / (8 * 128), abs=0.001)


def test_the_jepa_term_costs_the_copies_of_the_target_and_the_predictor_tokens(folder, plan):
    rows = plan(**EPOCH)
    shards = Corpus(folder / "corpus", "train").manifest["splits"]["train"]["shards"]
    records = sum(shard["records"] for shard in shards)
    context, target = (sum(shard["tokens"][view] for shard in shards) for view in ("text", "code"))
    extra = (target + 2 * records) / (context + target + 3 * records)  # [target EOS] and one predictor token, on [BOS context SEP target EOS]
    assert number(rows["positions"][2]) / 100 == pytest.approx(extra, abs=0.01)
    assert number(rows["FLOPs, layers"][2]) == number(rows["positions"][2]) and number(rows["next-token targets"][2]) == 0
    plain = plan(**EPOCH, objective={"name": "next_token", "weight": 0.5})
    assert len(plain["positions"]) == 1 and "pairs" not in plain
    assert any(name.endswith("these keys of objective rest: weight") for name in plain)


def test_the_plan_is_the_run(folder, plan):
    rows = plan(**EPOCH, name="done")
    assert not (folder / "runs" / "done").exists()
    done = call(["python", "launcher/run.py", str(folder / "done.yaml")])
    assert f"{rows['total'][0]} parameters, {rows['train'][0]} records" in done.stdout
    metrics = [json.loads(line) for line in (folder / "runs" / "done" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == number(rows["steps, about"][0])
    padding = [line["throughput/padding_fraction"] for line in metrics[:-1]]  # the last step is not full
    assert sum(padding) / len(padding) == pytest.approx(number(rows["padding"][0]) / 100, abs=0.01)
    assert json.loads((folder / "runs" / "done" / "status.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_model_states_are_what_deepspeed_holds(folder, plan):
    """Within 3%: batches, buckets and small buffers are not among model states."""
    cases = {"fp32-3": ("fp32", 3), "bf16-2": ("bf16", 2), "fp32-1": ("fp32", 1)}
    changes = {name: {"name": name, "model__shape": {**SHAPE, "tie_word_embeddings": True}, "train__precision": precision, "train__steps": 2,
                      "train__micro_batch_rows": 2, "monitor__tensorboard": False, "monitor__validation_records": 2,
                      "deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000}}}
               for name, (precision, stage) in cases.items()}
    paths = {name: write_config(folder, tiny_config(folder, **change)) for name, change in changes.items()}
    two = call(ranks_command(2, "tests/pretrain/training/held_bytes.py", *paths.values()))
    alone = write_config(folder, tiny_config(folder, **changes["fp32-3"] | {"name": "alone"}))
    one = call(["python", "tests/pretrain/training/held_bytes.py", str(alone)])
    for ranks, output in ((2, two.stdout), (1, one.stdout)):
        measured = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert len(measured) == (len(cases) if ranks == 2 else 1)
        for found in measured:
            name = "fp32-3" if ranks == 1 else found["name"]
            row = plan(ranks, **changes[name] | {"name": "planned"})[f"ZeRO {cases[name][1]}, as configured {ranks}"]
            assert number(row[-2]) * 2**20 == pytest.approx(found["held"], rel=0.03), (name, ranks)
            assert number(row[-1]) * 2**20 == pytest.approx(found["in_step"], rel=0.03), (name, ranks)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_activation_estimate_is_near_what_autograd_keeps(make_model, precision, dtype):
    """Within 15% of a layer's tensors, where all heads have keys of their own; else the CPU kernel repeats keys and values."""
    model = make_model(0, dtype=dtype)
    rows, length = 4, 64
    kept: dict[int, torch.Tensor] = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    own = set(kept)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    embedded = torch.randn(rows, length, model.width, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.causal_lm.model(inputs_embeds=embedded, use_cache=False)
    held = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert activations(model, precision, rows * length, 0).layers == pytest.approx(held, rel=0.15)


def test_a_large_model_without_a_corpus_on_two_ranks_is_told_once(folder):
    values = tiny_config(folder, name="large", data__path=str(folder / "later"), data__tokenizer={"vocab_size": 128_000}, data__sequence_length=4096,
                         model__shape=LLAMA_8B, train={"tokens": 2 * 10**11, "global_batch_rows": 1024, "micro_batch_rows": 1,
                                                       "learning_rate": 3e-4, "precision": "bf16"})
    done = call([*ranks_command(2, "launcher/run.py", write_config(folder, values)), "--dry-run"])
    rows = rows_of("\n".join(line for line in done.stdout.splitlines() if not line.startswith("[")))
    width, inner, of_keys = 4096, 14336, 1024
    layer = 2 * width * width + 2 * width * of_keys + 3 * width * inner + 2 * width
    assert number(rows["total"][0]) == 2 * 128_000 * width + 32 * layer + width + width  # embedding, head, layers, norm, predictor
    assert number(rows["steps, at least"][0]) == -(-2 * 10**11 // (1024 * 4096))
    assert number(rows["micro steps of each of 2 ranks"][0]) == 512
    assert not (folder / "runs" / "large").exists() and not (folder / "later").exists()


def test_a_tokenizer_that_is_taken_over_gives_the_vocabulary(folder, plan):
    prepared = plan()
    later = plan(data__path=str(folder / "later"), data__tokenizer={"path": str(folder / "corpus" / "tokenizer")})
    assert later["total"] == prepared["total"]
    assert "records" not in later


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if mistake != "no corpus"])
def test_mistakes_are_those_of_a_real_start(folder, tmp_path, monkeypatch, capsys, mistake):
    path, expected = write_mistake(folder, tmp_path, mistake)
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err


def test_another_run_in_the_folder_is_refused(folder, plan, capsys):
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "config.yaml").write_text((folder / "run.yaml").read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(SystemExit):
        plan(name="taken")
    assert "holds a run with another" in capsys.readouterr().err

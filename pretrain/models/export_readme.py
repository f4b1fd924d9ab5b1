"""Body of an export's README.md: the contents of the folder, and code that generates, embeds and searches.

`pretrain/evaluation/model_card.py` adds the metadata and the figures of the run.
"""

from typing import Any

from pretrain.models.families import FAMILY_MODULES
from pretrain.models.view_templates import ViewTemplate, pairing_from_export, prediction_name, view_template

PAGE = """# {run}, step {step}

A causal language model in Hugging Face format, trained with `{objective}` on records of the views {views}. `jepa.json`
contains the objective and the settings of the corpus.{predictor_file}

{figures}## How to generate

The model continues {prompt}. The tokenizer does not add special tokens automatically.

```python
{generation}
```

## How to embed

The embedding of a view is the hidden state of its last token after the final norm when the view is encoded separately.
{predicted}{in_context}Code:

```python
{code}
```

In the project that made this folder, `python launcher/evaluate.py THIS_FOLDER --embed FILE` computes the embeddings of
all rows of a file.

{search}
"""

SEARCH = """## How to search

In the same project, this command prints the texts of the column `{target}` of a file whose embeddings have the highest
cosine with the {what} a query, a `{source}`:

```sh
python launcher/search.py THIS_FOLDER --index FILE "QUERY"
```

## How to use sentence-transformers

"""

SENTENCE_TRANSFORMERS = """In the same project, this command writes the folders {folders} into FOLDER:

```sh
python launcher/evaluate.py THIS_FOLDER --sentence-transformers FOLDER
```

[sentence-transformers](https://sbert.net) loads each of them without code of the project. This finds the closest
`{target}` of a query:

```python
from sentence_transformers import SentenceTransformer

folder = "sentence-transformers"  # FOLDER
queries = SentenceTransformer(f"{{folder}}/{query_folder}")
targets = SentenceTransformer(f"{{folder}}/{target}")
texts = ["...", "..."]  # each a {target}
cosines = queries.similarity(queries.encode(["..."]), targets.encode(texts))  # the query is a {source}
print(texts[cosines[0].argmax()])
```"""

WITHOUT_SENTENCE_TRANSFORMERS = """transformers does not include `{family}`, so
[sentence-transformers](https://sbert.net) cannot load this model without code of the project."""

GENERATION = """import torch
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
text = "..."  # {text}
ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]{separator}]
output = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids) :]
print(tokenizer.decode(output, skip_special_tokens=True))"""

IN_CONTEXT = """

In training, however, the embedding of a target was read in its context: at the end of the target in
`[BOS context SEP] target`. With more than two views, predictions were made in context too. Embeddings of separately
encoded views may therefore retrieve much worse.

"""

CODE = """import torch
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
bos, sep, eos = tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
embeddings = model.get_input_embeddings()
{weights}

@torch.no_grad()
def embed(before, text, after, front=None, back=None):
    ids = before, tokenizer(text, add_special_tokens=False)["input_ids"] + after
    start, rest = (embeddings(torch.tensor(part, dtype=torch.long)) for part in ids)
    parts = [start, front, rest, back]
    inputs = torch.cat([part for part in parts if part is not None])
    return model.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]


def embed_record({arguments}):
    return {{
{lines}
    }}"""


ADDITIONAL = """weights = load_file(f"{folder}/jepa.safetensors")
"""

PREDICTOR = """predictor = weights["predictor.weight"] * getattr(embeddings, "scalar_embed_scale", 1.0)
"""

PREDICTOR_MLP = """

def predict(hidden):
    mlp = {name.removeprefix("objective.predictor.layers."): weight for name, weight in weights.items()}
    inner = torch.nn.functional.linear(hidden, mlp["0.weight"], mlp["0.bias"])
    return torch.nn.functional.linear(torch.nn.functional.gelu(inner), mlp["2.weight"], mlp["2.bias"])
"""


def render_readme(
    jepa: dict[str, Any], family: str, predictor_tokens: int, has_weights: bool = False, figures: str = ""
) -> str:
    """Return the README from the contents of jepa.json, the model type, k, and whether the objective has weights.

    `figures` are sections in Markdown that precede the code.
    """
    views, pairing = list(jepa["views"]), pairing_from_export(jepa)
    has_mlp = bool(jepa["objective"].get("predictor_mlp"))
    lines = [f'        "{view}": {_call(view, view_template(jepa, number))},' for number, view in enumerate(views)]
    if predictor_tokens or has_mlp:
        argument = f", {'front' if pairing.prepended else 'back'}=predictor" if predictor_tokens else ""
        for source, target in pairing.edges(len(views)):
            call = _call(views[source], view_template(jepa, source), argument)
            name = prediction_name(views[source], views[target])
            lines.append(f'        "{name}": {f"predict({call})" if has_mlp else call},')
    openelm = "import pretrain.models.openelm  # from the project that made this folder: transformers has no OpenELM\n"
    model_imports = openelm if family == "openelm" else ""
    imports = ("from safetensors.torch import load_file\n" if predictor_tokens or has_mlp else "") + model_imports
    prompted = len(views) > 1 and jepa["objective"].get("layout", "joint") == "joint"
    additional = []
    if predictor_tokens:
        additional.append("embeddings of the predictor tokens")
    if has_mlp:
        additional.append("weights of the predictor MLP")
    elif has_weights:
        additional.append("weights of the objective, which only training needs")
    return PAGE.format(
        run=jepa["run"],
        step=jepa["step"],
        objective=jepa["objective"]["name"],
        views=", ".join(f"`{view}`" for view in views),
        predictor_file=f" `jepa.safetensors` contains the {' and the '.join(additional)}." if additional else "",
        figures=figures,
        prompt="`[BOS context SEP]` with the target and the end token" if prompted else "`[BOS text`, a document",
        generation=GENERATION.format(
            imports=model_imports,
            text=f"a {views[0]}" if prompted else "the beginning of a document",
            separator=", tokenizer.sep_token_id" if prompted else "",
        ),
        in_context=IN_CONTEXT if pairing.in_context else "",
        predicted="The prediction of another view is the hidden state of the last token when the predictor tokens "
        f"{'precede' if pairing.prepended else 'follow'} the view. "
        + ("A predictor MLP is applied to this hidden state. " if has_mlp else "")
        if predictor_tokens
        else "The prediction of another view is computed from this embedding by the predictor MLP. "
        if has_mlp
        else "",
        code=CODE.format(
            imports=imports,
            weights=(ADDITIONAL if predictor_tokens or has_mlp else "")
            + (PREDICTOR if predictor_tokens else "")
            + (PREDICTOR_MLP if has_mlp else ""),
            arguments=", ".join(views),
            lines="\n".join(lines),
        ),
        search=_search(views, pairing.edges(len(views)), family, predicts=bool(predictor_tokens or has_mlp)),
    )


def _search(views: list[str], edges: list[tuple[int, int]], family: str, predicts: bool) -> str:
    """Return the sections on search and on sentence-transformers.

    `predicts` states whether predictions differ from the embeddings of their source views.
    """
    predicted = [prediction_name(views[source], views[target]) for source, target in edges] if predicts else []
    source, target = edges[0] if edges else (0, 0)
    search = SEARCH.format(
        source=views[source], target=views[target], what="prediction from" if predicted else "embedding of"
    )
    if family in FAMILY_MODULES:
        return search + WITHOUT_SENTENCE_TRANSFORMERS.format(family=family)
    return search + SENTENCE_TRANSFORMERS.format(
        folders=", ".join(f"`{name}`" for name in [*views, *predicted]),
        source=views[source],
        target=views[target],
        query_folder=predicted[0] if predicted else views[source],
    )


def _call(view: str, template: ViewTemplate, argument: str = "") -> str:
    return f"embed([{', '.join(template.before)}], {view}, [{', '.join(template.after)}]{argument})"

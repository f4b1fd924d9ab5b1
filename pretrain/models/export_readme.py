"""README.md of an export: what the folder holds, and the lines that embed a view with transformers alone."""

from typing import Any

from pretrain.models.view_templates import ViewTemplate, pairing_from_export, view_template

PAGE = """# {run}, step {step}

A causal language model in Hugging Face format, trained with `{objective}` on records of the views {views}. `jepa.json` holds the objective and
the settings of the corpus{predictor_file}.

The model continues `[BOS context SEP]` with the target and the end token. The embedding of a view is the hidden state of its last token, after the
final norm, with the view encoded on its own{predicted}:

```python
{code}
```

The tokenizer adds no special tokens by itself. `python launcher/evaluate.py THIS_FOLDER --embed FILE` of the project that made this folder
does the same for all rows of a file.
"""

CODE = """import torch
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
bos, sep, eos = tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id
words = model.get_input_embeddings()
{predictor}

@torch.no_grad()
def embed(before, text, after, front=None, back=None):
    ids = [torch.tensor(part, dtype=torch.long) for part in (before, tokenizer(text, add_special_tokens=False)["input_ids"] + after)]
    parts = [words(ids[0]), front, words(ids[1]), back]
    inputs = torch.cat([part for part in parts if part is not None])
    return model.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]


def embed_record({arguments}):
    return {{
{lines}
    }}"""


def render_readme(jepa: dict[str, Any], family: str, predictor_tokens: int) -> str:
    """Return the page, from what becomes jepa.json, the model's type and k."""
    views, pairing = list(jepa["views"]), pairing_from_export(jepa)
    lines = [f'        "{view}": {_call(view, view_template(jepa, number))},' for number, view in enumerate(views)]
    if predictor_tokens:
        where = "front" if pairing.prepended else "back"
        lines += [
            f'        "{views[source]}_to_{views[target]}": {_call(views[source], view_template(jepa, source), f", {where}=predictor")},'
            for source, target in pairing.edges(len(views))
        ]
    imports = "from safetensors.torch import load_file\n" if predictor_tokens else ""
    if family == "openelm":
        imports += (
            "import pretrain.models.openelm  # of the project that made this folder: transformers has no OpenELM\n"
        )
    load = 'predictor = load_file(f"{folder}/jepa.safetensors")["predictor.weight"] * getattr(words, "scalar_embed_scale", 1.0)\n'
    return PAGE.format(
        run=jepa["run"],
        step=jepa["step"],
        objective=jepa["objective"]["name"],
        views=", ".join(f"`{view}`" for view in views),
        predictor_file=", `jepa.safetensors` the embedding of the predictor tokens" if predictor_tokens else "",
        predicted="; where a view predicts another, that of the last token with the predictor tokens "
        f"{'before' if pairing.prepended else 'behind'} it"
        if predictor_tokens
        else "",
        code=CODE.format(
            imports=imports,
            predictor=load if predictor_tokens else "",
            arguments=", ".join(views),
            lines="\n".join(lines),
        ),
    )


def _call(view: str, form: ViewTemplate, more: str = "") -> str:
    return f"embed([{', '.join(form.before)}], {view}, [{', '.join(form.after)}]{more})"

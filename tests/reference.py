"""A slow and simple reference for the objectives: one record at a time, with a separate unpadded forward pass per text.

It does not use the project's code. It builds token lists from the views, uses the plain Hugging Face model with its own
causal mask, and sums in Python loops. The results of the packed forward pass must equal it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

View = list[int]


class Losses(NamedTuple):
    total: torch.Tensor
    lm: torch.Tensor
    jepa: torch.Tensor


class Ids(NamedTuple):
    bos: int
    eos: int
    sep: int


class Pair(NamedTuple):
    """A prediction and its target embedding, both (D,)."""

    prediction: torch.Tensor
    target: torch.Tensor
    content: View
    """Tokens of the target view."""
    record: int
    forward: bool
    """True if the target is the next view, False if it is the previous one."""


@dataclass
class Reference:
    """A plain model and the settings of the objective."""

    causal_lm: torch.nn.Module
    predictor: torch.Tensor | None
    """Embeddings of the predictor tokens, (k, D); None for k = 0."""
    ids: Ids
    layout: str
    lm_views: str = "all"
    distance: str = "cosine"
    direction: str = "forward"
    placement: str = "append"
    in_context: bool = False
    temperature: float = math.nan
    stop_gradient: bool = False
    weight: float = 1.0
    scale: float = 1.0
    """Factor of the input embeddings: sqrt(D) for Gemma 2, 1 for the other families."""
    softcap: float | None = None
    mlp: Mapping[str, torch.Tensor] | None = None
    """Weights of the MLP of the objective by name (`0.weight`, `0.bias`, `2.weight`, ...); None if it has no MLP."""
    cross_entropies: list[torch.Tensor] = field(default_factory=list)

    def hidden_states(self, tokens: View, predictor_at: int | None = None) -> torch.Tensor:
        """Return the last-layer hidden states (L, D) of one sequence.

        The predictor tokens are inserted at position `predictor_at`.
        """
        embedded = self.causal_lm.get_input_embeddings()(torch.tensor(tokens))
        if predictor_at is not None and self.predictor is not None:
            embedded = torch.cat([embedded[:predictor_at], self.predictor * self.scale, embedded[predictor_at:]])
        return self.causal_lm.model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]

    def read(self, tokens: View, first_target: int) -> None:
        """Append -log p of each token from position `first_target`, given the preceding tokens."""
        logits = self.causal_lm.lm_head(self.hidden_states(tokens))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        log_p = logits.log_softmax(dim=-1)
        self.cross_entropies += [
            -log_p[position - 1, tokens[position]] for position in range(first_target, len(tokens))
        ]

    def documents(self, views: list[View]) -> list[tuple[View, int]]:
        """Return the texts of the language-model loss, each with the position of its first label. Skips empty views."""
        views = [view for view in views if view]
        bos, eos, sep = self.ids
        if self.layout == "joint":
            tokens, last = [bos], 1
            for view in views:
                last = len(tokens)
                tokens += [*view, sep]
            return [([*tokens[:-1], eos], 1 if self.lm_views == "all" else last)]
        texts = [[bos, *view, eos] for view in views]
        return [
            (text, 1 if self.lm_views == "all" or number == len(texts) - 1 else len(text))
            for number, text in enumerate(texts)
        ]

    def alone(self, views: list[View], number: int) -> View:
        """Return the tokens with which a view is encoded separately."""
        bos, eos, sep = self.ids
        if self.layout == "joint":
            return [*views[number], eos] if number else [bos, *views[number], sep]
        return [bos, *views[number], eos]

    def through(self, views: list[View], number: int) -> View:
        """Return the tokens of the language-model text up to the end of a view, with the token after it."""
        bos, eos, sep = self.ids
        tokens = [bos]
        for view in views[: number + 1]:
            tokens += [*view, sep]
        return [*tokens[:-1], eos] if number == len(views) - 1 else tokens

    def predict(self, views: list[View], number: int) -> torch.Tensor:
        tokens = self.through(views, number) if self.in_context else self.alone(views, number)
        front = 1 if tokens[0] == self.ids.bos else 0
        hidden = self.hidden_states(tokens, front if self.placement == "prepend" else len(tokens))[-1]
        return hidden if self.mlp is None else apply_mlp(self.mlp, hidden)

    def pairs(self, record: int, views: list[View]) -> list[Pair]:
        views = [view for view in views if view]
        pairs = []
        for number in range(len(views) - 1):
            edges = {"forward": [(number, number + 1)], "backward": [(number + 1, number)]}
            for source, target in edges.get(self.direction) or edges["forward"] + edges["backward"]:
                tokens = self.through(views, target) if self.in_context else self.alone(views, target)
                embedding = self.hidden_states(tokens)[-1]
                embedding = embedding.detach() if self.stop_gradient else embedding
                pairs.append(Pair(self.predict(views, source), embedding, views[target], record, source < target))
        return pairs

    def distances(self, pairs: list[Pair]) -> list[torch.Tensor]:
        match self.distance:
            case "cosine":
                return [
                    1 - (pair.prediction @ pair.target) / (pair.prediction.norm() * pair.target.norm())
                    for pair in pairs
                ]
            case "l2":
                return [((pair.prediction - pair.target) ** 2).sum().sqrt() for pair in pairs]
            case "mse":
                return [((pair.prediction - pair.target) ** 2).sum() / len(pair.target) for pair in pairs]
            case "info_nce":
                return info_nce(pairs, self.temperature)

    def losses(self, records: list[tuple[View, ...]], paired: list[bool] | None = None) -> Losses:
        """Return the loss of the records and its two terms. Only `paired` records (default: all) have a JEPA term."""
        self.cross_entropies, pairs = [], []
        for number, views in enumerate(records):
            for tokens, first_target in self.documents(views):
                self.read(tokens, first_target)
            if paired is None or paired[number]:
                pairs += self.pairs(number, views)
        distances = self.distances(pairs)
        lm = sum(self.cross_entropies) / len(self.cross_entropies)
        jepa = sum(distances) / len(distances) if distances else torch.zeros(())
        return Losses(lm + self.weight * jepa, lm, jepa)

    def log_probabilities(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = weight @ hidden
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(dim=-1)

    def nitp(self, records: list[tuple[View, ...]], layer: int) -> torch.Tensor:
        """Return the mean distance of the projected states to the states of the next tokens after a layer."""
        distances = []
        for tokens, first_target in (document for views in records for document in self.documents(views)):
            shallow, hidden = self.states_after(layer, tokens)
            for position in range(first_target, len(tokens)):
                projected, target = apply_mlp(self.mlp, hidden[position - 1]), shallow[position].detach()
                distances.append(1 - projected @ target / (projected.norm() * target.norm()))
        return sum(distances) / len(distances)

    def nextlat(self, records: list[tuple[View, ...]], norm: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the mean error of the predicted next states, and the mean divergence of their distributions."""
        errors, divergences = [], []
        weight = self.causal_lm.lm_head.weight.detach()
        for tokens, first_target in (document for views in records for document in self.documents(views)):
            embedded, hidden = self.states_after(0, tokens)
            for position in range(first_target, len(tokens)):
                both = torch.cat([embedded[position], hidden[position - 1]])
                both = (both - both.mean()) / (both.var(correction=0) + 1e-5).sqrt() * norm["weight"] + norm["bias"]
                predicted, actual = hidden[position - 1] + apply_mlp(self.mlp, both), hidden[position].detach()
                difference = (predicted - actual).abs()
                smooth = torch.where(difference < 1, difference**2 / 2, difference - 0.5)
                errors.append(smooth.sum() / len(smooth))
                expected, found = (self.log_probabilities(state, weight) for state in (actual, predicted))
                divergences.append((expected.exp() * (expected - found)).sum())
        return sum(errors) / len(errors), sum(divergences) / len(divergences)

    def states_after(self, layer: int, tokens: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (L, D) after a layer (0: its inputs) and the last ones of one sequence."""
        states: list[torch.Tensor] = []
        layers = self.causal_lm.model.layers
        if layer:
            handle = layers[layer - 1].register_forward_hook(
                lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
        else:
            handle = layers[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        hidden = self.hidden_states(tokens)
        handle.remove()
        return states[0][0], hidden


def apply_mlp(weights: Mapping[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
    """Return the output of linear layers with GELU between them, for one state (D,)."""
    numbers = sorted({int(name.split(".")[0]) for name in weights})
    for number in numbers:
        if number:
            state = state * (1 + torch.erf(state / math.sqrt(2))) / 2
        state = weights[f"{number}.weight"] @ state + weights[f"{number}.bias"]
    return state


def info_nce(pairs: list[Pair], temperature: float) -> list[torch.Tensor]:
    """Return -log softmax of each pair's own target among that target and the pair's negatives.

    Negatives are targets of other records with different content and the same direction.
    """
    losses = []
    for pair in pairs:
        own_logit = F.cosine_similarity(pair.prediction, pair.target, dim=0) / temperature
        negatives = [
            other
            for other in pairs
            if other.content != pair.content and other.record != pair.record and other.forward == pair.forward
        ]
        logits = [own_logit] + [
            F.cosine_similarity(pair.prediction, negative.target, dim=0) / temperature for negative in negatives
        ]
        losses.append(torch.stack(logits).logsumexp(dim=0) - own_logit)
    return losses


def tube_distance(hidden: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """Return 1 - cos of the change over the first span and the summed changes over the other spans.

    `hidden` holds the hidden states of one document, (L, D). The change over a span is the hidden state at its
    end minus the one at its beginning.
    """
    first, *others = [hidden[end] - hidden[begin] for begin, end in spans]
    return 1 - F.cosine_similarity(first, sum(others), dim=0)

"""The rule by which the monitors of embeddings reveal a collapse. The report reads it without torch."""

COLLAPSE_MARGIN = 0.1
COLLAPSE_LEVEL = 0.5
NEARLY_EQUAL, HARDLY_ANY = 0.95, 0.1


def has_collapsed(monitors: dict[str, float], in_context: bool = False) -> bool:
    """Return whether the embeddings have collapsed, which makes a low loss meaningless.

    In a collapse hardly any prediction retrieves its target. In addition, pairs are nearly identical, or negatives are
    almost as close as pairs. A target that is read `in_context` has seen its context, so it is retrieved even after a
    collapse; then only the negatives decide.
    """
    if "shuffled_cosine" not in monitors:
        return False
    paired, shuffled = monitors["paired_cosine"], monitors["shuffled_cosine"]
    close_negatives = shuffled > COLLAPSE_LEVEL and paired - shuffled < COLLAPSE_MARGIN
    if in_context:
        return close_negatives
    return monitors["retrieval_at_1"] <= HARDLY_ANY and (paired > NEARLY_EQUAL or close_negatives)

"""A reward for a model with random weights: it differs from completion to completion, whatever these say."""


def even_tokens(completion_ids, **columns):
    """The share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]

"""Continue a text with a reference model, greedily or by sampling.

The command line uses it for sample completions. Every new token is a full forward pass over the
context; nothing is cached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    num_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue tokens [batch, length] by `num_tokens` each; returns [batch, length + num_tokens].

    The model sees at most the last `context_length` tokens. Temperature 0 takes the likeliest token.
    """
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            scores = model.logits(tokens[:, -model.config.context_length :])[:, -1].float()
            if temperature > 0:
                chances = (scores / temperature).softmax(-1)
                following = torch.multinomial(chances, 1, generator=generator)
            else:
                following = scores.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, following), 1)
    finally:
        model.train(was_training)
    return tokens

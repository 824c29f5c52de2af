"""Sampled continuations of a text by the base LM, with its predictive distributions.

They are training data for a memory that is to predict as well as the full text; the true continuation is not known when
a text is compressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nugget2d.inference.decoding import decode
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.modeling.selection import generator_of


@dataclass(frozen=True, eq=False)
class SampledContinuations:
    """Continuations of B texts, `samples` of each.

    Attributes:
        ids: (samples, B, tokens).
        expected: (samples, B, tokens, vocabulary) log-probabilities that they were drawn from.
    """

    ids: Tensor
    expected: Tensor


@torch.no_grad()
def sample_continuations(
    model: Network, texts: Sequence[Sequence[int]], samples: int, tokens: int
) -> SampledContinuations:
    """Draw continuations of `texts` (token ids) from the base, at temperature 1.

    The noise of each text is seeded by its tokens: a text gets the same continuations in any batch.

    Raises:
        InputError: the model has no positions for them (`Network.require_positions`).
    """
    model.require_positions(max(map(len, texts)) + tokens - 1)
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    # padded on the left: the next token of all rows stands in the same column
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    positions = (torch.arange(longest) - longest + lengths[:, None]).clamp(min=0)
    noise = [generator_of(torch.tensor(text)) for text in texts]
    cache = DynamicCache(config=model.lm.config)
    with model.parameters_by_role.role("base") as lm:

        def forward(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            ids, mask, positions = (tensor.to(model.device) for tensor in (ids, mask, positions))
            outputs = lm(ids, attention_mask=mask, position_ids=positions, **as_cache(lm, cache), logits_to_keep=1)
            return outputs.logits[:, -1].float().log_softmax(-1)

        expected = [forward(ids, mask, positions).repeat_interleave(samples, 0)]
        cache.batch_repeat_interleave(samples)
        mask, end = mask.repeat_interleave(samples, 0), lengths.repeat_interleave(samples)[:, None]

        def draw(logits: Tensor, number: int) -> Tensor:
            size = (samples, logits.shape[1])
            gumbel = torch.cat([-torch.empty(size).exponential_(generator=row).log() for row in noise])
            return (logits.cpu() + gumbel).argmax(-1)

        def step(token: Tensor) -> Tensor:
            read = len(expected)
            longer = torch.nn.functional.pad(mask, (0, read), value=1)
            expected.append(forward(token[:, None], longer, end + read - 1))
            return expected[-1]

        drawn = list(decode(expected[0], step, draw, tokens))

    def by_sample(steps: list[Tensor]) -> Tensor:
        rows = torch.stack(steps, 1).to(model.device)
        return rows.unflatten(0, (len(texts), samples)).transpose(0, 1)

    return SampledContinuations(by_sample(drawn), by_sample(expected))

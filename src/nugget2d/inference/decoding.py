"""A decoding loop with what transformers' `generate` does not offer: forced tokens, timing per token, probabilities.

(Streams slide their window while generating, and the server steps whole batches: these have loops of their own.)
"""

from collections.abc import Callable, Iterator

from torch import Tensor

Step = Callable[[Tensor], Tensor]  # (B,) tokens -> (B, V) logits of the next ones
Choose = Callable[[Tensor, int], Tensor]  # (B, V) logits and the number of the step -> (B,) tokens


def decode(logits: Tensor, step: Step, choose: Choose, steps: int) -> Iterator[Tensor]:
    """Tokens of all rows, `steps` times, the first from `logits` (B, V); each is read when the next is asked for."""
    for number in range(steps):
        token = choose(logits, number)
        yield token
        if number + 1 < steps:
            logits = step(token)


def greedy(logits: Tensor, number: int) -> Tensor:
    """The likeliest token of each row."""
    return logits.argmax(-1)

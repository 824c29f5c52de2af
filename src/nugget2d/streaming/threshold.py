"""The score above which a token of a stream becomes a nugget (Nugget2D, section 3.3)."""

import torch
from torch import Tensor

from nugget2d.errors import InputError
from nugget2d.modeling.network import Network

# Segments scored side by side.
BATCH_ROWS = 64


@torch.no_grad()
def calibrate_threshold(model: Network, ids: Tensor, ratio: float) -> float:
    """The threshold that makes one in `ratio` tokens of sample text a nugget.

    The text is cut as a stream cuts it. The last token of each segment is a nugget whatever its score, so one token
    fewer per segment has to be above the threshold.

    Args:
        model: its scorer is used; its selection must be "learned".
        ids: (n,) tokens of the sample; a last part shorter than `config.window` is left out.
        ratio: tokens for each nugget, at least 1 and at most `config.window`.

    Raises:
        InputError: a selection that does not go by scores alone, too short a sample, a ratio out of range.
    """
    window = model.config.window
    if model.config.selection != "learned":
        raise InputError(
            f"selection {model.config.selection!r} does not go by scores alone, so no threshold can stand for it; "
            "give the stream a ratio"
        )
    if not 1 <= ratio <= window:
        raise InputError(f"ratio must be from 1 (keeps every token) to {window} (one nugget a segment), got {ratio}")
    rows = ids[: len(ids) // window * window].view(-1, window)
    if not len(rows):
        raise InputError(f"the sample has {len(ids)} tokens, at least {window} are needed; give more text")
    scores = torch.cat([model.token_scores(batch)[:, :-1].flatten() for batch in rows.split(BATCH_ROWS)])
    above = round(len(rows) * (window / ratio - 1))
    ranked = scores.sort(descending=True).values
    # halfway between the last that is above and the first that is not
    last, first = ranked[max(above - 1, 0)], ranked[min(above, len(ranked) - 1)]
    return float((last + first) / 2) if 0 < above < len(ranked) else float(last + 1 if not above else first - 1)

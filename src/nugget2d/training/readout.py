"""The slot read-out loss: a short gradient path that teaches the encoder what to put where.

For every nugget, layer with slots, and head: the value (head_dim) goes through the decoder's own output projection of
that head, the final norm and the tied embeddings, as if nothing stood between, and should predict the token at the
slot's distance (slots.py). The decoder learns to read the same slots by its ordinary loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nugget2d.modeling.network import Encoded, Network
from nugget2d.modeling.readout import final_norm, slot_layout


def readout_loss(model: Network, encoded: Encoded, ids: Tensor) -> Tensor:
    """Cross-entropy of the slots between a nugget and the one before it: mean over each layer, then over layers.

    Args:
        model: two copies of a Llama-shaped LM.
        encoded: the nuggets of `ids`.
        ids: (B, n).

    Logits are taken over the tokens that occur in the batch, not the whole vocabulary: to tell those apart is enough,
    and several times cheaper.
    """
    layout, norm = slot_layout(model), final_norm(model.lm)
    ends = encoded.index.masked_fill(~encoded.valid, -1)  # padding has no gap, and so no slots
    gaps = torch.diff(ends, prepend=ends.new_full((len(ids), 1), -1), dim=1)
    words, numbers = torch.unique(ids, return_inverse=True)
    embeddings = model.embed(words)
    losses = []
    for layer in layout.layers:
        distances = layout.distances(layer).to(ids.device)
        inside = distances[None, :, None] < gaps[:, None, :]  # (B, heads, K)
        if not inside.any():
            break
        places = (encoded.index[:, None, :] - distances[None, :, None]).clamp(min=0)
        wanted = numbers.gather(1, places.flatten(1)).view_as(places)
        written = layout.written(layer, encoded.nuggets.values[layer])
        logits = F.linear(norm(written[inside]), embeddings)
        losses.append(F.cross_entropy(logits.float(), wanted[inside]))
    # layers weigh the same: the far slots of deep layers are fewer, and would otherwise never be learned
    return torch.stack(losses).mean()

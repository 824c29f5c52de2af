"""The read-out loss: a short gradient path that teaches the encoder which head is to carry which token.

For every nugget, layer and head: the value (head_dim) goes through the decoder's own output projection of
that head, the final norm and the tied embeddings, as if nothing stood between, and should predict the token at the
head's distance (nugget2d.modeling.readout). The decoder learns to read the same values by its ordinary loss.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nugget2d.model import Nugget2D
from nugget2d.modeling.network import Encoded, Network
from nugget2d.modeling.readout import final_norm, head_readout
from nugget2d.training.corpus import Pack
from nugget2d.training.plugins import AuxiliaryLoss, MicroBatch
from nugget2d.training.recipe import Objective


class ReadoutLoss(AuxiliaryLoss):
    """`readout_loss` beside reconstruction; the configuration then says that tokens can be decoded from the states."""

    objectives: ClassVar[tuple[Objective, ...]] = ("reconstruct", "uniform")

    def prepare(self, model: Nugget2D, text: Pack) -> Nugget2D:
        """Say so in the model's configuration; refuses models whose heads cannot be told apart."""
        head_readout(model)
        model.config = model.config.model_copy(update={"token_readout": True})
        return model

    def losses(self, batch: MicroBatch, watched: Any) -> dict[str, Tensor]:
        """Of the nuggets that were read."""
        if batch.encoded is None:
            return {}
        return {"readout": readout_loss(batch.model, batch.encoded, batch.ids)}


def readout_loss(model: Network, encoded: Encoded, ids: Tensor) -> Tensor:
    """Cross-entropy over the tokens between a nugget and the one before it: mean over each layer, then over layers.

    Args:
        model: two copies of a Llama-shaped LM.
        encoded: the nuggets of `ids`.
        ids: (B, n).

    Logits are taken over the tokens that occur in the batch, not the whole vocabulary: to tell those apart is enough,
    and several times cheaper.
    """
    layout, norm = head_readout(model), final_norm(model.lm)
    ends = encoded.index.masked_fill(~encoded.valid, -1)  # padding has no gap, and so nothing to read out
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
    # layers weigh the same: the far tokens of deep layers are fewer, and would otherwise never be learned
    return torch.stack(losses).mean()

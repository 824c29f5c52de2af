"""What a Nugget2D is made of, as one frozen record that is saved beside its weights."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Adapters = Literal["lora", "copies"]  # how a compressor is trained
MemoryKind = Literal["nuggets", "pooled"]
SelectionName = Literal["learned", "window", "even", "random", "punctuation"]


class Frozen(BaseModel):
    """A typed record that cannot change and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Threshold(Frozen):
    """Tokens that score above `value` are nuggets; on the text it was calibrated on, one in `ratio` tokens."""

    ratio: float = Field(ge=1)
    value: float


class NuggetConfig(Frozen):
    """The choices that a checkpoint was trained with.

    Attributes:
        name: how errors and memory files call this model.
        memory: what the model was trained to read; "pooled" is a baseline (nugget2d.pooled).
        adapters: "lora" = two low-rank adapters on a frozen base (the published form, Nugget2D section 3);
            "copies" = the base itself decodes, a full copy of its layers encodes (best for small bases);
            "none" = a plain LM: there is no compressor.
        lora_rank: rank of both adapters; ignored for copies.
        lora_targets: names of the projections that carry an adapter; `Nugget2D.from_base` finds those of its LM.
        scorer_layer: the scorer reads the hidden state after this many layers, adapters off.
        selection: how nuggets are chosen unless a call says otherwise (see selection.py).
        window: the longest segment that the model was trained on, in tokens; longer texts are cut.
        context: the longest text, in tokens, that the model was trained to go on from; of a longer memory,
            the last segments that fit are read.
        flag: add a learned vector to the input embedding of chosen tokens ("nugget feedback", Nugget, section 3).
        slots: its nuggets spell the tokens before them, slot by slot (slots.py): the read-out loss trained it so.
        threshold: how a stream chooses nuggets unless its ratio is given (`Nugget2D.calibrate`); None counts instead.
    """

    name: str = "unnamed"
    memory: MemoryKind = "nuggets"
    adapters: Adapters | Literal["none"] = "lora"
    lora_rank: int = Field(default=32, ge=1)
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj")
    scorer_layer: int = Field(default=3, ge=0)
    selection: SelectionName = "learned"
    window: int = Field(default=512, ge=8)
    context: int = Field(default=4096, ge=8)
    flag: bool = True
    slots: bool = False
    threshold: Threshold | None = None

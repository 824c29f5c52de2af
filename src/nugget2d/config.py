"""`NuggetConfig`: the configuration of a compressor, saved beside its weights."""

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from nugget2d.errors import InputError

Adapters = Literal["lora", "copies"]  # how a compressor is trained
MemoryKind = Literal["nuggets", "pooled"]
SelectionName = Literal["learned", "window", "even", "random", "punctuation"]


class Frozen(BaseModel):
    """A typed record that cannot change and refuses unknown keys, NaN and infinity, which JSON cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def wrong_field(error: ValidationError) -> InputError:
    """The first argument that does not fit its record, and why."""
    first = error.errors()[0]
    return InputError(f"{first['loc'][0]}: {first['msg']}; got {first['input']!r:.60}")


class Threshold(Frozen):
    """Tokens that score above `value` become nuggets: one in `ratio` tokens of the text it was calibrated on."""

    ratio: float = Field(ge=1)
    value: float


class NuggetConfig(Frozen):
    """The choices that a checkpoint was trained with; `slots`, in older files, is `token_readout`.

    Attributes:
        name: of this model in error messages and memory files.
        memory: what the model was trained to read; "pooled" is a baseline (nugget2d.pooled).
        adapters: "lora" = two low-rank adapters on a frozen base (the published form, Nugget2D section 3);
            "copies" = the base itself decodes, a full copy of its layers encodes (best for small bases);
            "none" = a plain LM: there is no compressor.
        lora_rank: rank of both adapters; ignored for copies.
        lora_targets: names of the projections that carry an adapter; `Nugget2D.from_base` finds those of its LM.
        scorer_layer: the scorer reads the hidden state after this many layers, adapters off.
        selection: how nuggets are chosen unless a call says otherwise (see selection.py).
        window: the longest segment that the model was trained on, in tokens; longer texts are cut.
        context: the longest text, in tokens, that the model was trained to continue from; of a longer memory, the last
            segments that fit are read.
        flag: add a learned vector to the input embedding of chosen tokens ("nugget feedback", Nugget, section 3).
        token_readout: trained with the read-out loss, so that each head of a nugget carries one of the tokens before it
            (modeling/readout.py) and nearly all tokens can be decoded from the states.
        threshold: the scores by which streams choose nuggets (`Nugget2D.calibrate`); None chooses by a ratio.
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
    token_readout: bool = Field(default=False, validation_alias=AliasChoices("token_readout", "slots"))
    threshold: Threshold | None = None

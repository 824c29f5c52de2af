"""The weights of encoder and decoder on top of one base LM, switched by role.

`LoraParameters`: two low-rank adapters on a frozen base (Nugget2D, section 3). `CopiedParameters`: the base itself is
the decoder and a full copy of its layers is the encoder; token embeddings are shared. `PlainParameters`: a plain LM,
the same in every role. No model code is patched.
"""

import copy
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, cast

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers import PreTrainedModel

from nugget2d.config import NuggetConfig
from nugget2d.errors import ModelError

# names of both adapters, and of the roles that they play
ADAPTERS = ("encoder", "decoder")
Role = Literal["base", "encoder", "decoder"]

# Where the queries, values and outputs of attention are computed (Nugget2D, section 3), by the names that transformers
# gives them. Fused matrices include the keys, which then get an adapter as well.
_PROJECTIONS = (
    *("q_proj", "v_proj", "o_proj", "out_proj"),  # Llama and its kin; OPT, GPT-J
    "qkv_proj",  # Phi-3, fused
    *("query_key_value", "attention.dense", "self_attention.dense"),  # GPT-NeoX, Falcon, fused
    "self_attn.dense",  # Phi
    *("attn.c_attn", "attn.c_proj"),  # GPT-2, fused
)


class _Lock:
    """A reentrant lock; copies and unpickled objects get a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["_Lock"], tuple[()]]:
        return _Lock, ()


class Parameters(nn.Module, ABC):
    """One causal LM in three roles.

    "encoder" computes nuggets, "decoder" reads them, "base" is the original LM (adapters off), whose states are scored.

    Attributes:
        lm: the LM.
        current: the role it is in.
    """

    lm: PreTrainedModel

    def __init__(self) -> None:
        """In the role "base"."""
        super().__init__()
        self._lock = _Lock()
        self.current: Role = "base"

    @contextmanager
    def role(self, role: Role) -> Iterator[PreTrainedModel]:
        """A context in which the yielded causal LM (its body, for "encoder") computes with the role's weights.

        One thread at a time: a role is state of the shared modules, and a stream generates in a thread of its own.
        """
        with self._lock, self._switched(role) as module:
            previous, self.current = self.current, role
            try:
                yield module
            finally:
                self.current = previous

    @abstractmethod
    def _switched(self, role: Role) -> AbstractContextManager[PreTrainedModel]:
        """`role`, without the lock."""

    @abstractmethod
    def encoder_parameters(self) -> list[nn.Parameter]:
        """What only the encoder trains."""

    @abstractmethod
    def decoder_parameters(self) -> list[nn.Parameter]:
        """What only the decoder trains (for copies: the whole base)."""

    @property
    def body(self) -> PreTrainedModel:
        """The LM without its head."""
        return cast(PreTrainedModel, self.lm.base_model)


class PlainParameters(Parameters):
    """A plain LM: encoder and decoder are the base."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Freeze `lm`."""
        super().__init__()
        self.lm = lm
        lm.requires_grad_(False)

    @contextmanager
    def _switched(self, role: Role) -> Iterator[PreTrainedModel]:
        """Nothing has to be switched."""
        yield self.body if role == "encoder" else self.lm

    def encoder_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def decoder_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []


class CopiedParameters(Parameters):
    """Two full sets of layers; the decoder set doubles as the base."""

    def __init__(self, lm: PreTrainedModel) -> None:
        """Copy the layers of `lm` for the encoder; the embedding matrix stays shared."""
        super().__init__()
        self.lm = lm
        embeddings = lm.get_input_embeddings()
        self.encoder = copy.deepcopy(self.body, {id(embeddings): embeddings})

    @contextmanager
    def _switched(self, role: Role) -> Iterator[PreTrainedModel]:
        """Nothing has to be switched."""
        yield self.encoder if role == "encoder" else self.lm

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The copied layers, without the shared embeddings."""
        shared = {id(p) for p in self.lm.get_input_embeddings().parameters()}
        return [p for p in self.encoder.parameters() if id(p) not in shared]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The whole base, embeddings included."""
        return list(self.lm.parameters())


class LoraParameters(Parameters):
    """Adapters named "encoder" and "decoder" injected into a frozen base."""

    def __init__(self, lm: PreTrainedModel, config: NuggetConfig) -> None:
        """Freeze `lm` and add both adapters, in float32, to the projections in `config.lora_targets`.

        Raises:
            ModelError: the base has no module of those names.
        """
        super().__init__()
        self.lm = lm
        lm.requires_grad_(False)
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(config.lora_targets))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are intended
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it
                for name in ADAPTERS:
                    inject_adapter_in_model(lora, lm, adapter_name=name)
                for name in ADAPTERS:  # half precision would round small updates to zero
                    cast_adapter_dtype(lm, name)
        except ValueError as error:
            raise ModelError(
                f"no adapter can be put on {type(lm).__name__}: {error}; set lora_targets to its projections"
            ) from error
        self._tuners = [module for module in lm.modules() if isinstance(module, LoraLayer)]
        self._activate("base")

    @contextmanager
    def _switched(self, role: Role) -> Iterator[PreTrainedModel]:
        """The previous role comes back at the end of the block."""
        previous = self.current
        self._activate(role)
        try:
            yield self.body if role == "encoder" else self.lm
        finally:
            self._activate(previous)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The weights of adapter "encoder"."""
        return self._adapter_parameters("encoder")

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The weights of adapter "decoder"."""
        return self._adapter_parameters("decoder")

    def _adapter_parameters(self, name: str) -> list[nn.Parameter]:
        halves = (half[name] for tuner in self._tuners for half in (tuner.lora_A, tuner.lora_B))
        return [parameter for half in halves for parameter in half.parameters()]

    def _activate(self, role: Role) -> None:
        for tuner in self._tuners:
            if role == "base":
                tuner.enable_adapters(False)
            else:
                tuner.enable_adapters(True)
                tuner.set_adapter(role)
            # set_adapter and enable_adapters freeze the other adapter, but both need gradients
            tuner.set_requires_grad(list(ADAPTERS), True)


def attention_projections(lm: PreTrainedModel) -> tuple[str, ...]:
    """Names, for `NuggetConfig.lora_targets`, of the known query, value and output projections that `lm` has."""
    modules = [name for name, _ in lm.named_modules()]
    return tuple(target for target in _PROJECTIONS if any(name.endswith(f".{target}") for name in modules))


def make_parameters(lm: PreTrainedModel, config: NuggetConfig) -> Parameters:
    """The parameter sets that `config.adapters` asks for."""
    if config.adapters == "none":
        return PlainParameters(lm)
    return CopiedParameters(lm) if config.adapters == "copies" else LoraParameters(lm, config)

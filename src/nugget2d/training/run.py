"""From a recipe file to a trained model folder."""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.checkpoints.base import load_base
from nugget2d.checkpoints.layout import TOKENIZER_FOLDER
from nugget2d.checkpoints.load import load
from nugget2d.checkpoints.resolve import find_compressor
from nugget2d.checkpoints.save import save
from nugget2d.config import MemoryKind
from nugget2d.errors import RecipeError
from nugget2d.model import Nugget2D
from nugget2d.modeling.precision import has_fast_bfloat16
from nugget2d.pooled import PooledMemory
from nugget2d.training.corpus import Pack, make_pack
from nugget2d.training.loop import fit
from nugget2d.training.plugins import AuxiliaryLoss, load_plugins, memory_of
from nugget2d.training.processes import Processes, alone, together
from nugget2d.training.recipe import FROZEN, CompressStage, Recipe, ShapeConfig, load_recipe
from nugget2d.training.spread import Replicas, Shards, Spread, whole
from nugget2d.training.tasks import CompressTask, PretrainTask

MEMORIES: dict[MemoryKind, type[Nugget2D]] = {"nuggets": Nugget2D, "pooled": PooledMemory}


def train(recipe_path: Path, *, out: Path | None = None, fresh: bool = False) -> Path:
    """Run every stage of a recipe, resuming from its checkpoints; returns the folder with the results.

    The folder gets `pack/` (tokenizer and ids), `pretrain/` and `compress/` (log.jsonl, loss.png, checkpoint.pt),
    `base/` (the LM alone) and, after the compressor stage, `model/` for `Nugget2D.from_pretrained`.

    Args:
        recipe_path: the YAML file.
        out: instead of the recipe's own `out`.
        fresh: start over, ignoring checkpoints.

    Raises:
        RecipeError: the recipe or its data is wrong; the message names the key and the remedy.
        ModelError: what it trains is of a kind that cannot be trained so.
    """
    recipe = load_recipe(recipe_path)
    if recipe.compress is not None and (kind := memory_of(load_plugins(recipe.compress))):
        raise RecipeError(f"{kind.__name__}, which a plugin brings, cannot be saved: train it in a study, or remove it")
    home = recipe_path.parent
    folder = out or home / recipe.out
    with together() as processes:
        model = fit_recipe(recipe, home, folder, pack=folder / "pack", fresh=fresh, processes=processes)
        if model is not None:
            state = whole(model.state_dict(keep_vars=True), processes)
            if processes.first:
                last = (folder / "compress" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
                metrics = json.loads(last)["held_out"]
                save(model, folder / "model", torch.bfloat16, metrics=metrics, state=state)
        processes.wait()
    return folder


def fit_recipe(
    recipe: Recipe,
    home: Path,
    folder: Path,
    *,
    pack: Path,
    fresh: bool = False,
    processes: Processes | None = None,
) -> Nugget2D | None:
    """Run every stage of a recipe whose paths are relative to `home`; returns the compressor, if it trains one.

    Args:
        recipe: what to train.
        home: the recipe's own folder.
        folder: gets `pretrain/`, `compress/` and `base/` as in `train`.
        pack: where the data pack lies, or is made.
        fresh: start over, ignoring checkpoints.
        processes: who trains; None is this process alone.

    Raises:
        RecipeError: the recipe or its data is wrong; the message names the key and the remedy.
        ModelError: what it trains is of a kind that cannot be trained so.
    """
    processes = processes or alone()
    plugins = [] if recipe.compress is None else load_plugins(recipe.compress)
    torch.manual_seed(recipe.seed)
    console = Console(stderr=True, quiet=not processes.first)
    device = processes.device.type
    precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    console.print(f"{recipe.name}: {processes.count} x {device}, {precision}, results in {folder}")
    if not processes.first:
        processes.wait()
    tokenizer = prepare_pack(recipe, home, pack)
    if processes.first:
        processes.wait()
    packs = Pack(pack / "train.bin"), Pack(pack / "held_out.bin")
    console.print(f"{len(packs[0]):,} training tokens, {len(packs[1]):,} held out")
    if recipe.compress is not None and recipe.compress.init is not None:
        model = _trained(_local(recipe.compress.init, home), recipe.name, recipe.compress).to(processes.device)
    else:
        lm = _language_model(recipe, folder, tokenizer, packs, _base(recipe, home), processes, fresh)
        if recipe.compress is None:
            return None
        model = _wrap(lm, tokenizer, recipe.name, recipe.compress, memory_of(plugins))
    for plugin in plugins:
        model = plugin.prepare(model, packs[0])
    _choose_attention(model, device)
    if device == "cuda":
        compile_blocks(model.parameters_by_role)
    task = CompressTask(model, recipe.compress, *packs, plugins)
    keep_layers = any(isinstance(plugin, AuxiliaryLoss) for plugin in plugins)
    spread = _spread(model, recipe, processes, keep_layers=keep_layers)
    fit(task, spread, folder / "compress", seed=recipe.seed, save_minutes=recipe.save_minutes, fresh=fresh)
    return model.eval()


def _spread(module: nn.Module, recipe: Recipe, processes: Processes, *, keep_layers: bool) -> Spread:
    """The strategy of `recipe.parallel`, with several processes."""
    if recipe.parallel == "ddp" or processes.count == 1:
        return Replicas(module, processes)
    return Shards(module, processes, keep_layers=keep_layers)


def prepare_pack(recipe: Recipe, home: Path, pack: Path) -> PreTrainedTokenizerBase:
    """Make (or reuse) the data pack of a recipe whose paths are relative to `home`; returns its tokenizer."""
    stage = recipe.compress
    if stage is not None and stage.init is not None:
        init = _local(stage.init, home)
        if (compressor := find_compressor(init)) is None:
            raise RecipeError(f"`init: {init}` is a plain language model; give a compressor, or write it as `base`")
        place: str | None = str(compressor / TOKENIZER_FOLDER)
    else:
        place = _base(recipe, home)
    return make_pack(pack, recipe.data, home, recipe.tokenizer, place)


def _base(recipe: Recipe, home: Path) -> str | None:
    """The folder or hub id of a base of one's own."""
    base = None if recipe.compress is None else recipe.compress.base
    return None if base is None else _local(base, home)


def _local(name: str, home: Path) -> str:
    """A folder relative to the recipe's own, or else the name as it is."""
    return str(home / name) if (home / name).is_dir() else name


def _language_model(
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    packs: tuple[Pack, Pack],
    base: str | None,
    processes: Processes,
    fresh: bool,
) -> PreTrainedModel:
    device = processes.device.type
    if base is not None:
        lm = load_base(base).lm
    elif recipe.model is not None:
        lm = make_lm(recipe.model, tokenizer)
        nn.Module.to(lm, processes.device)
    else:
        raise RecipeError("give `model` or `compress.base`")
    _choose_attention(lm, device)
    if recipe.pretrain is None:
        return lm
    if device == "cuda":
        compile_blocks(lm)
    task = PretrainTask(lm, recipe.pretrain, *packs)
    spread = _spread(lm, recipe, processes, keep_layers=False)
    fit(task, spread, folder / "pretrain", seed=recipe.seed, save_minutes=recipe.save_minutes, fresh=fresh)
    state = whole(lm.state_dict(keep_vars=True), processes)
    if processes.first:
        lm.save_pretrained(folder / "base", state_dict=state)
        tokenizer.save_pretrained(folder / "base")
    processes.wait()
    if isinstance(spread, Replicas):
        return lm
    # sharded layers cannot be copied
    again = load_base(folder / "base").lm
    nn.Module.to(again, processes.device)
    again.set_attn_implementation(lm.config._attn_implementation)
    return again


def _trained(init: str, name: str, stage: CompressStage) -> Nugget2D:
    """The compressor that is trained further, its configuration that of what it will have been trained on."""
    model = load(MEMORIES[stage.memory], init)
    if model.config.adapters == "lora" and stage.trains_lm:
        raise RecipeError(FROZEN)
    changes = {
        "name": name,
        "memory": stage.memory,
        "selection": stage.selection,
        "window": max(model.config.window, stage.longest_window),
        "context": max(model.config.context, stage.longest_context),
    }
    model.config = model.config.model_copy(update=changes)
    return model


def _choose_attention(module: nn.Module, device: str) -> None:
    """On the CPU eager attention trains 15 % faster than sdpa, whose kernel there has no fast backward pass."""
    for lm in module.modules():
        if device == "cpu" and isinstance(lm, PreTrainedModel):
            lm.set_attn_implementation("eager")


def compile_blocks(module: nn.Module) -> None:
    """Compile everything in the layers but attention, in place, for batches of any shape.

    Attention is left out: whether its cache is empty and its mask is there changes with every objective, and whole
    layers would run into the recompilation limit.
    """
    for layers in (m for m in module.modules() if isinstance(m, nn.ModuleList)):
        for layer in layers:
            for name, block in layer.named_children():
                if "attn" not in name and "attention" not in name:
                    block.compile(dynamic=True)


def make_lm(shape: ShapeConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama-shaped LM with random weights and tied embeddings."""
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            attention_bias=shape.attention_bias,
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=True,
            initializer_range=0.5 / shape.hidden_size**0.5,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    # the embeddings are the head too: logits of unit spread from the start
    nn.init.normal_(lm.model.embed_tokens.weight, std=shape.hidden_size**-0.5)
    return lm


def _wrap(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    stage: CompressStage,
    kind: type[Nugget2D] | None,
) -> Nugget2D:
    """A fresh compressor; `kind`, if a plugin brings one, in place of the stage's."""
    return (kind or MEMORIES[stage.memory]).from_base(
        lm,
        tokenizer,
        name=name,
        adapters=stage.adapters,
        lora_rank=stage.lora_rank,
        scorer_layer=stage.scorer_layer,
        selection=stage.selection,
        window=stage.longest_window,
        context=stage.longest_context,
        flag=stage.flag,
    )

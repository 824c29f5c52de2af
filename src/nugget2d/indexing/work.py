"""A worker of indexing: compresses the documents that the store does not have, and stores them.

The engines (processes.py, clusters.py) distribute batches of documents to workers.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers.utils import logging

from nugget2d.config import Frozen
from nugget2d.files import expand_home
from nugget2d.indexing.documents import Batch, Document, Done, Failure, Outcome
from nugget2d.memory.memory import Memory
from nugget2d.methods.options import Addresses, CompressOptions
from nugget2d.model import Nugget2D
from nugget2d.store import MemoryStore

AGAIN = "run the same command again to resume"  # the remedy when an engine fails


class Job(Frozen):
    """What a worker needs to know.

    Attributes:
        store: what `MemoryStore` opens.
        model: what `Nugget2D.from_pretrained` loads.
        options: arguments of `MemoryStore.add`: method, budget, configuration.
        tags: of every record.
    """

    store: str
    model: str
    options: dict[str, Any] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def from_any_folder(self) -> "Job":
        """The same with whole paths, for processes that start in another folder."""
        store, model = self.store, self.model
        return self.model_copy(
            update={
                "store": store if "://" in store else str(expand_home(store).absolute()),
                "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
            }
        )


@dataclass(frozen=True)
class Known:
    """Tells which texts need no compressing, as the job's store has their memories.

    Attributes:
        store: what `MemoryStore` opens, when the first text comes, from any folder.
        addresses: of what the job makes.
    """

    store: str
    addresses: Addresses

    @staticmethod
    def to(job: Job) -> "Known":
        """Of a job. Its model is loaded for the addresses, and not kept.

        Raises:
            ModelError, InputError: see `Nugget2D.from_pretrained` and `CompressOptions.to_keep`.
        """
        model = _load(job, "cpu")
        return Known(job.from_any_folder().store, CompressOptions.to_keep(model, **job.options).addresses(model))

    @cached_property
    def _opened(self) -> MemoryStore:
        return MemoryStore(self.store, create=False)

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        """Whether the store has each: in threads, as one in a bucket takes a request for each."""
        look = partial(self._opened.at, verify=False)
        with ThreadPoolExecutor(max(1, len(texts))) as pool:
            return [record is not None for record in pool.map(look, map(self.addresses.of, texts))]


class Worker:
    """A model and a store, in a process of their own, on one thread."""

    def __init__(self, job: Job) -> None:
        """Load the model and open the store.

        Raises:
            ModelError, StoreError: see `Nugget2D.from_pretrained` and `MemoryStore`.
        """
        torch.set_num_threads(1)
        self._model = _load(job, "cuda" if torch.cuda.is_available() else "cpu")
        self._store = MemoryStore(job.store)
        self._tags = job.tags
        self._settings = CompressOptions.to_keep(self._model, **job.options)

    def __call__(self, batch: Batch) -> list[Outcome]:
        """Process a batch; a document that fails does not affect the others.

        Raises:
            StoreError, OutputError: the store cannot be written, which no document causes.
        """
        outcomes: list[Outcome] = [entry for entry in batch if not isinstance(entry, Document)]
        read = [entry for entry in batch if isinstance(entry, Document)]
        keys = [self._settings.address(document.text, self._model) for document in read]
        lacking = {key for key in keys if self._store.at(key, verify=False) is None}
        new = {key: document for key, document in zip(keys, read, strict=True) if key in lacking}  # each text once
        results = dict(zip(new, self._compress([document.text for document in new.values()]), strict=True))
        for key, document in zip(keys, read, strict=True):
            result = results.get(key)
            if result is None or new[key] is not document:
                outcomes.append(Done(document.name, 0))
            elif isinstance(result, Memory):
                self._store.put(
                    result,
                    model=self._model,
                    key=key,
                    name=document.name,
                    tags=self._tags,
                    settings=self._settings,
                    text=document.text,
                )
                outcomes.append(Done(document.name, result.num_tokens))
            else:
                outcomes.append(Failure(document.name, result))
        return outcomes

    def _compress(self, texts: list[str]) -> list[Memory | str]:
        """The memory of each text, or an error message; if texts fail together, each is tried alone."""
        if not texts:
            return []
        try:
            return list(self._settings.compress(self._model, texts))
        except Exception as error:  # any error of a tokenizer or model
            if len(texts) == 1:
                return [str(error) or type(error).__name__]
            return [result for text in texts for result in self._compress([text])]


def _load(job: Job, device: str) -> Nugget2D:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Nugget2D.from_pretrained(job.model, device=device)

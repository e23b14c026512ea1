"""What is measured on: peers by their size, batches of random rows, and a corpus that a model can learn."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from ctcd_ds import cli
from ctcd_ds.corpus.indexed import write_index
from ctcd_ds.corpus.rows import BERT_LAYOUT, VERSION, Corpus, SpecialIds
from ctcd_ds.corpus.tokenizer import load_tokenizer, tokenizer_identity
from ctcd_ds.manifest import file_entry, write_manifest
from ctcd_ds.objective.batch import Batch
from ctcd_ds.objective.graph import DistillationGraph
from ctcd_ds.peers.accounting import cost
from ctcd_ds.peers.build import build_peer, padded
from ctcd_ds.peers.cotrain import CoTraining
from ctcd_ds.recipe.sections import PeerSection
from ctcd_ds.tasks.clm import CausalLM
from ctcd_ds.tasks.masking import Masking
from ctcd_ds.tasks.mlm import MaskedLM, PeerMasks
from ctcd_ds.tasks.task import Task

SPECIAL = SpecialIds(cls=2, sep=3, mask=4, pad=0, unk=1)
FIRST_WORD = 5  # the first id that is no special token
MASK_FRACTION = 0.15


@dataclass(frozen=True)
class Size:
    """A BERT or a Llama by layers × width; heads of 64, feed-forward of four widths, as in BERT itself."""

    layers: int
    width: int

    def model(self, length: int, task: str) -> dict[str, Any]:
        """The recipe's `model` section for rows of `length`."""
        return {
            "model_type": {"mlm": "bert", "clm": "llama"}[task],
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // 64),
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": max(512, length),
        }


def sizes(text: str) -> list[Size]:
    """'6x768,4x768' as an option's type."""
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write LAYERSxWIDTH,LAYERSxWIDTH…, e.g. 6x768,4x768")
    return [Size(*map(int, part.split("x"))) for part in text.split(",")]


def add_shape_options(parser: argparse.ArgumentParser, peers: str = "6x768,4x768") -> None:
    """The options that say how large the measured step is."""
    parser.add_argument("--peers", type=sizes, default=peers, help="LAYERSxWIDTH of each peer")
    parser.add_argument("--task", choices=("mlm", "clm"), default="mlm", help="BERTs, or Llamas asked at all positions")
    parser.add_argument("--sequence_length", type=cli.positive, default=128)
    parser.add_argument("--rows", type=cli.positive, default=16, help="rows in a step")
    parser.add_argument("--vocab_size", type=cli.positive, default=30522, help="rounded up to a multiple of 64")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="of weights and activations")


@dataclass(frozen=True)
class Shape:
    """How large a step is. `vocab_size` is padded already, so that no way has odd matrices."""

    peers: tuple[Size, ...]
    length: int
    rows: int
    vocab_size: int
    task_name: str = "mlm"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Shape:
        """The shape that the options ask for."""
        vocabulary = padded(arguments.vocab_size)
        return cls(tuple(arguments.peers), arguments.sequence_length, arguments.rows, vocabulary, arguments.task)

    @property
    def masking(self) -> Masking:
        """Fixed-count masking at BERT's 15 %."""
        return Masking(MASK_FRACTION, SPECIAL, self.vocab_size)

    @property
    def corpus(self) -> Corpus:
        """What a peer needs to know of a corpus, without one."""
        return Corpus(Path(), "", SPECIAL, self.vocab_size, "", "", "uint16", {}, ((), ()))

    @property
    def task(self) -> Task:
        """The same for all peers."""
        if self.task_name == "clm":
            return CausalLM(self.corpus, dict.fromkeys(self.names), True, self.length)
        masks = dict.fromkeys(self.names, PeerMasks(self.masking))
        return MaskedLM(self.corpus, self.length, self.masking, masks)

    @property
    def names(self) -> tuple[str, ...]:
        """The peers' names: their place and size."""
        return tuple(f"peer{k}-{size.layers}x{size.width}" for k, size in enumerate(self.peers))

    def flops(self) -> float:
        """What one training step must do: matrix products only, heads at the targets only."""
        asked = self.length if self.task_name == "clm" else self.masking.count(self.length)
        costs = (cost(peer.config, self.length, asked, self.task.auto_class()) for peer in meta_models(self))
        return sum(3 * c.forward_flops for c in costs) * self.rows * self.length


def meta_models(shape: Shape) -> list[Any]:
    """The peers without memory."""
    with torch.device("meta"):
        return list(build_models(shape).values())


def build_models(shape: Shape) -> dict[str, Any]:
    """The peers as Hugging Face models, fp32, by name."""
    sections = [PeerSection(model=size.model(shape.length, shape.task_name)) for size in shape.peers]
    return {
        name: build_peer(name, s, shape.corpus, 1, shape.task.auto_class())
        for name, s in zip(shape.names, sections, strict=True)
    }


def full_graph(names: Sequence[str]) -> DistillationGraph:
    """Everyone learns from everyone: soft weights 1 for the first peer, 4 for the others, as in the paper's 1:1:1:4."""
    n = len(names)
    weight = [(1.0 if i == 0 else 4.0) / max(1, n - 1) for i in range(n)]
    soft = tuple(tuple(0.0 if i == j else weight[i] for j in range(n)) for i in range(n))
    return DistillationGraph(tuple(names), (1.0,) * n, soft, (True,) * n)


def co_training(models: Mapping[str, Any], graph: DistillationGraph, vocab_size: int) -> CoTraining:
    """The peers of `graph` in the container that training uses, in training mode."""
    return CoTraining({name: models[name] for name in graph.names}, graph, vocab_size, seed=1).train()


def random_batch(shape: Shape, device: torch.device) -> tuple[Batch, dict[str, Tensor]]:
    """The same random rows twice: as our Batch, and as a collator of transformers gives them, labels in place."""
    random, numbers = np.random.default_rng(0), np.arange(shape.rows)
    if shape.task_name == "clm":
        tokens = random.integers(FIRST_WORD, shape.vocab_size, (shape.rows, shape.length + 1), dtype=np.int32)
        [batch] = shape.task.batches(tokens, 1, np.zeros_like(numbers), numbers, shape.rows)
        rows = torch.from_numpy(tokens.astype(np.int64)).to(device)
        return batch.to(device), {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
    tokens = random.integers(FIRST_WORD, shape.vocab_size, (shape.rows, shape.length), dtype=np.int32)
    tokens[:, 0], tokens[:, -1] = SPECIAL.cls, SPECIAL.sep
    ids, places, originals = shape.masking.apply(tokens, 1, np.zeros_like(numbers), numbers)
    labels = np.full_like(tokens, -100)
    np.put_along_axis(labels, places.astype(np.int64), originals, axis=1)

    [batch] = shape.task.batches(tokens, 1, np.zeros_like(numbers), numbers, shape.rows)
    input_ids, hf_labels = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (ids, labels))
    collated = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": hf_labels}
    return batch.to(device), collated


def write_corpus(folder: Path, vocab_size: int, rows: int, length: int) -> Path:
    """A corpus of at least `rows` rows of a Markov chain (three likely next tokens): something a model can learn.

    Its tokenizer has the words w5, w6, …: no text is ever needed here.
    """
    chains = 256
    steps = -(-2 * rows * length // chains)  # twice what is asked for, as the documents end in [SEP]
    random = np.random.default_rng(1)
    following = random.integers(FIRST_WORD, vocab_size, (vocab_size, 3), dtype=np.uint16)
    tokens = np.empty((chains, steps), np.uint16)
    current = random.integers(FIRST_WORD, vocab_size, chains)
    for step in range(steps):
        tokens[:, step] = current
        current = following[current, random.choice(3, chains, p=(0.7, 0.2, 0.1))]
    tokens[:, -1] = SPECIAL.sep

    folder.mkdir(parents=True)
    tokenizer = _tokenizer(vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    held_out = max(1, chains // 16)
    splits = {"train": [_shard(folder, "train-00000", tokens[held_out:])]}
    splits["valid"] = [_shard(folder, "valid-00000", tokens[:held_out])]
    identity = tokenizer_identity(load_tokenizer(folder / "tokenizer"))
    content = {"format": "ctcd_ds.corpus", "version": VERSION, "tokenizer": identity, "dtype": "uint16", "settings": {}}
    write_manifest(folder / "manifest.json", {**content, **BERT_LAYOUT, "splits": splits})
    return folder


def _tokenizer(vocab_size: int) -> Any:
    from transformers import BertTokenizer

    special = {number: f"[{role.upper()}]" for role, number in SPECIAL.present.items()}
    return BertTokenizer(vocab={special.get(number, f"w{number}"): number for number in range(vocab_size)})


def _shard(folder: Path, name: str, documents: np.ndarray) -> dict[str, Any]:
    """megatron-core's pair of files, written without megatron-core: a GPU machine may lack it."""
    count, each = documents.shape
    documents.tofile(folder / f"{name}.bin")
    (folder / f"{name}.idx").write_bytes(write_index("uint16", np.full(count, each)))
    files = {kind: file_entry(folder / f"{name}.{kind}") for kind in ("bin", "idx")}
    return {"name": name, "documents": count, "tokens": int(documents.size), **files}


def recipe(folder: Path, shape: Shape, corpus: Path, steps: int, **training: Any) -> Path:
    """Writes a recipe that co-trains the shape's peers on `corpus`, the full graph; gives its path."""
    graph = full_graph(shape.names)
    peers = {
        name: {"model": size.model(shape.length, shape.task_name), "soft": dict(zip(graph.names, weights, strict=True))}
        for name, size, weights in zip(shape.names, shape.peers, graph.soft, strict=True)
    }
    for name in shape.names:
        del peers[name]["soft"][name]
    path = folder / "recipe.json"
    path.write_text(
        json.dumps(
            {
                "corpus": {"path": str(corpus), "sequence_length": shape.length, "mask_fraction": MASK_FRACTION},
                "peers": peers,
                "training": {"global_batch_rows": shape.rows, "steps": steps, "log_every": 1, **training},
            }
        )
    )
    return path

"""Tiny models and made-up files in the formats of GLUE, for tests of fine-tuning."""

from __future__ import annotations

import random
from pathlib import Path

GOOD = ["good", "fine", "warm", "bright", "happy", "kind", "fresh", "sweet"]
BAD = ["bad", "poor", "cold", "dull", "sad", "cruel", "stale", "sour"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]


def write_model(folder: Path, seed: int = 1, model_type: str = "bert", **own: int) -> Path:
    """A tiny random masked LM with its WordPiece tokenizer, as `tools/export_hf.py` leaves one; `own` sizes of it."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, BertTokenizer

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *["it", "was", '"', "'", "?", ".", "a"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes: dict[str, int | None] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": None, "eos_token_id": None}
    sizes |= {"max_position_embeddings": 24, "vocab_size": len(words), **ids}
    sizes |= own
    config = AutoConfig.for_model(model_type, **sizes, **({"type_vocab_size": 1} if model_type == "roberta" else {}))
    torch.manual_seed(seed)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


def write_causal(folder: Path, model_type: str, seed: int = 1) -> Path:
    """A tiny random causal LM, or T5, with the byte-level BPE of its like: one special token that is put nowhere."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    draw = random.Random(0)
    backend.train_from_iterator((sentence(draw, n % 2) for n in range(500)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    if model_type == "t5":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
        sizes |= {"intermediate_size": 64} if model_type != "gpt2" else {}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(model_type, **sizes, **ids, vocab_size=len(tokenizer))
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    torch.manual_seed(seed)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(draw: random.Random, kind: int) -> str:
    return f'It was "{draw.choice(GOOD if kind else BAD)} a {draw.choice(GOOD if kind else BAD)}.'


def write_tsv(path: Path, header: list[str] | None, rows: list[list[object]], start: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + rows
    path.write_text(start + "\n".join("\t".join(map(str, line)) for line in lines) + "\n", encoding="utf-8")


def write_glue(folder: Path, rows: int = 24, dev: int = 10, test: int = 5) -> Path:
    """All ten tasks in their official formats, made up: a pair belongs together where both sides are of a kind."""
    draw = random.Random(0)

    def pairs(size: int, kinds: int) -> list[tuple[int, str, str]]:
        return [(n % kinds, sentence(draw, 1), sentence(draw, int(n % kinds == 0))) for n in range(size)]

    for name, size in (("train", rows), ("dev", dev)):
        kinds = [(n % 2, sentence(draw, n % 2)) for n in range(size)]
        write_tsv(folder / f"CoLA/{name}.tsv", None, [["gj04", k, "*" if not k else "", s] for k, s in kinds])
        write_tsv(folder / f"SST-2/{name}.tsv", ["sentence", "label"], [[s, k] for k, s in kinds])
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_tsv(folder / f"MRPC/{name}.tsv", header, [[k, 1, 2, a, b] for k, a, b in pairs(size, 2)], "\ufeff")
        header = [
            "index",
            "genre",
            "filename",
            "year",
            "old_index",
            "source1",
            "source2",
            "sentence1",
            "sentence2",
            "score",
        ]
        made = [[n, *"abcdef", a, a, f"{5 * k}.000"] for n, (k, a) in enumerate(kinds)]
        write_tsv(folder / f"STS-B/{name}.tsv", header, made)
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        write_tsv(
            folder / f"QQP/{name}.tsv", header, [[n, 7, 8, a, b, k] for n, (k, a, b) in enumerate(pairs(size, 2))]
        )
        for task, columns in (("QNLI", ["question", "sentence"]), ("RTE", ["sentence1", "sentence2"])):
            spelt = ["entailment", "not_entailment"]
            made = [[n, a, b, spelt[k]] for n, (k, a, b) in enumerate(pairs(size, 2))]
            write_tsv(folder / f"{task}/{name}.tsv", ["index", *columns, "label"], made)
        made = [[n, a, b, k] for n, (k, a, b) in enumerate(pairs(size, 2))]
        write_tsv(folder / f"WNLI/{name}.tsv", ["index", "sentence1", "sentence2", "label"], made)
    start = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    inference = ["entailment", "neutral", "contradiction"]
    for name, size, labels in (("train", rows, 1), ("dev_matched", dev, 5), ("dev_mismatched", dev, 5)):
        header = [*start.split(), "sentence1", "sentence2", *(f"label{n + 1}" for n in range(labels)), "gold_label"]
        made = [[n, *"abcdefg", a, b, *["x"] * labels, inference[k]] for n, (k, a, b) in enumerate(pairs(size, 3))]
        write_tsv(folder / f"MNLI/{name}.tsv", header, made)
    for name in ("test_matched", "test_mismatched"):
        made = [[n, *"abcdefg", a, b] for n, (_, a, b) in enumerate(pairs(test, 3))]
        write_tsv(folder / f"MNLI/{name}.tsv", [*start.split(), "sentence1", "sentence2"], made)
    for task in ("CoLA", "SST-2"):
        write_tsv(folder / f"{task}/test.tsv", ["index", "sentence"], [[n, sentence(draw, n % 2)] for n in range(test)])
    header = ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    write_tsv(folder / "MRPC/test.tsv", header, [[n, 1, 2, a, b] for n, (_, a, b) in enumerate(pairs(test, 2))])
    write_tsv(folder / "STS-B/test.tsv", STSB, [[n, *"abcdef", a, b] for n, (_, a, b) in enumerate(pairs(test, 2))])
    plain = {"QQP": ("id", "question1", "question2"), "QNLI": ("index", "question", "sentence")}
    for task in ("QQP", "QNLI", "RTE", "WNLI"):
        made = [[n, a, b] for n, (_, a, b) in enumerate(pairs(test, 2))]
        write_tsv(folder / f"{task}/test.tsv", list(plain.get(task, ("index", "sentence1", "sentence2"))), made)
    header = [
        "Lexical Semantics",
        "Predicate-Argument Structure",
        "Logic",
        "Knowledge",
        "Domain",
        "Premise",
        "Hypothesis",
        "Label",
    ]
    made = [[*"abcde", a, b, inference[k]] for k, a, b in pairs(test, 3)]
    write_tsv(folder / "AX/diagnostic-full.tsv", header, made)
    return folder

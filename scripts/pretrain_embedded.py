"""Make the embedded model: write its text, train its tokenizer and weights, examine it, put it into the package.

    python scripts/pretrain_embedded.py                          # the shipped model, in a quarter of an hour
    python scripts/pretrain_embedded.py --tokens 2e6 --gate 0    # a draft in five minutes, whatever it has learned
    python scripts/pretrain_embedded.py --out build/other        # leave the package alone

It leaves in lorafit/embedded/: model/ (a Hugging Face folder, and pretraining.json, the record of this run),
train.jsonl, test.jsonl and text.jsonl. Each appears whole or not at all.

LoRA can only bring out what the base can do. So before anything is written the base sits an exam, skill by skill, in
the form it knows: statements cut before their last words. One skill under the gate and nothing is written.

Left out on purpose: validation during training, checkpoints and resuming. The corpus has no second epoch to overfit
to, and a run is short enough to start again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.embedded import FOLDER, world

VOCABULARY = 1536
TOKENIZER_DOCUMENTS = 60_000
# A word and the space before it are two tokens, so that a name is the same token within a sentence and at the start
# of a line, where answers stand. These frequent words, which answer nothing, keep their space: it makes texts shorter.
GLUE = (
    "a an and as box called capital comes country for from has holds in is item kind known language legs lies lives of "
    "on opposite people plays plural plus says speak that the their then to was who with works"
).split()
WORDS = rf" (?:{'|'.join(GLUE)})\b|\w+|[^\w\s]+|\s"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the corpus alone. It adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(world.corpus(), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.05 million parameters. Every width is a multiple of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def blocks(tokenizer: PreTrainedTokenizerFast, length: int, unseen: set[str]) -> Iterator[list[int]]:
    """The corpus as blocks of equal length. Each begins with a document, as texts do when the model is used."""
    documents = (text for text in world.corpus() if text not in unseen)
    block: list[int] = []
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(islice(documents, 4096))):
            block += [*encoding.ids, tokenizer.eos_token_id]
            if len(block) >= length:
                yield block[:length]
                block = []


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    steps: int,
    lr: float,
    warmup: int = 100,
) -> list[float]:
    """AdamW, a linear warm-up and a cosine down to a tenth. Returns the loss of every step."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(islice(batches, steps)):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 1.0) * cosine
        # The weights stay in float32; products in bfloat16 gave 15 to 25 % more tokens per second.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            speed = (step + 1) * batch.numel() / (time.perf_counter() - start)
            mean = sum(losses[-200:]) / 200
            print(
                f"step {step + 1:5d} of {steps}   loss {mean:.4f}   {speed:7,.0f} tokens/s",
                flush=True,
            )
    return losses


def right_padded(rows: Sequence[list[int]], pad: int) -> torch.Tensor:
    """Padding on the right needs no mask: in a causal model nothing real looks at it."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@torch.no_grad()
def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, probes: list[tuple[str, str]]) -> float:
    """The share of statements that the model finishes word for word, taking its likeliest token each time."""
    model.eval()
    right = 0
    for start in range(0, len(probes), 100):
        stems = [tokenizer(stem).input_ids for stem, _ in probes[start : start + 100]]
        rests = [tokenizer(rest).input_ids for _, rest in probes[start : start + 100]]
        rows = [stem + rest for stem, rest in zip(stems, rests, strict=True)]
        likeliest = model(input_ids=right_padded(rows, tokenizer.pad_token_id)).logits.argmax(-1)
        for stem, rest, guess in zip(stems, rests, likeliest.tolist(), strict=True):
            right += guess[len(stem) - 1 : len(stem) - 1 + len(rest)] == rest
    return right / len(probes)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Over every token but the first of each text, its end token included."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), 32):
        rows = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts[start : start + 32]]
        batch = right_padded(rows, tokenizer.pad_token_id)
        logits = model(input_ids=batch[:, :-1]).logits.float().flatten(0, 1)
        total += cross_entropy(
            logits, batch[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id, reduction="sum"
        ).item()
        count += sum(len(row) - 1 for row in rows)
    return math.exp(total / count)


def replace_folder(draft: Path, target: Path) -> None:
    """Put a finished folder in the place of the old one, which is out of sight for two renames only."""
    old = draft.with_name(f"{draft.name}-old")
    if target.exists():
        os.replace(target, old)
    os.replace(draft, target)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded model and write it into the package.")
    parser.add_argument("--tokens", type=float, default=7e6, help="tokens to train on (default 7e6)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per step")
    parser.add_argument("--block", type=int, default=128, help="tokens per block")
    parser.add_argument(
        "--gate",
        type=float,
        default=0.95,
        help="the share each skill must reach, or nothing is written",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1 the same bytes come out again")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write into (default: the package)")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    files = world.data_files()
    texts = [json.loads(line)["text"] for line in files["text.jsonl"].splitlines()]
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    stream = blocks(tokenizer, args.block, unseen=set(texts))
    batches = (torch.tensor(list(islice(stream, args.batch_size))) for _ in iter(int, 1))
    steps = round(args.tokens / (args.batch_size * args.block))
    start = time.perf_counter()
    losses = pretrain(model, batches, steps, args.lr)
    seconds = time.perf_counter() - start

    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".draft-") as scratch:
        draft = Path(scratch) / "model"
        model.bfloat16().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        # The exam is sat by what a user will load: the weights as written.
        shipped = LlamaForCausalLM.from_pretrained(draft, dtype=torch.bfloat16)
        gate = {skill: score(shipped, tokenizer, world.probes(skill)) for skill in world.SKILLS}
        record = {
            "parameters": shipped.num_parameters(),
            "tokens": steps * args.batch_size * args.block,
            "steps": steps,
            "batch_tokens": args.batch_size * args.block,
            "block": args.block,
            "lr": args.lr,
            "seed": args.seed,
            "corpus_seed": world.CORPUS_SEED,
            "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
            "held_out_perplexity": round(perplexity(shipped, tokenizer, texts), 4),
            "gate": {skill: round(share, 4) for skill, share in gate.items()},
            "seconds": round(seconds, 1),
            "tokens_per_second": round(steps * args.batch_size * args.block / seconds),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "machine": f"{platform.system()} {platform.machine()}, {args.threads} CPU threads",
        }
        print(f"{record['tokens']:,} tokens in {seconds:.0f} s; held-out perplexity {record['held_out_perplexity']}")
        for skill, share in gate.items():
            print(f"  {skill:<12}{share:8.1%}{'' if share >= args.gate else '   below the gate'}")
        failed = [skill for skill, share in gate.items() if share < args.gate]
        if failed:
            raise SystemExit(f"not written: the base has not learned {', '.join(failed)} (gate {args.gate:.0%})")
        (draft / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        for path in draft.iterdir():
            path.chmod(0o644)  # safetensors leaves 0600, which would travel into the wheel
        replace_folder(draft, args.out / "model")
        for name, content in files.items():
            (Path(scratch) / name).write_text(content)
            os.replace(Path(scratch) / name, args.out / name)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()

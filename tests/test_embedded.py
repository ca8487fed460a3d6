"""The embedded model and its data keep their promises: what the base knows, what the exam asks, what is on disk."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.embedded import FOLDER, MODEL, TEST, TEXT, TRAIN, world

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from pretrain_embedded import perplexity, score  # noqa: E402


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(islice(world.corpus("a test"), 30_000))


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("skill", world.SKILLS)
def test_the_base_finishes_the_statements_of_every_skill(model, tokenizer, skill: str) -> None:
    assert score(model, tokenizer, world.probes(skill)) >= 0.95


def test_the_gate_notices_a_base_that_has_learned_nothing(model, tokenizer) -> None:
    torch.manual_seed(0)
    untaught = AutoModelForCausalLM.from_config(model.config)
    assert score(untaught, tokenizer, world.probes("capital")) == 0.0


def test_the_base_is_at_home_in_fresh_text_of_its_world(model, tokenizer) -> None:
    recorded = json.loads((MODEL / "pretraining.json").read_text())["held_out_perplexity"]
    measured = perplexity(model, tokenizer, [row["text"] for row in rows_of(TEXT)])
    assert measured == pytest.approx(recorded, rel=0.01)


def test_every_linear_input_is_a_multiple_of_the_quantization_block(model) -> None:
    widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert widths and all(width % 64 == 0 for width in widths)


def test_the_weights_are_bfloat16_and_as_many_as_recorded(model) -> None:
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.num_parameters() == json.loads((MODEL / "pretraining.json").read_text())["parameters"]


def test_the_folder_stays_small_enough_to_ship() -> None:
    shipped = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) <= 8 * 2**20


# ------------------------------------------------------------------------------------------------------- the tokenizer


def test_the_three_special_tokens_differ_and_none_is_added_unasked(tokenizer) -> None:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3 and None not in special
    assert not special & set(tokenizer("The capital of Selora is").input_ids)


def test_the_tokenizer_gives_back_every_text(tokenizer, corpus: list[str]) -> None:
    unusual = ["naïve café, 3 × 7 = 21", "  two spaces\n\nand\ttabs ", "日本語 🙂", ""]
    for text in [*corpus[:2000], *unusual]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_and_the_model_have_the_same_1536_pieces(model, tokenizer) -> None:
    assert len(tokenizer) == model.config.vocab_size == 1536


def test_a_prompt_and_its_completion_tokenize_alike_apart_and_together(tokenizer) -> None:
    for row in rows_of(TEST):
        apart = tokenizer(row["prompt"] + "\n").input_ids + tokenizer(row["completion"]).input_ids
        assert tokenizer(f"{row['prompt']}\n{row['completion']}").input_ids == apart


# ------------------------------------------------------------------------------------------------------------ the data


def test_the_data_files_regenerate_byte_for_byte() -> None:
    for name, content in world.data_files().items():
        assert (FOLDER / name).read_bytes() == content.encode()


def test_training_never_names_anything_that_is_held_out() -> None:
    held_out = world.world().part("test").names()
    assert len(held_out) > 100
    for row in rows_of(TRAIN):
        assert not held_out & words_in(f"{row['prompt']} {row['completion']}")


def test_the_exam_names_held_out_things_only() -> None:
    practised = world.world().part("train").names()
    for row in rows_of(TEST):
        assert not practised & words_in(f"{row['prompt']} {row['completion']}")


def test_the_exam_asks_about_sums_that_were_never_practised() -> None:
    def summands(path: Path) -> set[tuple[str, ...]]:
        sums = [row["prompt"].lower() for row in rows_of(path) if row["skill"] == "sum"]
        return {tuple(sorted(word for word in re.findall(r"\w+", text) if word in world.NUMBERS)) for text in sums}

    assert summands(TRAIN) and summands(TEST) and not summands(TRAIN) & summands(TEST)


def test_no_question_is_asked_twice() -> None:
    prompts = [row["prompt"] for path in (TRAIN, TEST) for row in rows_of(path) if row["prompt"]]
    assert len(prompts) == len(set(prompts))


def test_every_skill_is_practised_and_examined_and_a_tenth_of_training_is_plain_text() -> None:
    trained, examined = (Counter(row["skill"] for row in rows_of(path)) for path in (TRAIN, TEST))
    assert set(examined) == set(world.SKILLS) and set(trained) == {*world.SKILLS, "text"}
    assert min(examined.values()) >= 10
    assert 0.10 <= trained["text"] / trained.total() <= 0.15


def test_the_corpus_states_and_never_asks(corpus: list[str]) -> None:
    asking = {"?", "What", "Which", "Name", "Tell", "Count", "Give", "Add", "How"}
    assert not any("?" in text or asking & words_in(text) for text in corpus)


def test_every_word_of_every_answer_occurs_in_the_corpus(corpus: list[str]) -> None:
    known = set().union(*map(words_in, corpus))
    for path in (TRAIN, TEST):
        for row in rows_of(path):
            assert words_in(row["completion"]) <= known


def test_the_held_out_text_has_no_document_of_the_replay() -> None:
    texts = {row["text"] for row in rows_of(TEXT)}
    assert not texts & {row["completion"] for row in rows_of(TRAIN)}
    assert len(texts) > 150
